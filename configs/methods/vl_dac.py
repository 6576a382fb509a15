"""VL-DAC: PPO with one value and one advantage a turn.

Exact: GAE over turns with lambda 0.95, whitened, copied to the turn's tokens; token ratios, clip 0.1; k3 penalty
0.04; clipped value loss 0.5 at the first token of a turn; the values alone are trained at first. gamma is 0.9 to
0.99 by environment, the learning rate 1e-6 to 1e-8, the gradient norm 0.01.
The value is read off the frozen state by a network of its own: the values' gradient does not reach the policy.
Ours: 96 hidden units, one learning rate for both; 5 steps of values alone; a ratio above 10 is cut token by token,
where the release looks at the largest of a micro-batch.

    python -m agentrl.main --config=configs/methods/vl_dac.py --workdir=runs/vl_dac

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='VL-DAC (PPO over turns)',
    source='code corl-team/VL-DAC',
    exact='GAE over turns, clip 0.1, KL 0.04 (k3), value 0.5, values first, their gradient stopped',
    ours='96 hidden units for values, one learning rate; ratios above 10 cut one by one',
    test='tests/algorithms/turn_values_test.py',
    claim=dict(metric='success', better='higher', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.prompts, c.rl.group_size = c.rl.prompts * c.rl.group_size, 1
  c.model.value_width, c.model.value_gradient = 96, False
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {
          'advantage': {'name': 'turn_gae', 'gamma': 0.99, 'lam': 0.95},
          'clip': {'name': 'cut_far', 'low': 0.1, 'high': 0.1},
          'weight': {'schedule': 'switch', 'before': 0.0, 'after': 1.0, 'at': 5}}},
      'regularisers': {'turn_value': 0.5, 'kl': 0.04}})
  return c
