"""The blocks of the transformer, as functions of one layer's parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from agentrl.models.config import ModelConfig

# Finite, so that a row with nothing to attend to gives a mean instead of NaN.
MASKED = -1e30


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Returns x / rms(x) * scale along the last axis, computed in float32.

  Args:
    x: [..., D] any float dtype, kept.
    scale: [D].
    eps: Added to the mean square.
  Source: Zhang and Sennrich, arXiv 1910.07467.
  """
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines, [..., Dh/2] float32 each, that turn a head at `positions` ([...] int32).

  Source: Su et al., arXiv 2104.09864, in the halves layout of Llama checkpoints.
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = jax.lax.mul(*jnp.broadcast_arrays(positions.astype(jnp.float32)[..., None], frequencies.reshape(
      (1,) * positions.ndim + (-1,))))
  return jnp.cos(angles), jnp.sin(angles)


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
  h = rms_norm(x, layer['attention_norm'], config.norm_eps)
  qkv = project(h, layer['qkv'].reshape(config.width, -1))
  qkv = qkv.reshape(*x.shape[:-1], k, g + 2, dh)
  if config.qkv_bias:
    qkv += layer['qkv_bias'].astype(h.dtype).reshape((1,) * (x.ndim - 1) + (k, g + 2, dh))
  q, key, value = qkv[..., :g, :], qkv[..., g, :], qkv[..., g + 1, :]
  if config.qk_norm:
    q = rms_norm(q, layer['query_norm'], config.norm_eps)
    key = rms_norm(key, layer['key_norm'], config.norm_eps)
  return (rotate(q, cos[..., None, None, :], sin[..., None, None, :]),
          rotate(key, cos[..., None, :], sin[..., None, :]), value)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns softmax(q k / sqrt(Dh)) v with the softmax in float32.

  Axes: B rows, T queries, S keys.

  Args:
    q: [B, T, K, H/K, Dh].
    k: [B, K, Dh, S]: the length last, so that scores are a plain matrix product (twice as fast on CPU).
    v: [B, K, S, Dh].
    mask: [B, T, S] bool, True where a query may look.
  Returns:
    [B, T, K, H/K, Dh] in q's dtype.
  """
  b, t, kh, g, dh = q.shape
  queries = q.transpose(0, 2, 1, 3, 4).reshape(b, kh, t * g, dh)
  scores = jnp.einsum('bkqd,bkds->bkqs', queries, k, preferred_element_type=jnp.float32) * dh**-0.5
  seen = jnp.repeat(mask, g, axis=1)[:, None] if g > 1 else mask[:, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v.dtype)
  out = jnp.einsum('bkqs,bksd->bkqd', weights, v)
  return out.reshape(b, kh, t, g, dh).transpose(0, 2, 1, 3, 4)


def add_attention(layer: dict[str, Any], x: jax.Array, attended: jax.Array) -> jax.Array:
  """Returns x + attended @ out, for attended [..., K, H/K, Dh]."""
  return x + project(attended.reshape(*x.shape[:-1], -1), layer['out'].reshape(-1, x.shape[-1]))


def add_mlp(layer: dict[str, Any], x: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns x + mlp(norm(x)), [..., D].

  Source: SwiGLU, Shazeer, arXiv 2002.05202; squared ReLU, So et al., arXiv 2109.08668.
  """
  h = rms_norm(x, layer['mlp_norm'], config.norm_eps)
  up = project(h, layer['up'].reshape(config.width, -1))
  act = {'silu': jax.nn.silu, 'gelu': jax.nn.gelu, 'relu2': lambda y: jnp.square(jax.nn.relu(y))}[
      config.activation]
  if config.gated_mlp:
    gate, up = halve(up)
    h = act(gate) * up
  else:
    h = act(up)
  return x + project(h, layer['down'])
