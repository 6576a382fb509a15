"""MUA-RL: a user in the loop, whose words and the tools' are in neither the loss nor the KL term; the end is right or
wrong.

Code zzwkk/MUA-RL: a language model plays the user; 8 samples, KL .001, learning rate 1e-6, batch 32, 30 turns. Here
a script does: it asks for the first steps of a chain and, from the digit answered, for the rest. Evaluation has the
same user, so that its success is not that of the other configs.

    python -m agentrl.main --config=configs/methods/mua_rl.py --workdir=runs/mua_rl

Toy result: see docs/methods.md.
"""

from ml_collections import ConfigDict

from configs import toy

METHOD = dict(
    title='MUA-RL',
    source='code zzwkk/MUA-RL',
    exact='user in the rollout, masked like the tools; reward 0 or 1, KL .001, 8 samples',
    ours='a scripted user',
    test='tests/envs/chains_user_test.py',
    claim=dict(metric='success', better='higher', than='cold_start'))


def get_config() -> ConfigDict:
  """Returns the config."""
  c = toy.get_config()
  c.environment.name = 'chains_user'
  c.rl.reference = True
  c.rl.options = ConfigDict({'kl_coef': 0.001})
  return c
