"""Search-R1 with PPO: the answer alone is rewarded, the KL penalty is part of the reward.

Code PeterGriffinJin/Search-R1. Its settings: gamma and lambda 1, clip .2, KL .001 in the reward, learning rates
1e-6 and 1e-5 of policy and critic, batch 512 in updates of 256. Here the value head shares the policy's trunk.

    python -m agentrl.main --config=configs/methods/search_r1_ppo.py --workdir=runs/search_r1_ppo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='Search-R1 (PPO)',
    source='code PeterGriffinJin/Search-R1',
    exact='GAE with gamma = lambda = 1 that skips observations, KL .001 in the reward',
    ours='a value head on the shared trunk',
    test='tests/algorithms/gae_test.py',
    claim=dict(metric='success', better='higher', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.algorithm = 'ppo'
  c.rl.reference = True
  c.rl.prompts, c.rl.group_size = 128, 1
  c.rl.minibatches = 2
  c.rl.options = ConfigDict({'kl_in_reward': 0.001})
  return c
