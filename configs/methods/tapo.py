"""TAPO: DAPO with searches and code, where a broken format costs.

Code Goer17/TAPO. Its settings: length limit 2048 with a buffer of half of it, 4 samples of 64 questions, 4 updates
a step, learning rate 1e-6, weight decay .1, answers scored by edit distance or numeric tolerance. Here answers are
right or wrong.

    python -m agentrl.main --config=configs/methods/tapo.py --workdir=runs/tapo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='TAPO',
    source='code Goer17/TAPO',
    exact='format -1, else the score; clip .2/.28, dual 10; resampling; buffer of half the limit',
    ours='answers are right or wrong; 2 updates a step',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.options = ConfigDict({'clip_low': 0.2, 'clip_high': 0.28, 'clip_dual': 10.0})
  c.rl.minibatches = 2
  c.rl.select = ({'name': 'drop_zero_std', 'part': 'accuracy'},)
  c.rl.max_generation_batches = 10
  c.reward.shapings = ({'name': 'format_gate', 'penalty': -1.0}, {'name': 'overlong', 'max_tokens': 48, 'buffer': 24})
  return c
