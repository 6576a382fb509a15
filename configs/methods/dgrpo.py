"""DGRPO (VITAL): groups that find a question easy count half.

Source: a single secondary page; whether it divides by a deviation was not seen. A weight on the reward of a whole
group has no effect under a z-score, so it multiplies the advantages after it. Paper: 8 samples, learning rate 1e-6,
batch 64. The reward is the sum of accuracy, format and tool use; here tool use is that all calls parse, and accuracy
has no bounds by task, as the source's overlaps in time have.

    python -m agentrl.main --config=configs/methods/dgrpo.py --workdir=runs/dgrpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='DGRPO',
    source='VITAL, secondary page',
    exact='weight clip(2 - D, 0, 1) / 2 + 1 / 2 of the group mean D',
    ours='the weight acts after the z-score, where it is not cancelled',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = (
      {'name': 'tool_use'},
      {'name': 'gate', 'order': tuple({'part': p, 'threshold': 0.0} for p in ('accuracy', 'format', 'calls_parse'))},
      {'name': 'difficulty_w', 'in_reward': False})
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {'maps': {'name': 'scale_by_part', 'part': 'difficulty_weight'}}}})
  return c
