"""The blocks of the transformer, as functions of one layer's parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agentrl.models.config import ModelConfig, RopeScaling

# Finite, so that a row with nothing to attend to gives a mean instead of NaN.
MASKED = -1e30


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
    mask: [..., S] bool, True where a query may look.
  """

  cos: jax.Array
  sin: jax.Array
  mask: jax.Array


def sights(config: ModelConfig, positions: jax.Array, distances: jax.Array, mask: jax.Array) -> tuple[Sight, ...]:
  """Returns what each of the `config.kinds` of layers sees.

  Args:
    config: Of the policy.
    positions: [...] int32 of the queries.
    distances: [..., S] int32, or broadcasting to the mask: from key to query, tokens.
    mask: [..., S] bool, where a query may look if nothing limits its window.
  """
  out = []
  for window in config.kinds:
    local = window and config.local_rope_theta
    cos, sin = rotary_angles(positions, config.head_dim, local or config.rope_theta,
                             None if local else config.rope_scaling)
    out.append(Sight(cos, sin, mask & (distances < window) if window else mask))
  return tuple(out)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the pairs (i, i + Dh/2) of x, [..., Dh], by angles whose shapes broadcast to [..., Dh/2]."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def project(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns x @ weights for x [..., D] and weights [D, F], as one plain matrix product.

  With the leading axes kept apart, XLA's CPU backend transposes operands in the backward pass: 15 % of an update.
  """
  flat = x.reshape(-1, x.shape[-1]) @ weights.astype(x.dtype)
  return flat.reshape(*x.shape[:-1], weights.shape[-1])


@jax.custom_vjp
def halve(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the two halves of the last axis; the gradient is one concatenation, not two paddings and a sum."""
  return tuple(jnp.split(x, 2, axis=-1))


halve.defvjp(lambda x: (halve(x), None), lambda _, grads: (jnp.concatenate(grads, axis=-1),))


def project_qkv(layer: dict[str, Any], x: jax.Array, cos: jax.Array, sin: jax.Array, config: ModelConfig):
  """Returns rotated queries, rotated keys and values of normalised inputs.

  Args:
    layer: One layer's parameters.
    x: [..., D] the residual stream.
    cos: [..., Dh/2] float32, see `rotary_angles`.
    sin: As cos.
    config: Of the policy.
  Returns:
    Queries [..., K, H/K, Dh], keys [..., K, Dh], values [..., K, Dh].
  """
  k, g, dh = config.num_kv_heads, config.group_size, config.head_dim
  h = norm(x, layer['attention_norm'], config)
  qkv = project(h, layer['qkv'].reshape(config.width, -1))
  qkv = qkv.reshape(*x.shape[:-1], k, g + 2, dh)
  if any(n in config.adapted for n in ('q_proj', 'k_proj', 'v_proj')):
    parts = [adapt(layer, n, h, config).reshape(*x.shape[:-1], k, -1, dh) if n in config.adapted else
             jnp.zeros((*x.shape[:-1], k, g if n == 'q_proj' else 1, dh), h.dtype)
             for n in ('q_proj', 'k_proj', 'v_proj')]
    qkv += jnp.concatenate(parts, axis=-2)
  if config.qkv_bias:
    qkv += layer['qkv_bias'].astype(h.dtype).reshape((1,) * (x.ndim - 1) + (k, g + 2, dh))
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


def add_attention(layer: dict[str, Any], x: jax.Array, attended: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns x + attended @ out, for attended [..., K, H/K, Dh]."""
  heads = attended.reshape(*x.shape[:-1], -1)
  y = project(heads, layer['out'].reshape(-1, x.shape[-1]))
  if 'o_proj' in config.adapted:
    y += adapt(layer, 'o_proj', heads, config)
  if config.output_bias:
    y += layer['out_bias'].astype(y.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return x + (norm(y, layer['attention_post_norm'], config) if config.post_norms else y)


def add_mlp(layer: dict[str, Any], x: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns x + mlp(norm(x)), [..., D], or x + experts(norm(x))."""
  h = norm(x, layer['mlp_norm'], config)
  y = experts(layer, h, config) if config.num_experts else _mlp(layer, h, config)
  return x + (norm(y, layer['mlp_post_norm'], config) if config.post_norms else y)


def _mlp(layer: dict[str, Any], h: jax.Array, config: ModelConfig) -> jax.Array:
  up = project(h, layer['up'].reshape(config.width, -1))
  added = [n for n in ('gate_proj', 'up_proj') if n in config.adapted]
  if added:
    parts = [adapt(layer, n, h, config) if n in added else jnp.zeros((*h.shape[:-1], config.ff_width), h.dtype)
             for n in ('gate_proj', 'up_proj')[0 if config.gated_mlp else 1:]]
    up += jnp.concatenate(parts, axis=-1)
  h = activate(up, config)
  y = project(h, layer['down'])
  return y + adapt(layer, 'down_proj', h, config) if 'down_proj' in config.adapted else y


def activate(up: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns [..., F] from what the up projection gives: [..., 2 F], gates first, or [..., F] without gates.

  Source: SwiGLU, Shazeer, arXiv 2002.05202; squared ReLU, So et al., arXiv 2109.08668; clamped_swiglu,
  min(g, limit) sigmoid(alpha g) (clip(u) + 1), as gpt-oss's implementation does.
  """
  if config.activation == 'clamped_swiglu':
    gate, up = halve(up)
    gate = jnp.minimum(gate, config.swiglu_limit)
    up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)
  act = {'silu': jax.nn.silu, 'gelu': jax.nn.gelu, 'relu2': lambda y: jnp.square(jax.nn.relu(y))}[
      config.activation]
  if config.gated_mlp:
    gate, up = halve(up)
    return act(gate) * up
  return act(up)


def experts(layer: dict[str, Any], h: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns the weighted sum of each token's best experts, [..., D]; no token is dropped.

  Tokens are sorted by expert, so that each expert is one stretch of one grouped product.

  Args:
    layer: One layer's parameters.
    h: [..., D] normalised inputs.
    config: Of the policy.
  Source: Shazeer et al., arXiv 1701.06538.
  """
  n, d, k = h.size // h.shape[-1], h.shape[-1], config.experts_per_token
  flat = h.reshape(n, d)
  scores = jnp.matmul(flat, layer['router'].astype(h.dtype), preferred_element_type=jnp.float32)
  if config.expert_bias:
    scores += layer['router_bias'].astype(jnp.float32)[None]
  best, chosen = jax.lax.top_k(scores, k)
  weights = jnp.exp(best - jax.nn.logsumexp(best if config.normalise_experts else scores, axis=-1, keepdims=True))
  # Of the n * k (token, expert) pairs.
  pairs = chosen.reshape(-1)
  order = jnp.argsort(pairs, stable=True)
  sizes = jnp.bincount(pairs, length=config.num_experts).astype(jnp.int32)
  weights_up = layer['expert_up'].reshape(config.num_experts, d, -1).astype(h.dtype)
  up = jax.lax.ragged_dot(flat[order // k], weights_up, sizes)
  if config.expert_bias:
    up += layer['expert_up_bias'].reshape(config.num_experts, -1)[pairs[order]].astype(h.dtype)
  down = jax.lax.ragged_dot(activate(up, config), layer['expert_down'].astype(h.dtype), sizes)
  if config.expert_bias:
    down += layer['expert_down_bias'][pairs[order]].astype(h.dtype)
  down = down[jnp.argsort(order)].reshape(n, k, d)
  return jnp.einsum('nkd,nk->nd', down, weights.astype(h.dtype)).reshape(h.shape)
