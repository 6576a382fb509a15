"""Direct preference optimisation on whole trajectories: successes against failures of the present policy.

The reference is the cold start throughout. beta 0.1; rounds and pairs are ours.

    python -m agentrl.main --config=configs/methods/dpo.py --workdir=runs/dpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='DPO',
    source='Rafailov et al., arXiv 2305.18290',
    exact='loss; sums over sampled tokens only',
    ours='on-policy rounds with a fixed reference; success against failure, one to one',
    test='tests/algorithms/preference_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.preference.miners.pairs = ConfigDict({'name': 'ranked_pairs', 'per_group': 2})
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
