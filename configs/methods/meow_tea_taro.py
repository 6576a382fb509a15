"""The practitioner's guide (meow-tea-taro): a plain estimator, with rewards at the ends of turns.

Exact: PPO's advantages over tokens of the turns' rewards and the final one; no estimator of its own. 'reward_to_go'
with the same `turn_part` is its REINFORCE form.
Ours: the turn's reward is plus or minus 0.1, by a rule of the toy world.

    python -m agentrl.main --config=configs/methods/meow_tea_taro.py --workdir=runs/meow_tea_taro

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='PPO with turn rewards',
    source="A practitioner's guide (meow-tea-taro), code",
    exact="verl's GAE with rewards at turn ends",
    ours='a rule labels turns',
    test='tests/algorithms/objective_test.py',
    claim=dict(metric='success', better='higher', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'step_label', 'size': 0.1},)
  c.rl.prompts, c.rl.group_size = c.rl.prompts * c.rl.group_size, 1
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'advantage': {'name': 'gae', 'turn_part': 'step_label'}}},
      'regularisers': {'value': 0.5}})
  return c
