"""PPO with generalised advantages on two levels: over turns, then inside each turn.

Recalled, not checked: the recursion (RAGEN, arXiv 2504.20073). With every discount 1 it is configs/methods/ppo.py.
Ours: a discount of 0.95 a turn and none inside it, so that a call pays only if the answer gains by it.

    python -m agentrl.main --config=configs/methods/ppo_bilevel.py --workdir=runs/ppo_bilevel

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='PPO with bi-level GAE',
    source='RAGEN, arXiv 2504.20073 (recursion recalled)',
    exact='GAE over turns, then over the tokens of each',
    ours='discount of a turn 0.95',
    test='tests/algorithms/turn_values_test.py',
    claim=dict(metric='success', better='higher', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.prompts, c.rl.group_size = c.rl.prompts * c.rl.group_size, 1
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'advantage': {'name': 'bilevel_gae', 'turn_gamma': 0.95}}},
      'regularisers': {'value': 0.5}})
  return c
