"""LLDS: trajectories that were not bad must not lose likelihood.

Exact: 0.2 (the script's; the yaml has 0) times the likelihood lost since sampling, on tokens with A >= 0 of
sequences that lose in sum, final answers left out; on GRPO with KL 0.001.
Ours: the answer is the turn without a call, and has the default factor 0 (the adaptive one is option `searches_part`);
2 minibatches a step, because nothing is lost before a first update.

    python -m agentrl.main --config=configs/methods/llds.py --workdir=runs/llds

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='LLDS',
    source='code vengdeng/LLDS',
    exact='penalty 0.2 on lost likelihood of A >= 0, gate over the response, KL 0.001',
    ours='an answer is a whole turn; 2 minibatches',
    test='tests/algorithms/likelihood_floor_test.py',
    claim=dict(metric='success', better='higher', than='grpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.reference = True
  c.rl.minibatches = 2
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'regularisers': {'llds': 0.2, 'kl': 0.001}})
  return c
