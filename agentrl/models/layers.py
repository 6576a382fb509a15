"""The blocks of the transformer, as functions of one layer's parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from agentrl.models.activations import activate
from agentrl.models.config import ModelConfig, RopeScaling
from agentrl.models.experts import experts
from agentrl.sharding import mesh as meshes

# Finite, so that a row with nothing to attend to gives a mean instead of NaN.
MASKED = -1e30


# Logical axes of the learner's residual stream but the last.
STREAM = ('batch', 'length')


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: bool = False) -> jax.Array:
  """Returns x / rms(x) * scale along the last axis, computed in float32.

  Args:
    x: [..., D] any float dtype, kept.
    scale: [D].
    eps: Added to the mean square.
    offset: Whether 1 + scale takes the scale's place.
  Source: Zhang and Sennrich, arXiv 1910.07467.
  """
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  scale = scale.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
  return (y * (1.0 + scale if offset else scale)).astype(x.dtype)


def norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns the policy's RMSNorm of x, [..., D]."""
  return rms_norm(x, scale, config.norm_eps, config.offset_norms)


def scale_frequencies(frequencies: jax.Array, theta: float, scaling: RopeScaling) -> tuple[jax.Array, float]:
  """Returns the stretched frequencies and the factor of cosines and sines.

  With n the turns a frequency makes within the original length, and r from 0 (slow) to 1 (fast),

      frequency * (r + (1 - r) / factor)
      llama3: r = clip((n - low_frequency) / (high_frequency - low_frequency), 0, 1)
      yarn:   r falls linearly in the dimension's index, from the one that turns beta_fast times to the one that
              turns beta_slow times

  Args:
    frequencies: [Dh/2] float32, radians a token.
    theta: Their base.
    scaling: See `RopeScaling`.
  Source: yarn, Peng et al., arXiv 2309.00071; llama3, as its checkpoints' implementation does.
  """
  if scaling.kind == 'linear':
    return frequencies / scaling.factor, 1.0
  if scaling.kind == 'llama3':
    turns = scaling.original_length * frequencies / (2 * math.pi)
    fast = jnp.clip((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency), 0.0, 1.0)
    return frequencies * (fast + (1 - fast) / scaling.factor), 1.0
  half = frequencies.shape[0]

  def index_of(turns):
    return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

  first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, 2 * half - 1)
  last = last + 0.001 if first == last else last
  fast = 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)
  attention = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
  return frequencies * (fast + (1 - fast) / scaling.factor), attention


