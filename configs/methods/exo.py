"""PRefLexOR: ORPO first, then efficient exact optimisation, the reverse KL to the preference labels.

The switch comes after half of the updates; beta 0.1 and label smoothing 1e-3 are recalled. Its recursive
thinking and generated questions are not part of this.

    python -m agentrl.main --config=configs/methods/exo.py --workdir=runs/exo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='ORPO then EXO (PRefLexOR)',
    source='PRefLexOR (abstract); EXO, arXiv 2402.00856 (recalled)',
    exact='both losses and their order',
    ours='place of the switch; on-policy rounds',
    test='tests/algorithms/preference_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.preference.loss = 'sum'
  # Updates; a round makes one or two.
  c.preference.options.terms = ConfigDict({
      'odds': {'name': 'orpo', 'weight': {'schedule': 'switch', 'before': 1.0, 'after': 0.0, 'at': 25}},
      'exact': {'name': 'exo', 'weight': {'schedule': 'switch', 'before': 0.0, 'after': 1.0, 'at': 25}}})
  c.preference.miners.pairs = ConfigDict({'name': 'ranked_pairs', 'per_group': 2})
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
