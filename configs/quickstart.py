"""A small policy learns to answer reasoning-gym questions with a Python tool, on two CPU cores.

    bash launch/quickstart.sh

Hardware: two CPU cores. Wall time: 4 to 12 minutes, by the processor (two fast cores: 33 s set-up, 15 s compilation, 97 s cold start, 104 s RL).
Expected: held-out success 0.37 to 0.46 after the cold start, 0.92 to 0.96 after RL over three seeds, at most 0.01 with the tools disabled.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.data.train_per_family = 2_400
  c.model.activation = 'relu2'
  c.model.gated_mlp = False
  c.model.scale_embeddings = True
  c.rollout.turn_tokens = 48
  c.rollout.trajectory_tokens = 96
  c.rollout.context_tokens = 128
  c.rollout.capacities = (64, 128)
  c.rollout.token_buckets = (8, 32)
  c.train.row_length = 128
  c.train.micro_rows = 8  # 1,024 tokens at a time stay near the core
  c.sft.traces = 24_000
  c.sft.share_right = 0.45
  c.rl.select = ({'name': 'drop_zero_std'},)
  c.rl.steps = 70
  c.rl.learning_rate = 3e-4
  c.rl.schedule = 'cosine'
  return c
