"""CISPO: the importance weight is clipped, and no token loses its gradient.

Exact: loss -sg(clip(r)) A l, z-scores, mean over tokens, no KL penalty. Recalled, not checked: the paper uses the
upper bound alone; verl keeps both, ROLL has 0.1 each.
Ours: the bound 1.2; 2 minibatches a step, because ratios are 1 at a first update.

    python -m agentrl.main --config=configs/methods/cispo.py --workdir=runs/cispo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='CISPO',
    source='arXiv 2506.13585',
    exact='clipped weight, every token keeps its gradient',
    ours='upper bound 1.2, no lower one; 2 minibatches',
    test='tests/algorithms/cispo_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.minibatches = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'clip': {'name': 'weight_sg', 'low': 1.0, 'high': 0.2}}}})
  return c
