"""RoRecomp: train at once on the short right and the long wrong answers; on the rest later, now and then.

Source read on a secondary page; the share, the size of the queue and the probability were not seen. Rewards and
advantages are those of the whole groups. What falls out of the queue forms a second channel with the advantage it
had when it was sampled.

    python -m agentrl.main --config=configs/methods/rorecomp.py --workdir=runs/rorecomp

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='RoRecomp',
    source='RoRecomp, secondary page',
    exact='priority batch by length, advantages of whole groups, first-in first-out leftovers',
    ours='half at once, a queue of 128, probability 1/2; compensation in the same update',
    test='tests/experience/memories_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'priority', 'share': 0.5, 'length': 'calls'},)
  c.rl.select = ({'name': 'recompose'},)
  c.rl.memory = ConfigDict({'name': 'fifo_leftover', 'size': 128, 'probability': 0.5})
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {
      'policy': {'rows': 'fresh'},
      'compensation': {'advantage': {'name': 'given', 'part': 'group_z'}, 'rows': 'replayed'}}})
  return c
