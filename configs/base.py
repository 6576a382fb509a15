"""Every setting with its default, once. Other configs start from `get_config()` and change what differs.

`python -m agentrl.main --config=configs/NAME.py --workdir=DIR --config.section.key=value` overrides single keys.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the defaults."""
  c = ConfigDict()
  c.seed = 0
  # What to run, in order: 'sft', 'rl', 'eval:NAME', 'eval_without_tools:NAME'. NAME is the entry of summary.json.
  c.stages = ('sft', 'eval:cold_start', 'rl', 'eval:final', 'eval_without_tools:final')

  c.data = ConfigDict()
  c.data.source = 'reasoning_gym'  # a module of agentrl/data
  c.data.dir = ''  # where data sets are kept; '' for data/ in the workdir
  c.data.train_per_family = 2_000
  c.data.test_per_family = 100
  c.data.options = ConfigDict()  # further arguments of the source

  c.tokenizer = ConfigDict()
  c.tokenizer.path = ''  # a saved tokenizer; '' trains one from the task text
  c.tokenizer.vocab_size = 1_536
  c.tokenizer.digit_group = 2  # digits of a number that share a piece

  c.model = ConfigDict()  # see agentrl.models.config.ModelConfig
  c.model.num_layers = 4
  c.model.width = 160
  c.model.ff_width = 480
  c.model.num_heads = 5
  c.model.num_kv_heads = 5
  c.model.head_dim = 32
  c.model.rope_theta = 10_000.0
  c.model.norm_eps = 1e-6
  c.model.activation = 'silu'
  c.model.gated_mlp = True
  c.model.qkv_bias = False
  c.model.qk_norm = False
  c.model.tied_embeddings = True
  c.model.scale_embeddings = False
  c.model.param_dtype = 'float32'
  c.model.compute_dtype = 'float32'
  c.model.unroll_layers = True
  c.model.remat = False
  c.model.logit_chunk = 0

  c.mesh = ConfigDict()  # devices along each axis of the learner's mesh; -1 takes all that remain
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1

  c.tools = ConfigDict()
  c.tools.names = ('python', 'calculator')  # modules of agentrl/tools
  c.tools.call_format = 'xml'  # 'xml', 'hermes' or 'fenced'
  c.tools.timeout = 5.0  # seconds a call
  c.tools.output = 256  # characters of a result that the policy is shown

  c.environment = ConfigDict()
  c.environment.name = 'tools'
  c.environment.max_turns = 4

  c.reward = ConfigDict()
  c.reward.weights = ConfigDict()  # by part, see agentrl.rewards; empty is 1 for accuracy

  c.rollout = ConfigDict()
  c.rollout.slots = 64
  c.rollout.chunk = 8  # tokens a slot draws between two looks of the host
  c.rollout.turn_tokens = 64
  c.rollout.trajectory_tokens = 192
  c.rollout.context_tokens = 256
  c.rollout.capacities = ()  # sizes of the cache, in tokens a slot; () for a geometric series up to context_tokens
  c.rollout.token_buckets = ()  # tokens of a row that one extension writes; () for 16 and 64
  c.rollout.temperature = 1.0

  c.train = ConfigDict()
  c.train.row_length = 256  # tokens of a packed row; no shorter than rollout.context_tokens
  c.train.micro_rows = 32  # rows in one forward and backward pass

  c.sft = ConfigDict()
  c.sft.traces = 20_000
  c.sft.share_right = 0.5  # share of demonstrations scripted to end in a right answer
  c.sft.steps = 20
  c.sft.updates_per_step = 25  # a step is what is logged, saved, and lost at most by a kill
  c.sft.batch_rows = 32
  c.sft.optimizer = 'muon'
  c.sft.learning_rate = 3e-3
  c.sft.schedule = 'cosine'
  c.sft.warmup = 40  # updates
  c.sft.weight_decay = 0.0
  c.sft.max_grad_norm = 1.0

  c.rl = ConfigDict()
  c.rl.algorithm = 'grpo'  # a module of agentrl/algorithms
  c.rl.options = ConfigDict()  # its arguments
  c.rl.reference = False  # keep the policy as it is when the stage begins, for KL terms
  c.rl.steps = 100
  c.rl.prompts = 64
  c.rl.group_size = 8
  c.rl.minibatches = 1  # updates a step, on disjoint groups
  c.rl.drop_without_signal = False  # leave groups whose rewards are all equal out of the loss
  c.rl.optimizer = 'adamw'
  c.rl.learning_rate = 1e-3
  c.rl.schedule = 'constant'
  c.rl.warmup = 5
  c.rl.weight_decay = 0.0
  c.rl.max_grad_norm = 1.0
  c.rl.trajectories_every = 10  # steps between trajectory files
  c.rl.log_prob_tolerance = 1e-4  # nats between sampler and learner above which an error is logged

  c.eval = ConfigDict()
  c.eval.tasks = 512
  c.eval.samples = 1
  c.eval.temperature = 1.0
  c.eval.top_k = 0
  c.eval.top_p = 1.0

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1  # steps
  c.checkpoint.keep = 2
  c.report = True  # write report.html when a stage ends
  return c
