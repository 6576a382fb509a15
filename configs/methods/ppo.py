"""PPO over tokens: a value head, and no group.

Exact: GAE over the policy's own tokens with gamma = lambda = 1, whitened; clip 0.2; divergence from the reference
in the reward at 0.001 a nat; value coefficient 0.5. The script's learning rates are 1e-6 for the policy and 1e-5
for a critic of its own, its batch 512 in two minibatches.
Ours: the value head reads the policy's trunk and shares its learning rate.

    python -m agentrl.main --config=configs/methods/ppo.py --workdir=runs/ppo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='PPO',
    source='arXiv 1707.06347; settings of Search-R1 train_ppo.sh',
    exact='clip 0.2, gamma = lambda = 1, KL in the reward 0.001, value coefficient 0.5',
    ours="value head on the policy's own trunk",
    test='tests/algorithms/gae_test.py',
    claim=None)


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.prompts, c.rl.group_size = c.rl.prompts * c.rl.group_size, 1
  c.rl.reference = True
  c.rl.algorithm = 'ppo'
  c.rl.options = ConfigDict({'kl_in_reward': 0.001})
  return c
