"""PPR with ReNorm: PPO with rewards of turns that never contradict the outcome.

Source read on a secondary page; how the last turn is handled was not seen. There a model scores how well a turn
follows principles; here the toy world says whether the turn was needed.

    python -m agentrl.main --config=configs/methods/ppr.py --workdir=runs/ppr

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='PPR + ReNorm',
    source='PPR, secondary page',
    exact='turn score + outcome - 1 at the end of each turn; PPO with GAE',
    ours='the judge is the toy world; the last turn gets the outcome',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='avoidable_calls', better='lower', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'true_values'}, {'name': 'renorm', 'turn_part': 'true_need'})
  c.rl.prompts, c.rl.group_size = 128, 1
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'advantage': {'name': 'gae', 'turn_part': 'renormed'}}},
                             'regularisers': {'value': 0.5}})
  return c
