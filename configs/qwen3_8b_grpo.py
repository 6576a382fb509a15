"""GRPO of Qwen3 8B on the questions of the quickstart, from its published checkpoint.

    python -m agentrl.main --config=configs/qwen3_8b_grpo.py --workdir=runs/qwen3 --config.model.checkpoint=Qwen3-8B

`model.checkpoint` is a folder with config.json, safetensors files and tokenizer.json; without one, a policy of the
quickstart's size is trained from scratch. Needs the extra 'hf'.

Hardware: 8 accelerators of 80 GB or more, by a count of bytes: 16 a parameter for weights, gradients and moments, 8 GB
for the sampler's view and the rest for its cache. It has not been run at this size.
Expected: not measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.stages = ('eval:before', 'rl', 'eval:after')
  c.model.compute_dtype = 'bfloat16'
  c.model.unroll_layers = False
  c.model.remat = True
  c.model.logit_chunk = 512
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.environment.max_turns = 6
  c.rollout.chunk = 16
  c.rollout.turn_tokens = 1_024
  c.rollout.trajectory_tokens = 4_096
  c.rollout.context_tokens = 8_192
  c.rollout.token_buckets = (64, 1_024)
  c.train.row_length = 8_192
  c.train.micro_rows = 8
  c.rl.optimizer = 'adamw'
  c.rl.learning_rate = 1e-6
  c.rl.select = ({'name': 'drop_zero_std'},)
  return c
