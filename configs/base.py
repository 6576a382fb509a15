"""Every setting with its default, once. Other configs start from `get_config()` and change what differs.

`python -m agentrl.main --config=configs/NAME.py --workdir=DIR --config.section.key=value` overrides single keys.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the defaults."""
  c = ConfigDict()
  c.seed = 0
  # What to run, in order: 'sft', 'rl', 'own_traces', 'preference', 'eval:NAME', 'eval_without_tools:NAME'. NAME is the entry of summary.json.
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
  c.tokenizer.isolated = ()  # further strings that are always a piece of their own

  c.model = ConfigDict()  # see agentrl.models.config.ModelConfig
  c.model.checkpoint = ''  # folder of a published checkpoint; it decides all but the settings from param_dtype on
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
  c.model.remat_policy = 'nothing'  # what is kept with remat: 'nothing', 'attention', 'dots'
  c.model.logit_chunk = 0  # tokens whose logits exist at a time, on each device; 0 for all
  c.model.attention = 'auto'  # 'xla', 'cudnn', 'splash'; 'auto' for the platform's; 'xla' also for a sampler on TPUs without kernels
  c.model.expert_product = 'auto'  # of the learner: 'xla', 'megablox'; 'auto' for the platform's
  c.model.value_width = 0  # hidden units of the value head of a policy that has one; 0 for a linear one
  c.model.value_gradient = True  # whether the value head's gradient reaches the layers below it
  c.model.lora_targets = ()  # linears with an adapter, such as ('*_proj',); only adapters are trained then
  c.model.lora_rank = 8
  c.model.lora_alpha = 16.0

  c.mesh = ConfigDict()  # devices along each axis of the learner's mesh; -1 takes all that remain
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.mesh.expert = 1

  c.tools = ConfigDict()
  c.tools.names = ('python', 'calculator')  # modules of agentrl/tools
  c.tools.options = ConfigDict()  # arguments of the tools, by name
  c.tools.call_format = 'xml'  # 'xml', 'hermes', 'fenced', ...; 'family' for that of model.checkpoint
  c.tools.timeout = 5.0  # seconds a call
  c.tools.output = 256  # characters of a result that the policy is shown

  c.environment = ConfigDict()
  c.environment.name = 'tools'
  c.environment.max_turns = 4

  c.reward = ConfigDict()
  c.reward.name = 'reasoning_gym'  # a module of agentrl/rewards
  c.reward.weights = ConfigDict()  # by part; empty is 1 for accuracy; a number here and below may be a {'schedule': ...} over the steps
  c.reward.shapings = ()  # {'name': module of agentrl/rewards/shaping, **options} each, in order

  c.rollout = ConfigDict()
  # Axes as of `mesh`, over the devices of one process, which samples on them alone; empty for the learner's mesh, or
  # for as much of its tensor and expert axes as one of several processes can have.
  c.rollout.mesh = ConfigDict()
  c.rollout.devices = 0  # of the run, the last ones: for sampling alone, the learner has the others; 0 shares all
  c.rollout.slots = 64  # sessions that draw at a time, of a process
  c.rollout.seats = 0  # sessions in the cache at a time, those included that wait for their tools; 0 for four a slot, on GPUs one
  c.rollout.chunk = 8  # tokens a slot draws between two looks of the host
  c.rollout.turn_tokens = 64
  c.rollout.trajectory_tokens = 192
  c.rollout.trajectory_calls = 1_024
  c.rollout.trajectory_seconds = 3_600.0  # wall time, waiting included
  c.rollout.context_tokens = 256
  c.rollout.capacities = ()  # sizes of the cache, in tokens a slot on average; () for a geometric series up to context_tokens
  c.rollout.room = 0  # tokens that the cache can hold, a slot on average; 0 for the largest of capacities
  c.rollout.block = 0  # tokens of a block of the cache, which contexts share; 0 for about 64, on CPUs 32, on TPUs 128
  c.rollout.token_buckets = ()  # tokens of a row that one extension writes; () for 16 and 64
  c.rollout.priorities = ('begun',)  # who draws first, see agentrl/rollout/priorities.py; then who asked first
  c.rollout.patience = None  # seconds a session may wait in its seat while others want one; None by what waiting and leaving cost
  c.rollout.parked_megabytes = 256  # host memory for the cache of sessions that lost their seats; the rest is computed again
  # By any name: workdir of a run with the same policy and tokenizer, whose last weights draw the words of sessions that
  # agent programs open under this name; see Session.open. They are not trained.
  c.rollout.policies = ConfigDict()
  c.rollout.temperature = 1.0
  c.rollout.constrain = False  # draw within calls only what can become one for one of the tools; needs the extra 'constrain'
  c.rollout.speculate = 0  # tokens guessed from a trajectory's own text and checked in one pass; 0 draws one a pass
  c.rollout.speculate_ngram = 3  # tokens that must have occurred before for what followed them to be a guess

  c.train = ConfigDict()
  c.train.row_length = 256  # tokens of a packed row; no shorter than rollout.context_tokens
  c.train.micro_rows = 32  # rows in one forward and backward pass
  c.train.share_prefixes = True  # compute what the samples of a question begin with once a row, where attention can
  c.train.mask_rows = 1_024  # distinct sets of tokens that a batch's were drawn from, with rollout.constrain; more are compiled anew

  c.sft = ConfigDict()
  c.sft.demonstrator = 'reasoning_gym'  # who scripts the cold start, see agentrl/synthesis
  c.sft.options = ConfigDict()  # its further arguments
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

  c.own_traces = ConfigDict()  # the stage 'own_traces': imitation of the right trajectories of the 'rl' stages before it
  c.own_traces.part = 'accuracy'  # reward part that is 1 for a right one
  c.own_traces.most = 2_000  # trajectories; the latest
  c.own_traces.steps = 2
  c.own_traces.updates_per_step = 25
  c.own_traces.batch_rows = 32
  c.own_traces.optimizer = 'adamw'
  c.own_traces.learning_rate = 1e-3
  c.own_traces.schedule = 'cosine'
  c.own_traces.warmup = 5  # updates
  c.own_traces.weight_decay = 0.0
  c.own_traces.max_grad_norm = 1.0

  c.agent = ConfigDict()
  c.agent.name = 'react'  # a module of agentrl/agents; evaluation takes the plain one, unless eval.agent
  c.agent.options = ConfigDict()  # its arguments

  c.rl = ConfigDict()
  c.rl.algorithm = 'grpo'  # a module of agentrl/algorithms; 'compose' spells all choices out
  c.rl.options = ConfigDict()  # its arguments
  c.rl.select = ()  # {'name': selector, **options} each, in order; see agentrl/algorithms/selectors.py
  c.rl.max_generation_batches = 1  # batches of prompts rolled out at most until enough groups are selected
  c.rl.enough = 1.0  # share of rollouts under way after which the slowest are cut and left out; 1 waits for all
  c.rl.budget = ConfigDict()  # of all rollouts of a step; those under way when it is spent are cut and left out; 0 for none
  c.rl.budget.tokens = 0  # drawn
  c.rl.budget.turns = 0
  c.rl.budget.calls = 0  # of tools
  c.rl.budget.seconds = 0.0
  c.rl.staleness = 0  # steps that a token may be old when it is learned from: (1 + this) * prompts groups are under way
  c.rl.overlap = False  # draw on while the learner updates, and take its weights between two chunks
  c.rl.keep_cache = False  # what older weights computed of the contexts under way is not computed anew
  c.rl.greedy_baseline = False  # roll out each task's likeliest words too: what they earn is the part 'greedy'
  c.rl.memory = ConfigDict()  # 'name', a module of agentrl/experience, and its arguments; empty for none
  c.rl.side = ConfigDict()  # by any name: 'name', a module of agentrl/training/side, and its arguments; empty for none
  c.rl.reference = False  # keep the policy as it is when the stage begins, for KL terms
  c.rl.tasks = 0  # ask only the first tasks of the data, so that each comes up often; 0 for all
  c.rl.steps = 100
  c.rl.prompts = 64
  c.rl.group_size = 8
  c.rl.minibatches = 1  # updates on disjoint groups that one pass over a step's trajectories makes
  c.rl.epochs = 1  # passes
  c.rl.recompute_behaviour = False  # take the learner's log-probs for those of sampling, where contexts were edited
  c.rl.optimizer = 'adamw'
  c.rl.learning_rate = 1e-3
  c.rl.schedule = 'constant'
  c.rl.warmup = 5
  c.rl.weight_decay = 0.0
  c.rl.max_grad_norm = 1.0
  c.rl.trajectories_every = 10  # steps between trajectory files
  c.rl.log_prob_tolerance = 1e-4  # nats between sampler and learner above which an error is logged

  c.preference = ConfigDict()  # the stage 'preference': roll out, find pairs, learn from them
  c.preference.loss = 'dpo'  # of agentrl/algorithms/preference.py
  c.preference.options = ConfigDict()  # its arguments
  c.preference.miners = ConfigDict()  # by any name: 'name', a module of agentrl/synthesis that finds pairs, and its arguments
  c.preference.heads = ConfigDict()  # weights by the miners' names: an output layer for each, mixed so; empty for one
  c.preference.reference = 'stage'  # the policy when the 'stage' or the 'round' begins
  c.preference.steps = 10  # rounds
  c.preference.prompts = 64
  c.preference.group_size = 8
  c.preference.pairs = 64  # of an update
  c.preference.max_updates = 8  # of a pass over a round's pairs; what is beyond is left out
  c.preference.epochs = 1  # passes
  c.preference.optimizer = 'adamw'
  c.preference.learning_rate = 3e-4
  c.preference.schedule = 'constant'
  c.preference.warmup = 5
  c.preference.weight_decay = 0.0
  c.preference.max_grad_norm = 1.0
  c.preference.trajectories_every = 10  # rounds between trajectory files

  c.offline_q = ConfigDict()  # the stage 'offline_q': critics learned from a log, imitation of the best action of many
  c.offline_q.prompts = 64  # of the log
  c.offline_q.group_size = 2
  c.offline_q.turns = 256  # of the log that are learned from
  c.offline_q.actions = 16  # offered at each, the logged one included
  c.offline_q.least_draws = 1  # times that an action is drawn there if it is to be imitated
  c.offline_q.batch = 64  # turns of an update
  c.offline_q.critic_steps = 20  # passes over the log
  c.offline_q.actor_steps = 20  # updates
  c.offline_q.gamma = 0.95
  c.offline_q.target_rate = 0.1
  c.offline_q.threshold = 0.05  # least advantage of an action that is imitated
  c.offline_q.hidden = 64
  c.offline_q.critic_learning_rate = 1e-3
  c.offline_q.critic_max_grad_norm = 1.0
  c.offline_q.optimizer = 'adamw'
  c.offline_q.learning_rate = 1e-3
  c.offline_q.schedule = 'constant'
  c.offline_q.warmup = 0
  c.offline_q.max_grad_norm = 1.0

  c.eval = ConfigDict()
  c.eval.tasks = 512
  c.eval.samples = 1
  c.eval.agent = False  # play as `agent` says, with what it has learned, instead of plainly
  c.eval.temperature = 1.0
  c.eval.top_k = 0
  c.eval.top_p = 1.0

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1  # steps
  c.checkpoint.keep = 2
  c.checkpoint.init_from = ''  # workdir of a run whose policy and tokenizer a new run starts from; '' for none
  c.report = True  # write report.html when a stage ends
  return c
