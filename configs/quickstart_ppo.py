"""The quickstart with PPO instead of GRPO: a value head, GAE over the policy's own tokens, one sample a question.

    python -m agentrl.main --config=configs/quickstart_ppo.py --workdir=runs/quickstart_ppo

Hardware as for the quickstart. Not run to its end yet: PPO is held to a success threshold on a smaller task by tests/learning.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
  """Returns the config."""
  c = quickstart.get_config()
  c.rl.algorithm = 'ppo'
  c.rl.options = ConfigDict({'gamma': 1.0, 'lam': 0.95, 'value_coef': 0.5})
  c.rl.prompts = 512
  c.rl.group_size = 1
  c.rl.select = ()
  return c
