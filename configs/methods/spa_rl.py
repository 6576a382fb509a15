"""SPA-RL: the final reward is split among the turns by an estimator of progress, and PPO takes the parts as they come.

The estimator's outputs at the ends of the turns are trained to add up to the final reward. A turn's reward is alpha
c_k + beta g_k with alpha 1 and beta 0.5, g_k = 1 where the action could be executed. PPO with GAE (1, 1 here; not
given) and the KL penalty in the reward, whose coefficient 0.01 is ours; learning rate 3e-6 in the source.

    python -m agentrl.main --config=configs/methods/spa_rl.py --workdir=runs/spa_rl

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='SPA-RL',
    source='SPA-RL, code WangHanLinHenry/SPA-RL-Agent (the paper form)',
    exact='regression of the sum of turns; alpha, beta; reward on the last token of a turn; PPO with KL in the reward',
    ours='the estimator learns during RL rather than before; KL coefficient',
    test='tests/training/side_models_test.py',
    claim=dict(metric='success', better='higher', than='ppo'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.reward.shapings = ({'name': 'executable'},)
  c.rl.side.progress = ConfigDict({'name': 'progress', 'weight': 1.0, 'grounding': 0.5})
  c.rl.reference = True
  c.rl.algorithm = 'compose'
  c.rl.options.channels = ConfigDict({'policy': {
      'advantage': {'name': 'gae', 'part': '', 'turn_part': 'progress', 'kl_in_reward': 0.01},
      'clip': {'name': 'asym', 'low': 0.2, 'high': 0.2}}})
  c.rl.options.regularisers = ConfigDict({'value': 0.5})
  return c
