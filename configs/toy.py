"""The chain world at toy size: what every config of configs/methods starts from.

    python -m agentrl.main --config=configs/toy.py --workdir=runs/toy

Hardware: one CPU core. Wall time: about 4 minutes (20 s set-up, 15 s compilation, 2 to 3 minutes cold start, 25 s RL);
experiments/methods shares the cold start, so that a run takes half a minute.
Expected with GRPO: held-out success 0.36 to 0.39 after the cold start, 0.68 to 0.73 after RL over three seeds.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Returns the config."""
  c = base.get_config()
  c.data.source = 'chains'
  c.data.options.size = 12_288
  c.tokenizer.vocab_size = 372
  c.tokenizer.digit_group = 1
  c.tokenizer.isolated = tuple('FGHKPQ')
  c.model.num_layers = 3
  c.model.width = 96
  c.model.ff_width = 384
  c.model.num_heads = 3
  c.model.num_kv_heads = 3
  c.model.activation = 'relu2'
  c.model.gated_mlp = False
  c.model.scale_embeddings = True
  c.tools.names = ('lookup', 'calculator', 'noise')
  c.tools.options.lookup = ConfigDict({'fail_rate': 0.05})
  c.environment.name = 'chains'
  c.environment.max_turns = 8
  c.reward.name = 'chains'
  c.rollout.slots = 128
  c.rollout.chunk = 4
  c.rollout.turn_tokens = 8
  c.rollout.trajectory_tokens = 48
  c.rollout.context_tokens = 80
  c.rollout.capacities = (80,)
  c.rollout.token_buckets = (8, 16)
  c.train.row_length = 160
  c.train.micro_rows = 16
  c.sft.demonstrator = 'chains'
  c.sft.traces = 12_000
  c.sft.share_right = 0.6
  c.sft.steps = 24
  c.sft.updates_per_step = 25
  c.sft.batch_rows = 16
  c.rl.steps = 30
  c.rl.prompts = 16
  c.rl.group_size = 8
  c.rl.optimizer = 'muon'
  c.rl.learning_rate = 1e-3
  c.rl.schedule = 'constant'
  c.rl.warmup = 3
  c.rl.trajectories_every = 1_000
  c.eval.tasks = 256
  c.eval.samples = 2
  c.checkpoint.every = 1_000
  c.checkpoint.keep = 1
  c.report = False
  c.stages = ('sft', 'eval:cold_start', 'rl', 'eval:final')
  return c
