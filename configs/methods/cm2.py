"""CM2: each turn is scored against a checklist and compared with the same turns of its group.

Exact: scores less the mean per question and turn index, none where four or fewer rows hold the turn; tokens are
weighed by the ratio of the learner's to the sampler's probability, at most 2, and a sequence with one below 1e-4 is
dropped; KL 1e-4.
Ours: fixed items that the toy world's own facts check, where the paper asks a language model.

    python -m agentrl.main --config=configs/methods/cm2.py --workdir=runs/cm2

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='CM2',
    source='code namezhenzhang/CM2-RLCR-Tool-Agent',
    exact='turn scores less the mean of the same turns, cap 2, veto 1e-4, KL 1e-4',
    ours='a rule checks the list, so that no judge fails and nothing is left out for it',
    test='tests/algorithms/turn_credit_test.py',
    claim=dict(metric='avoidable_calls', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'checklist'},)
  c.rl.reference = True
  c.rl.recompute_behaviour = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {
          'advantage': {'name': 'z_per_turn_index', 'turn_part': 'checklist', 'gamma': 0.0, 'std': False,
                        'min_count': 5, 'alone': 'zero'},
          'maps': ({'name': 'mismatch_weight', 'cap': 2.0, 'veto': 1e-4},)}},
      'regularisers': {'kl': 1e-4}})
  return c
