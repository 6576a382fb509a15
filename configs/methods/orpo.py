"""Odds-ratio preference optimisation: imitation of the chosen and a push of the odds, without a reference.

Weight 0.1, recalled. The source trains from the base model in one pass over given pairs; here pairs come from
the policy.

    python -m agentrl.main --config=configs/methods/orpo.py --workdir=runs/orpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ORPO',
    source='Hong et al., arXiv 2403.07691 (recalled)',
    exact='loss',
    ours='on-policy rounds after a cold start',
    test='tests/algorithms/preference_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.preference.loss = 'orpo'
  c.preference.miners.pairs = ConfigDict({'name': 'ranked_pairs', 'per_group': 2})
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
