"""The smallest run that does everything: two families, two layers, eight steps over all stages."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config that the tests of training start from."""
  c = base.get_config()
  c.data.train_per_family = 60
  c.data.test_per_family = 8
  c.data.options.families = {'gcd': {'min_value': 2, 'max_value': 99, 'max_numbers': 2},
                             'products': {'min_digits': 1, 'max_digits': 2}}
  c.tokenizer.vocab_size = 512
  c.model.num_layers = 2
  c.model.width = 32
  c.model.ff_width = 64
  c.model.num_heads = 2
  c.model.num_kv_heads = 1
  c.model.head_dim = 16
  c.rollout.slots = 8
  c.rollout.turn_tokens = 16
  c.rollout.trajectory_tokens = 32
  c.rollout.context_tokens = 128
  c.train.row_length = 128
  c.train.micro_rows = 8
  c.sft.traces = 120
  c.sft.steps = 2
  c.sft.updates_per_step = 2
  c.sft.batch_rows = 8
  c.sft.optimizer = 'adamw'  # compiles fastest
  c.sft.warmup = 1
  c.reward.weights.calls = 1.0  # a policy that knows nothing calls something at times
  c.rl.steps = 3
  c.rl.prompts = 4
  c.rl.group_size = 4
  c.rl.warmup = 0
  c.rl.trajectories_every = 1
  c.eval.tasks = 8
  return c
