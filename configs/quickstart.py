"""A small policy learns to answer reasoning-gym questions with a Python tool, on two CPU cores.

    bash launch/quickstart.sh
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.data.train_per_family = 4_000
  c.model.activation = 'relu2'
  c.model.gated_mlp = False
  c.model.scale_embeddings = True
  c.rollout.turn_tokens = 48
  c.rollout.trajectory_tokens = 120
  c.rollout.context_tokens = 192
  c.rollout.capacities = (96, 192)
  c.train.row_length = 192
  c.sft.traces = 40_000
  c.sft.share_right = 0.45
  c.rl.drop_without_signal = True
  return c
