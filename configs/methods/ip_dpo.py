"""Iterative process-aware DPO: pairs ranked by outcome, by what was found out, and against the number of steps.

Only the abstract was read: the weights of the three, and that the reference moves on with the rounds, are
ours. Sufficiency is the number of needed facts that were never found out, counted negative.

    python -m agentrl.main --config=configs/methods/ip_dpo.py --workdir=runs/ip_dpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='IP-DPO (TeaRAG)',
    source='TeaRAG (abstract)',
    exact='three terms of the ranking; iteration',
    ours='weights 1, 0.2 a missing fact, 0.05 a turn; reference of the round',
    test='tests/synthesis/pairs_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='dpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.preference.miners.pairs = ConfigDict({
      'name': 'ranked_pairs', 'per_group': 2, 'min_gap': 0.1,
      'weights': {'success': 1.0, 'missing_calls': -0.2, 'turns': -0.05}})
  c.preference.reference = 'round'
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
