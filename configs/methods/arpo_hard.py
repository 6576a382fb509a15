"""ARPO with hard attribution: steps that branches share get the mean advantage of all that share them.

As configs/methods/arpo.py otherwise. On the policy's own samples, with a mean over tokens, the gradient equals that of
soft attribution; the two updates of a step, the second of them off-policy, are where they differ.

    python -m agentrl.main --config=configs/methods/arpo_hard.py --workdir=runs/arpo_hard

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs.methods import arpo

METHOD = dict(
    title='ARPO (hard)',
    source='code RUC-NLPIR/ARPO',
    exact='as ARPO, shared steps at the mean advantage of their sharers',
    ours='as ARPO; 2 updates a step',
    test='tests/algorithms/tree_credit_test.py',
    claim=dict(metric='success', better='higher', than='arpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = arpo.get_config()
  c.rl.minibatches = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'maps': 'prefix_mean', 'clip': {'name': 'asym', 'low': 0.2, 'high': 0.2, 'dual': 3.0}}}})
  return c
