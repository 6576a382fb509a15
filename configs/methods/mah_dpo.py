"""DPO with an output layer for each objective over one trunk: success and economy; the policy mixes their
logits.

Heads begin as the output layer plus noise of 0.001; the loss is the mean of the heads' means. Mixed logits of
linear heads are those of the mixed head, so sampling costs nothing. The output layer is not tied to the
embedding.

    python -m agentrl.main --config=configs/methods/mah_dpo.py --workdir=runs/mah_dpo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='MAH-DPO',
    source='MAH-DPO, code pearls-lab/multiobj-align',
    exact='shared trunk, noise, per-head loss, mixing',
    ours='objectives success, and success with few avoidable calls, mixed 3:1; on-policy rounds',
    test='tests/training/sums_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='dpo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.model.tied_embeddings = False
  c.preference.heads = ConfigDict({'success': 0.75, 'economy': 0.25})
  c.preference.miners.success = ConfigDict({'name': 'ranked_pairs', 'per_group': 2})
  c.preference.miners.economy = ConfigDict({
      'name': 'ranked_pairs', 'per_group': 2, 'weights': {'success': 1.0, 'avoidable_calls': -0.3}})
  c.preference.steps = 30
  c.preference.prompts = 16
  c.preference.group_size = 8
  c.preference.pairs = 32
  c.preference.max_updates = 2
  c.preference.trajectories_every = 1_000
  c.stages = ('sft', 'eval:cold_start', 'preference', 'eval:final')
  return c