def rotary_angles(positions: jax.Array, head_dim: int, theta: float,
                  scaling: RopeScaling | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines, [..., Dh/2] float32 each, that turn a head at `positions` ([...] int32).

  Source: Su et al., arXiv 2104.09864, in the halves layout of Llama checkpoints.
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  factor = 1.0
  if scaling is not None:
    frequencies, factor = scale_frequencies(frequencies, theta, scaling)
  angles = jax.lax.mul(*jnp.broadcast_arrays(positions.astype(jnp.float32)[..., None], frequencies.reshape(
      (1,) * positions.ndim + (-1,))))
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


class Sight(NamedTuple):
  """What layers of one kind need of the positions.

  Attributes:
    cos: [..., Dh/2] float32, see `rotary_angles`.
    sin: As cos.
    mask: [..., S] bool, True where a query may look; None where attention needs none.
  """

  cos: jax.Array
  sin: jax.Array
  mask: jax.Array | None


def sights(config: ModelConfig, positions: jax.Array, distances: jax.Array,
           mask: jax.Array | None) -> tuple[Sight, ...]:
  """Returns what each of the `config.kinds` of layers sees.

  Args:
    config: Of the policy.
    positions: [...] int32 of the queries.
    distances: [..., S] int32, or broadcasting to the mask: from key to query, tokens.
    mask: [..., S] bool, where a query may look if nothing limits its window; None for no masks.
  """
  out = []
  for window in config.kinds:
    local = window and config.local_rope_theta
    cos, sin = rotary_angles(positions, config.head_dim, local or config.rope_theta,
                             None if local else config.rope_scaling)
    out.append(Sight(cos, sin, mask & (distances < window) if window and mask is not None else mask))
  return tuple(out)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the pairs (i, i + Dh/2) of x, [..., Dh], by angles whose shapes broadcast to [..., Dh/2]."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def project(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns x @ weights, [..., *F], for x [..., D] and weights [D, *F].

  On one device it is one plain matrix product: with the leading axes kept apart, XLA's CPU backend transposes operands
  in the backward pass, 15 % of an update. On a mesh all axes are kept apart: to merge one that is split with others
  moves weights or activations between devices.
  """
  if meshes.current() is not None:
    return jax.lax.dot_general(x, weights.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
  flat = x.reshape(-1, x.shape[-1]) @ weights.reshape(x.shape[-1], -1).astype(x.dtype)
  return flat.reshape(*x.shape[:-1], *weights.shape[1:])


def _without_length(axes: Sequence[str | None]) -> list[str | None]:
  return [None if a == 'length' else a for a in axes]


def _enter(h: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Gathers the rows that a product with split columns reads whole: lest weights be gathered instead."""
  return meshes.move(h, (*axes, None), (*_without_length(axes), None))


def _leave(y: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Splits again what `_enter` gathered: the parts of a sum go to where the rows lie."""
  return meshes.move(y, (*_without_length(axes), None), (*axes, None))


def project_qkv(layer: dict[str, Any], x: jax.Array, cos: jax.Array, sin: jax.Array, config: ModelConfig,
                axes: Sequence[str | None] = STREAM):
  """Returns rotated queries, rotated keys and values of normalised inputs.

  Args:
    layer: One layer's parameters.
    x: [..., D] the residual stream.
    cos: [..., Dh/2] float32, see `rotary_angles`.
    sin: As cos.
    config: Of the policy.
    axes: Logical axes of x but the last.
  Returns:
    Queries [..., K, H/K, Dh], keys [..., K, Dh], values [..., K, Dh].
  """
  k, g, dh = config.num_kv_heads, config.group_size, config.head_dim
  h = _enter(norm(x, layer['attention_norm'], config), axes)
  qkv = project(h, layer['qkv'])
  if any(n in config.adapted for n in ('q_proj', 'k_proj', 'v_proj')):
    parts = [adapt(layer, n, h, config).reshape(*x.shape[:-1], k, -1, dh) if n in config.adapted else
             jnp.zeros((*x.shape[:-1], k, g if n == 'q_proj' else 1, dh), h.dtype)
             for n in ('q_proj', 'k_proj', 'v_proj')]
    qkv += jnp.concatenate(parts, axis=-2)
  if config.qkv_bias:
    qkv += layer['qkv_bias'].astype(h.dtype).reshape((1,) * (x.ndim - 1) + (k, g + 2, dh))
  qkv = meshes.constrain(qkv, (*_without_length(axes), 'kv_heads', None, None))
  q, key, value = qkv[..., :g, :], qkv[..., g, :], qkv[..., g + 1, :]
  if config.qk_norm:
    q = norm(q, layer['query_norm'], config)
    key = norm(key, layer['key_norm'], config)
  return (rotate(q, cos[..., None, None, :], sin[..., None, None, :]),
          rotate(key, cos[..., None, :], sin[..., None, :]), value)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float = 0.0,
           sinks: jax.Array | None = None) -> jax.Array:
  """Returns softmax(scale q k) v with the softmax in float32.

  Axes: B rows, T queries, S keys.

  Args:
    q: [B, T, K, H/K, Dh].
    k: [B, K, Dh, S]: the length last, so that scores are a plain matrix product (twice as fast on CPU).
    v: [B, K, S, Dh].
    mask: [B, T, S] bool, True where a query may look.
    scale: 0 for Dh^-1/2.
    sinks: [K, H/K], see `attention_weights`.
  Returns:
    [B, T, K, H/K, Dh] in q's dtype.
  """
  b, t, kh, g, dh = q.shape
  queries = q.transpose(0, 2, 1, 3, 4).reshape(b, kh, t * g, dh)
  scores = jnp.einsum('bkqd,bkds->bkqs', queries, k, preferred_element_type=jnp.float32) * (scale or dh**-0.5)
  seen = jnp.repeat(mask, g, axis=1)[:, None] if g > 1 else mask[:, None]
  if sinks is not None:
    sinks = jnp.broadcast_to(sinks[None, :, None, :], (1, kh, t, g)).reshape(1, kh, t * g)
  weights = attention_weights(scores, seen, sinks).astype(v.dtype)
  out = jnp.einsum('bkqs,bksd->bkqd', weights, v)
  return out.reshape(b, kh, t, g, dh).transpose(0, 2, 1, 3, 4)


def attention_weights(scores: jax.Array, seen: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
  """Returns the softmax over the last axis of scores, [..., S] float32, where `seen` says so.

  A sink is one more score, of nothing: what it draws is missing from the weights' sum.

  Args:
    scores: [..., S] float32.
    seen: [..., S] bool, broadcasting.
    sinks: [...], broadcasting.
  """
  scores = jnp.where(seen, scores, MASKED)
  if sinks is None:
    return jax.nn.softmax(scores, axis=-1)
  sinks = sinks.astype(jnp.float32)[..., None]
  top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
  weights = jnp.exp(scores - top)
  return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def adapt(layer: dict[str, Any], name: str, x: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns what the adapter of the linear `name` adds for inputs x [..., in]: [..., out].

  Source: LoRA, Hu et al., arXiv 2106.09685.
  """
  pair = layer['lora'][name]
  return project(project(x, pair['a']), pair['b']) * jnp.asarray(config.lora_alpha / config.lora_rank, x.dtype)


def add_attention(layer: dict[str, Any], x: jax.Array, attended: jax.Array, config: ModelConfig,
                  axes: Sequence[str | None] = STREAM) -> jax.Array:
  """Returns x + attended @ out, for attended [..., K, H/K, Dh]; axes are the logical ones of x but the last."""
  heads = attended.reshape(*x.shape[:-1], -1)
  y = project(heads, layer['out'].reshape(-1, x.shape[-1]))
  if 'o_proj' in config.adapted:
    y += adapt(layer, 'o_proj', heads, config)
  if config.output_bias:
    y += layer['out_bias'].astype(y.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  y = _leave(y, axes)
  return x + (norm(y, layer['attention_post_norm'], config) if config.post_norms else y)


def add_mlp(layer: dict[str, Any], x: jax.Array, config: ModelConfig,
            axes: Sequence[str | None] = STREAM) -> jax.Array:
  """Returns x + mlp(norm(x)), [..., D], or x + experts(norm(x)).

  Args:
    layer: One layer's parameters.
    x: [..., D] the residual stream.
    config: Of the policy.
    axes: Logical axes of x but the last.
  """
  h = norm(x, layer['mlp_norm'], config)
  y = experts(layer, h, config, axes) if config.num_experts else _leave(_mlp(layer, _enter(h, axes), config), axes)
  return x + (norm(y, layer['mlp_post_norm'], config) if config.post_norms else y)


def _mlp(layer: dict[str, Any], h: jax.Array, config: ModelConfig) -> jax.Array:
  up = project(h, layer['up'])
  added = [n for n in ('gate_proj', 'up_proj') if n in config.adapted]
  if added:
    parts = [adapt(layer, n, h, config) if n in added else jnp.zeros((*h.shape[:-1], config.ff_width), h.dtype)
             for n in ('gate_proj', 'up_proj')[0 if config.gated_mlp else 1:]]
    up += jnp.stack(parts, axis=-2)
  h = activate(up, config)
  y = project(h, layer['down'])
  return y + adapt(layer, 'down_proj', h, config) if 'down_proj' in config.adapted else y
