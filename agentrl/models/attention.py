"""Attention of packed rows by the implementation that the platform is best at.

    xla      the plain products of `layers.attend`, with all scores in memory: any platform, any shape; see `plain`
    cudnn    flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`
    splash   Pallas flash attention on TPUs, which skips blocks that no query may look at

One that cannot do what a policy needs gives way to xla, and the log says why.

Axes: B rows, T tokens, K heads of keys, H of queries.
"""

from __future__ import annotations

import functools
from typing import Any

from absl import logging
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from agentrl.models import layers
from agentrl.models.config import ModelConfig
from agentrl.sharding import mesh as meshes

SAVED = 'attention'  # name of what the remat policy 'attention' keeps
_BEST = {'tpu': 'splash', 'gpu': 'cudnn', 'cuda': 'cudnn'}
_LANES = 128
# Parts that the plain one cuts the queries of a row into, each with the keys up to its last query.
_LEAST_QUERIES, _MOST_PARTS = 128, 8


def choose(config: ModelConfig, length: int, platform: str | None = None) -> str:
  """Returns the implementation for rows of `length` tokens: 'xla', 'cudnn' or 'splash'.

  Args:
    config: Of the policy.
    length: T.
    platform: As jax names it; None for the default backend's.
  """
  name = config.attention
  if name == 'auto':
    name = _BEST.get(platform or jax.default_backend(), 'xla')
  why = _CHECKS[name](config, length)
  if why:
    _say(f'attention {name!r} cannot be used: {why}; taking the plain one, whose memory grows with the square of the '
         'row length')
    return 'xla'
  return name


@functools.cache
def _say(message: str):
  logging.warning(message)


def _cudnn_refuses(config: ModelConfig, length: int) -> str:
  if config.attention_sinks:
    return 'cuDNN has no attention sinks'
  if config.head_dim % 8 or config.head_dim > 128:
    return f'head_dim={config.head_dim} is not a multiple of 8 up to 128'
  if config.compute_dtype not in ('bfloat16', 'float16'):
    return f'compute_dtype={config.compute_dtype!r} is not one of bfloat16 and float16'
  return f'rows of {length} tokens are no multiple of 64' if length % 64 else ''


def _splash_refuses(config: ModelConfig, length: int) -> str:
  if config.head_dim % _LANES and config.head_dim != 64:
    return f'head_dim={config.head_dim} is neither 64 nor a multiple of {_LANES}'
  return f'rows of {length} tokens are no multiple of {_LANES}' if length % _LANES else ''


_CHECKS = {'xla': lambda *_: '', 'cudnn': _cudnn_refuses, 'splash': _splash_refuses}


def shares(config: ModelConfig, length: int, platform: str | None = None) -> bool:
  """Returns whether a segment can go on from another's first tokens, see `visible`, in what `choose` returns.

  The splash kernel knows segments only, and cuDNN's windows count places in a row.
  """
  name = choose(config, length, platform)
  return name == 'xla' or name == 'cudnn' and not any(config.kinds)


