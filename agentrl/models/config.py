"""The shape of a policy."""

from __future__ import annotations

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for contexts longer than those of pretraining.

  Attributes:
    kind: 'linear', 'llama3' or 'yarn'.
    factor: Slow frequencies are divided by it; all of them if linear.
    original_length: Tokens, the context of pretraining; of llama3 and yarn.
    low_frequency: llama3: fewer turns than this within the original length count as slow.
    high_frequency: llama3: more turns than this are left alone; between the two is interpolated.
    beta_slow: yarn: as low_frequency.
    beta_fast: yarn: as high_frequency.
    truncate: yarn: the bounds of the interpolation are whole dimensions.
    attention_factor: yarn: multiplies cosines and sines; 0 for 0.1 ln(factor) + 1.
  """

  kind: str
  factor: float
  original_length: int = 0
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  beta_slow: float = 1.0
  beta_fast: float = 32.0
  truncate: bool = True
  attention_factor: float = 0.0

  def __post_init__(self):
    if self.kind not in ROPE_SCALINGS:
      raise ValueError(f'rope scaling {self.kind!r} is unknown; known: {", ".join(ROPE_SCALINGS)}')
    if self.kind != 'linear' and self.original_length < 1:
      raise ValueError(f'rope scaling {self.kind!r} needs the original_length of pretraining, at least 1')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.

  Attributes:
    vocab_size: V, tokens.
    num_layers: L.
    width: D, of the residual stream.
    ff_width: F, of the feed-forward layer.
    num_heads: H, query heads.
    num_kv_heads: K, key/value heads; divides H.
    head_dim: Dh, of one head; even, since rotary positions turn pairs.
    rope_theta: Base of the rotary frequencies.
    rope_scaling: Of the rotary frequencies; None for none.
    local_rope_theta: Base in layers with a window, whose frequencies are then not scaled; 0 for the same as elsewhere.
    windows: Of each layer: tokens a query looks back over, itself included; 0 for all. () for 0 everywhere.
    norm_eps: Added to the mean square in RMSNorm.
    offset_norms: RMSNorm multiplies by 1 + its scale; scales start at 0 instead of 1.
    post_norms: RMSNorm also of what attention and MLP add to the residual stream.
    activation: 'silu', 'gelu' or 'relu2' (squared ReLU, a third cheaper on CPU), or 'clamped_swiglu', gated only.
    swiglu_alpha: Of clamped_swiglu: gain inside the sigmoid.
    swiglu_limit: Of clamped_swiglu: largest gate, and largest magnitude of what it multiplies.
    gated_mlp: activation(x @ gate) * (x @ up), instead of activation(x @ up).
    num_experts: E, experts of a mixture in place of the MLP, each F wide; 0 for an MLP.
    experts_per_token: Experts that a token goes through.
    normalise_experts: The weights of a token's experts sum to 1; else each is its share among all E.
    expert_bias: Biases on router and experts.
    query_scale: Multiplies attention scores; 0 for Dh^-1/2.
    attention_sinks: A learnt score a query head that takes attention away from the tokens.
    output_bias: A bias on the attention's output projection.
    qkv_bias: Biases on the query, key and value projections.
    qk_norm: RMSNorm of each query and key head before rotation.
    tied_embeddings: The output head is the embedding, transposed.
    scale_embeddings: Multiply embeddings by sqrt(D), so that they enter with unit variance when trained from scratch.
    known_tokens: Ids from this on only pad the embedding: they have probability 0. 0 for no such ids.
    value_head: A scalar read off the last hidden state, for PPO.
    value_width: Hidden units of the value head; 0 for a linear one.
    value_gradient: Whether the value head's gradient reaches the layers below it.
    lora_rank: Of the adapters.
    lora_alpha: An adapter adds lora_alpha / lora_rank times its product.
    lora_targets: Linears with an adapter, by name or pattern as in '*_proj', see `LINEARS`; only adapters are
      trained then. () for none.
    param_dtype: Of the master weights.
    compute_dtype: Of activations; norms, softmax and log-probs are float32 whatever it is.
    unroll_layers: Unroll the learner's loop over layers rather than scan: 1.5 times faster on CPU, but
      compile time grows with L.
    remat: Recompute each layer in the backward pass instead of keeping its activations.
    remat_policy: What is kept all the same: 'nothing', 'attention' (what attention gives), or 'dots' (what products with
      weights give).
    logit_chunk: Tokens whose logits exist at one time in the learner, on each device; 0 for all at once.
    attention: Of the learner: 'xla', 'cudnn' (GPU), 'splash' (TPU), or 'auto' for the one of the platform; see
      `agentrl.models.attention`. A sampler on TPUs has kernels of its own unless this is 'xla'.
    expert_product: Of the learner: 'xla', 'megablox' (TPU), or 'auto'; see `agentrl.models.grouped`.
  """

  vocab_size: int
  num_layers: int = 4
  width: int = 160
  ff_width: int = 480
  num_heads: int = 5
  num_kv_heads: int = 5
  head_dim: int = 32
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  local_rope_theta: float = 0.0
  windows: tuple[int, ...] = ()
  norm_eps: float = 1e-6
  offset_norms: bool = False
  post_norms: bool = False
  activation: str = 'silu'
  swiglu_alpha: float = 1.702
  swiglu_limit: float = 7.0
  gated_mlp: bool = True
  num_experts: int = 0
  experts_per_token: int = 0
  normalise_experts: bool = True
  expert_bias: bool = False
  query_scale: float = 0.0
  attention_sinks: bool = False
  output_bias: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  tied_embeddings: bool = True
  scale_embeddings: bool = False
  known_tokens: int = 0
  value_head: bool = False
  value_width: int = 0
  value_gradient: bool = True
  lora_rank: int = 8
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = ()
  param_dtype: str = 'float32'
  compute_dtype: str = 'float32'
  unroll_layers: bool = True
  remat: bool = False
  remat_policy: str = 'nothing'
  logit_chunk: int = 0
  attention: str = 'auto'
  expert_product: str = 'auto'

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}')
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} is odd; rotary positions turn pairs, take an even one')
    for name, known in _CHOICES.items():
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r} is unknown; known: {", ".join(known)}')
    if self.activation == 'clamped_swiglu' and not self.gated_mlp:
      raise ValueError("activation='clamped_swiglu' is a gate; it needs gated_mlp=True")
    small = [f.name for f in dataclasses.fields(self)
             if f.type == 'int' and getattr(self, f.name) < (0 if f.name in _MAY_BE_ZERO else 1)]
    if small:
      raise ValueError(f'{", ".join(small)} must be at least {0 if small[0] in _MAY_BE_ZERO else 1}')
    if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
      raise ValueError(f'windows={self.windows} must have one number of tokens, at least 0, for each of the '
                       f'num_layers={self.num_layers} layers')
    if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
      raise ValueError(f'experts_per_token={self.experts_per_token} must be from 1 to num_experts={self.num_experts}')
    if self.known_tokens > self.vocab_size:
      raise ValueError(f'known_tokens={self.known_tokens} exceeds vocab_size={self.vocab_size}; the tokenizer has '
                       'ids that the embedding lacks')
    unknown = [p for p in self.lora_targets if not fnmatch.filter(self._linears, p)]
    if unknown:
      raise ValueError(f'lora_targets: {unknown[0]!r} matches no linear; there are {", ".join(self._linears)}')

  @property
  def group_size(self) -> int:
    """Query heads that share a key/value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def kinds(self) -> tuple[int, ...]:
    """The distinct windows, ascending."""
    return tuple(sorted(set(self.windows))) or (0,)

  @property
  def kind_of_layer(self) -> tuple[int, ...]:
    """Index into `kinds` of each layer."""
    return tuple(self.kinds.index(w) for w in self.windows) or (0,) * self.num_layers

  @property
  def adapted(self) -> tuple[str, ...]:
    """The linears that have an adapter, in the order of `LINEARS`."""
    return tuple(n for n in self._linears if any(fnmatch.fnmatch(n, p) for p in self.lora_targets))

  @property
  def _linears(self) -> tuple[str, ...]:
    """Those an adapter can go on: not a gate that is not there, nor experts."""
    absent = LINEARS[4:] if self.num_experts else () if self.gated_mlp else ('gate_proj',)
    return tuple(n for n in LINEARS if n not in absent)


ACTIVATIONS = ('silu', 'gelu', 'relu2', 'clamped_swiglu')
_CHOICES = {
    'activation': ACTIVATIONS,
    'remat_policy': ('nothing', 'attention', 'dots'),
    'attention': ('auto', 'xla', 'cudnn', 'splash'),
    'expert_product': ('auto', 'xla', 'megablox'),
}
ROPE_SCALINGS = ('linear', 'llama3', 'yarn')
# As checkpoints and adapters name them.
LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
# What a run decides about a policy whose shape a checkpoint gives.
RUN_SETTINGS = ('param_dtype', 'compute_dtype', 'unroll_layers', 'remat', 'remat_policy', 'logit_chunk', 'attention',
                'expert_product', 'lora_rank', 'lora_alpha', 'lora_targets')
_MAY_BE_ZERO = ('logit_chunk', 'num_experts', 'experts_per_token', 'known_tokens', 'value_width')
