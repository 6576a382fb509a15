"""REINFORCE++: no group and no value head; advantages are whitened over the batch.

Exact: token rewards are the final one at the end, less the divergence from the reference; undiscounted sum from
each token on; whitened over all tokens; clip 0.2; mean over tokens.
Ours: 0.001 a nat of divergence; the prompts of a step are all different.

    python -m agentrl.main --config=configs/methods/reinforce_pp.py --workdir=runs/reinforce_pp

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='REINFORCE++',
    source='arXiv 2501.03262, code volcengine/verl',
    exact='reward to go, whitened over the batch, clip 0.2',
    ours='KL in the reward 0.001',
    test='tests/algorithms/gae_test.py',
    claim=dict(metric='success', better='higher', than='rloo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.prompts, c.rl.group_size = c.rl.prompts * c.rl.group_size, 1
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options = ConfigDict({'channels': {'policy': {
      'advantage': {'name': 'reward_to_go', 'kl_in_reward': 0.001}}}})
  return c
