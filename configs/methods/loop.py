"""LOOP: PPO on leave-one-out advantages, without values, deviation or KL.

Exact: advantage R less the mean of the others; token ratios clipped to [1 / 1.1, 1.1]; trajectories with |A| below
0.01 left out; mean over trajectories of means over tokens; 2 epochs. The paper: 40 questions of 6 rollouts,
minibatches of 32, learning rate 5e-5 with adapters, gradient norm 0.1.
Left out: ending an iteration at a divergence above 20. Cutting the slowest rollouts is `rl.enough`, off here: what is
cut depends on time.

    python -m agentrl.main --config=configs/methods/loop.py --workdir=runs/loop

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='LOOP',
    source='arXiv 2502.01600, code apple/ml-loop',
    exact='leave-one-out, reciprocal clip 0.1, |A| of at least 0.01, mean of means, 2 epochs',
    ours='no end of an iteration at a divergence above 20; no rollout is cut',
    test='tests/algorithms/conditional_test.py',
    claim=dict(metric='success', better='higher', than='rloo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.epochs = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'advantage': 'loo', 'clip': {'name': 'recip', 'high': 0.1}, 'filters': ('abs_adv',),
      'aggregation': 'seq_mean_tok_mean'}}})
  return c
