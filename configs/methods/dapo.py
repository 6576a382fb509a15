"""DAPO: GRPO with a higher upper bound, questions sampled until enough have a signal, and a soft length limit.

Yu et al., arXiv 2503.14476. Paper: Lmax 20480, buffer 4096, 16 samples of 512 questions, 16 updates a step,
learning rate 1e-6, temperature 1, rewards of -1 and 1. With rewards of 0 and 1 half its length penalty is the same
after the z-score. The release rolls out three times as many questions at once; here one batch after the other.

    python -m agentrl.main --config=configs/methods/dapo.py --workdir=runs/dapo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='DAPO',
    source='Yu et al., arXiv 2503.14476',
    exact='clip .2/.28, dual 10, token mean, groups without signal resampled, length penalty',
    ours='after 10 batches it trains on what there is, where the release stops; 2 updates a step',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.options = ConfigDict({'clip_low': 0.2, 'clip_high': 0.28, 'clip_dual': 10.0})
  c.rl.minibatches = 2
  c.rl.select = ({'name': 'drop_zero_std', 'part': 'accuracy'},)
  c.rl.max_generation_batches = 10
  c.reward.shapings = ({'name': 'overlong', 'max_tokens': 48, 'buffer': 10, 'factor': 0.5},)
  return c