def begins(segment_ids: jax.Array) -> jax.Array:
  """Returns [B, T] bool: whether the token before it in the row, if there is one, has another id."""
  return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def visible(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Returns [B, T, T] bool: which tokens, the last axis, each token of packed rows may look at.

  Those of its own segment up to itself. A segment that starts at a position P > 0 goes on from the first P tokens of the
  last one before it that starts at 0, and sees those too.

  Args:
    positions: [B, T] int32, position within the sequence, one more from token to token of a segment.
    segment_ids: [B, T] int32, the same for the tokens of one segment, which lie side by side.
  Example:
    >>> visible(jnp.array([[0, 1, 2, 1, 2]]), jnp.array([[1, 1, 1, 2, 2]]))[0, 4].tolist()
    [True, False, False, True, True]
  """
  index = jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1)
  begin = begins(segment_ids)
  first = jax.lax.cummax(jnp.where(begin, index, 0), axis=1)
  whole = jax.lax.cummax(jnp.where(begin & (positions == 0), index, 0), axis=1)
  shared = jnp.minimum(whole + positions - (index - first), first)
  key, (index, first, whole, shared) = index[:, None], (x[..., None] for x in (index, first, whole, shared))
  return (first <= key) & (key <= index) | (whole <= key) & (key < shared)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float = 0.0,
          sinks: jax.Array | None = None) -> jax.Array:
  """Returns `layers.attend` of rows whose tokens see none behind them, so that up to 7/16 of the scores need not be computed.

  Args:
    q: [B, T, K, H/K, Dh].
    k: [B, T, K, Dh].
    v: [B, T, K, Dh].
    mask: [B, T, T] bool, causal, see `visible`.
    scale: 0 for Dh^-1/2.
    sinks: [K, H/K], or None.
  Returns:
    [B, T, K, H/K, Dh].
  """
  k, v, length = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), q.shape[1]
  parts = max(1, min(length // _LEAST_QUERIES, _MOST_PARTS))
  edges = [i * length // parts for i in range(parts + 1)]
  return jnp.concatenate([
      layers.attend(q[:, start:end], k[..., :end], v[:, :, :end], mask[:, start:end, :end], scale=scale, sinks=sinks)
      for start, end in zip(edges, edges[1:])], axis=1)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, window: int = 0, scale: float = 0.0,
          sinks: None = None, implementation: str = 'cudnn') -> jax.Array:
  """Returns `layers.attend` by cuDNN.

  Args:
    q: [B, T, K, H/K, Dh].
    k: [B, T, K, Dh].
    v: [B, T, K, Dh].
    mask: [B, T, T] bool, causal, see `visible`.
    window: Tokens a query looks back over, itself included; 0 for all.
    scale: 0 for Dh^-1/2.
    sinks: Not supported.
    implementation: 'xla' computes the same without cuDNN, for tests.
  Returns:
    [B, T, K, H/K, Dh].
  """
  del sinks
  out = jax.nn.dot_product_attention(
      q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, mask=mask[:, None], is_causal=True, scale=scale or None,
      local_window_size=(window - 1, 0) if window else None, implementation=implementation)
  return out.reshape(q.shape)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: int = 0, scale: float = 0.0,
           sinks: jax.Array | None = None, interpret: bool = False) -> jax.Array:
  """Returns `layers.attend` within segments, causal, by the splash kernel; on a mesh each device has rows and heads.

  Args:
    q: [B, T, K, H/K, Dh], T a multiple of 128.
    k: [B, T, K, Dh].
    v: [B, T, K, Dh].
    segment_ids: [B, T] int32.
    window: Tokens a query looks back over, itself included; 0 for all.
    scale: 0 for Dh^-1/2.
    sinks: [K, H/K], or None.
    interpret: Run without a TPU, slowly.
  Returns:
    [B, T, K, H/K, Dh].
  """
  q = (q.astype(jnp.float32) * (scale or q.shape[-1]**-0.5)).astype(q.dtype)
  local = functools.partial(_splash_local, window=window, interpret=interpret)
  if meshes.current() is None:
    return local(q, k, v, segment_ids, sinks)
  heads = ('batch', None, 'kv_heads', None)
  spec = meshes.local_spec(heads, k.shape)
  of_sinks = None if sinks is None else jax.sharding.PartitionSpec(spec[2], None)
  queries = jax.sharding.PartitionSpec(*spec, None)
  return jax.shard_map(local, in_specs=(queries, spec, spec, jax.sharding.PartitionSpec(*spec[:2]), of_sinks),
                       out_specs=queries, check_vma=False)(q, k, v, segment_ids, sinks)


def _splash_local(q, k, v, segment_ids, sinks, *, window, interpret):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # pylint: disable=g-import-not-at-top

  b, t, kh, g, dh = q.shape
  kernel = _kernel(t, kh * g, window, interpret)
  attend = lambda q, k, v, ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(ids, ids),
                                       sinks=None if sinks is None else sinks.reshape(-1).astype(jnp.float32))
  out = jax.vmap(attend)(q.reshape(b, t, kh * g, dh).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids)
  return out.swapaxes(1, 2).reshape(b, t, kh, g, dh)


def _kernel(length: int, heads: int, window: int, interpret: bool) -> Any:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # pylint: disable=g-import-not-at-top
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks  # pylint: disable=g-import-not-at-top

  shape = (length, length)
  mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
  block = next(b for b in (512, 256, _LANES) if length % b == 0)
  sizes = kernels.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
                             block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
  return kernels.make_splash_mha(masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                 residual_checkpoint_name=SAVED, interpret=interpret)


def named(attended: jax.Array) -> jax.Array:
  """Returns what attention gave, under the name by which the remat policy 'attention' keeps it."""
  return checkpoint_name(attended, SAVED)


IMPLEMENTATIONS = {'cudnn': cudnn, 'splash': splash}
