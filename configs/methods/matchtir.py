"""MatchTIR: the calls of each turn are matched to those the task takes.

Exact: call similarity by name, argument names and values; the Hungarian assignment of the paper (the release is
greedy); unmatched calls 0; last turn the F1 score of the answer; A the mean of the z-score of the summed reward and
that of the turn's return, discounted by 0.9, among the same turns of the group; KL 0.001, entropy 0.001. The paper:
16 samples, learning rate 1e-6.

    python -m agentrl.main --config=configs/methods/matchtir.py --workdir=runs/matchtir

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='MatchTIR',
    source='code quchangle1/MatchTIR',
    exact='Hungarian matching, (A_trajectory + A_turn) / 2, KL and entropy 0.001',
    ours='true calls are the facts to look up; population deviations; 8 samples',
    test='tests/rewards/turn_shapings_test.py',
    claim=dict(metric='avoidable_calls', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'match_turn'},)
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'advantage': {'name': 'sum', 'terms': {
          'trajectory': {'name': 'z', 'part': 'match_sum', 'weight': 0.5},
          'turn': {'name': 'z_per_turn_index', 'turn_part': 'match', 'weight': 0.5}}}}},
      'regularisers': {'kl': 0.001, 'entropy': 0.001}})
  return c
