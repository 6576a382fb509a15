"""GSPO: one importance ratio a sequence, the geometric mean of its tokens'.

Exact: the gradient of each token flows through its own log-probability; mean over sequences of means over tokens.
Recalled, not checked: bounds 3e-4 and 4e-4.
Ours: 2 minibatches a step, because ratios are 1 at a first update.

    python -m agentrl.main --config=configs/methods/gspo.py --workdir=runs/gspo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='GSPO',
    source='arXiv 2507.18071, code volcengine/verl',
    exact='one ratio a sequence, mean over sequences',
    ours='2 minibatches; bounds recalled',
    test='tests/algorithms/ratios_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.minibatches = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'ratio': 'sequence_geo', 'clip': {'name': 'asym', 'low': 3e-4, 'high': 4e-4},
      'aggregation': 'seq_mean_tok_mean'}}})
  return c
