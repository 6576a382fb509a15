"""OTC-PPO: a right answer is worth the more the fewer calls it took; PPO.

Source read on a secondary page. Reward: right times cos(m pi / (2 m + c)) for m calls. The toy question takes at
most 8 turns, so that c, "about the most calls" of a trajectory, is 7; the source's value is not known. PPO as in
Search-R1: gamma and lambda 1, KL .001 in the reward.

    python -m agentrl.main --config=configs/methods/otc_ppo.py --workdir=runs/otc_ppo

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='OTC-PPO',
    source='OTC, secondary page',
    exact='multiplicative reward, cosine of the calls',
    ours='c = 7, the most calls of a toy question',
    test='tests/rewards/shaping_test.py',
    claim=dict(metric='calls_per_task', better='lower', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.rl.algorithm = 'ppo'
  c.rl.options = ConfigDict({'kl_in_reward': 0.001})
  c.rl.reference = True
  c.rl.prompts, c.rl.group_size = 128, 1
  c.reward.shapings = ({'name': 'mult_eff', 'variant': 'smooth', 'max_calls': 7},)
  return c
