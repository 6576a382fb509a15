"""BN-GSPO: GSPO on advantages that are whitened twice, in the group and over the batch.

Exact: z-scores with the unbiased deviation, then over all trajectories of the batch with the population's and 1e-9;
clip 0.2, no KL penalty as in the released run, whose script does not set the two flags that make it BN-GSPO.
Ours: 2 minibatches a step, because ratios are 1 at a first update.

    python -m agentrl.main --config=configs/methods/bn_gspo.py --workdir=runs/bn_gspo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='BN-GSPO',
    source='code OpenSenseNova/SenseNova-MARS core_algos.py',
    exact='z in the group (ddof 1), then over the batch; sequence ratio',
    ours='clip 0.2 of the released run; 2 minibatches',
    test='tests/algorithms/baselines_test.py',
    claim=dict(metric='success', better='higher', than='gspo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.minibatches = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'advantage': {'name': 'z', 'ddof': 1}, 'maps': ('batch_z',), 'ratio': 'sequence_geo',
      'aggregation': 'seq_mean_tok_mean'}}})
  return c
