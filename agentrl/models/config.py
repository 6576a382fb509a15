"""The shape of a policy."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

  Attributes:
    vocab_size: V, tokens.
    num_layers: L.
    width: D, of the residual stream.
    ff_width: F, of the feed-forward layer.
    num_heads: H, query heads.
    num_kv_heads: K, key/value heads; divides H.
    head_dim: Dh, of one head; even, since rotary positions turn pairs.
    rope_theta: Base of the rotary frequencies.
    norm_eps: Added to the mean square in RMSNorm.
    activation: 'silu', 'gelu' or 'relu2' (squared ReLU, a third cheaper on CPU).
    gated_mlp: activation(x @ gate) * (x @ up), instead of activation(x @ up).
    qkv_bias: Biases on the query, key and value projections.
    qk_norm: RMSNorm of each query and key head before rotation.
    tied_embeddings: The output head is the embedding, transposed.
    scale_embeddings: Multiply embeddings by sqrt(D), so that they enter with unit variance when trained from scratch.
    value_head: A scalar read off the last hidden state, for PPO.
    param_dtype: Of the master weights.
    compute_dtype: Of activations; norms, softmax and log-probs are float32 whatever it is.
    unroll_layers: Unroll the learner's loop over layers rather than scan: 1.5 times faster on CPU, but
      compile time grows with L.
    remat: Recompute each layer in the backward pass instead of keeping its activations.
    logit_chunk: Tokens whose logits exist at one time in the learner; 0 for all at once.
  """

  vocab_size: int
  num_layers: int = 4
  width: int = 160
  ff_width: int = 480
  num_heads: int = 5
  num_kv_heads: int = 5
  head_dim: int = 32
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  activation: str = 'silu'
  gated_mlp: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  tied_embeddings: bool = True
  scale_embeddings: bool = False
  value_head: bool = False
  param_dtype: str = 'float32'
  compute_dtype: str = 'float32'
  unroll_layers: bool = True
  remat: bool = False
  logit_chunk: int = 0

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}')
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} is odd; rotary positions turn pairs, take an even one')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation={self.activation!r} is unknown; known: {", ".join(ACTIVATIONS)}')
    small = [f.name for f in dataclasses.fields(self)
             if f.type == 'int' and f.name != 'logit_chunk' and getattr(self, f.name) < 1]
    if small:
      raise ValueError(f'{", ".join(small)} must be at least 1')

  @property
  def group_size(self) -> int:
    """Query heads that share a key/value head."""
    return self.num_heads // self.num_kv_heads


ACTIVATIONS = ('silu', 'gelu', 'relu2')
