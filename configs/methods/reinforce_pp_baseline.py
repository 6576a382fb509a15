"""REINFORCE++ with a baseline: the group's mean is taken off before whitening.

Exact: reward less the group's mean on every token, whitened over the batch; clip 0.2; k2 penalty in the loss.
Ours: the penalty's coefficient 0.001.

    python -m agentrl.main --config=configs/methods/reinforce_pp_baseline.py --workdir=runs/reinforce_pp_baseline

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='REINFORCE++-baseline',
    source='arXiv 2501.03262, code volcengine/verl',
    exact='group mean, then whitening over the batch, k2 penalty',
    ours='KL coefficient 0.001',
    test='tests/algorithms/gae_test.py',
    claim=dict(metric='success', better='higher', than='reinforce_pp'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({
      'channels': {'policy': {'advantage': {'name': 'reward_to_go', 'group_baseline': True}}},
      'regularisers': {'kl': {'coef': 0.001, 'estimator': 'k2'}}})
  return c
