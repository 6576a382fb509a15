"""The sampler on the device: pure functions of (parameters, cache, arrays), to be jitted with the cache donated.

    extend   write known tokens of some slots into the cache: prompts, observations
    decode   draw up to n tokens in every active slot, in one loop on the device
    fork     copy slots
    resize   a longer or shorter cache

The cache holds all tokens of a slot's context but the last, the pending one, whose turn through the network comes with
the next draw. The host knows every token, so it passes lengths and pending tokens with each call, and the cache is all
the state there is: a rollback is a smaller number on the host.

Axes: S slots, R rows of a call, T tokens, C capacity of the cache, K key/value heads, Dh head width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agentrl.models import layers, transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import Params, param_axes
from agentrl.sampling.constrain import MaskTable
from agentrl.sampling.draw import Drawn, SamplingParams, draw


class Cache(NamedTuple):
  """Keys and values of every slot, one buffer a layer, never stacked, so that each is written in place.

  Attributes:
    keys: L of [S, K, Dh, C]: with the length last the scores of a step are a plain matrix product, which makes
      attention over the cache 1.8 times faster on CPU than [S, K, C, Dh] does.
    values: L of [S, K, C, Dh].
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]

  @property
  def capacity(self) -> int:
    """Tokens a slot has room for."""
    return self.values[0].shape[2]

  @property
  def slots(self) -> int:
    """S."""
    return self.keys[0].shape[0]


class Decoded(NamedTuple):
  """What a call of `decode` drew.

  Attributes:
    tokens: [S, n] int32; meaningful up to each slot's count.
    log_probs: [S, n] float32, nats.
    entropies: [S, n] float32, nats.
    counts: [S] int32. Tokens drawn in each slot.
    stopped: [S] bool. Whether the last one is a stop token.
    steps: int32 scalar. Passes through the network.
  """

  tokens: jax.Array
  log_probs: jax.Array
  entropies: jax.Array
  counts: jax.Array
  stopped: jax.Array
  steps: jax.Array


def sampler_view(params: Params, config: ModelConfig) -> Params:
  """Returns the parameters as the sampler wants them: a tuple of layers, in the compute dtype, no value head.

  Slicing stacked weights inside the decode loop would copy them at every step.
  """
  dtype = jnp.dtype(config.compute_dtype)
  view = {k: v.astype(dtype) for k, v in params.items() if k not in ('layers', 'value')}
  view['layers'] = tuple(
      jax.tree.map(lambda x, i=i: x[i].astype(dtype), params['layers']) for i in range(config.num_layers))
  return view


def view_axes(config: ModelConfig) -> Params:
  """Returns the logical axes of what `sampler_view` returns."""
  axes = {k: v for k, v in param_axes(config).items() if k not in ('layers', 'value')}
  layer = jax.tree.map(lambda a: a[1:], param_axes(config)['layers'], is_leaf=lambda x: isinstance(x, tuple))
  return {**axes, 'layers': (layer,) * config.num_layers}


def init_cache(config: ModelConfig, slots: int, capacity: int) -> Cache:
  """Returns an empty cache of `slots` x `capacity` tokens in the compute dtype."""
  def zeros(*shape):
    shape = (slots, config.num_kv_heads, *shape)
    return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))

  return Cache(zeros(config.head_dim, capacity), zeros(capacity, config.head_dim))


def resize(cache: Cache, capacity: int) -> Cache:
  """Returns the cache with room for `capacity` tokens a slot; tokens past it are lost."""
  def one(x, axis):
    kept = jax.lax.slice_in_dim(x, 0, min(capacity, x.shape[axis]), axis=axis)
    room = [(0, capacity - kept.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(kept, room)

  return Cache(tuple(one(x, 3) for x in cache.keys), tuple(one(x, 2) for x in cache.values))


def fork(cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
  """Returns the cache with slot targets[r] a copy of slot sources[r].

  Args:
    cache: Donate it.
    sources: [R] int32.
    targets: [R] int32, distinct; one that is S or more is skipped.
  """
  return jax.tree.map(lambda x: x.at[targets].set(x[sources], mode='drop'), cache)


def extend(params: Params, cache: Cache, slots: jax.Array, tokens: jax.Array, starts: jax.Array, counts: jax.Array,
           *, config: ModelConfig) -> Cache:
  """Returns the cache with tokens[r, :counts[r]] written into slot slots[r] from position starts[r] on.

  A prefill is an extension from 0.

  Args:
    params: Sampler's view.
    cache: Donate it.
    slots: [R] int32, distinct; a row whose slot is S or more is skipped.
    tokens: [R, T] int32.
    starts: [R] int32. Tokens that the slot already holds.
    counts: [R] int32, at most T and at most C - start.
    config: Static.
  """
  offsets = jnp.arange(tokens.shape[1])[None]
  positions = starts[:, None] + offsets
  distances = positions[:, :, None] - jnp.arange(cache.capacity)[None, None]
  kinds = layers.sights(config, positions, distances, distances >= 0)
  # Only what is new is written; what is padding goes to a position past the cache, and with it nowhere.
  targets = jnp.where(offsets < counts[:, None], positions, cache.capacity)
  rows_of = slots[:, None]
  held = jnp.minimum(slots, cache.slots - 1)

  x = transformer.embed(params, config, tokens)
  keys, values = [], []
  for layer, kind, key_buffer, value_buffer in zip(params['layers'], config.kind_of_layer, cache.keys, cache.values):
    see = kinds[kind]
    q, k, v = layers.project_qkv(layer, x, see.cos, see.sin, config)
    keys.append(key_buffer.at[rows_of, :, :, targets].set(k.astype(key_buffer.dtype), mode='drop'))
    values.append(value_buffer.at[rows_of, :, targets].set(v.astype(value_buffer.dtype), mode='drop'))
    attended = layers.attend(q, keys[-1][held], values[-1][held], see.mask, scale=config.query_scale,
                             sinks=layer.get('sinks'))
    x = layers.add_mlp(layer, layers.add_attention(layer, x, attended, config), config)
  return Cache(tuple(keys), tuple(values))


def next_logits(params: Params, cache: Cache, pending: jax.Array, lengths: jax.Array, config: ModelConfig):
  """Returns (cache with the pending tokens written, [S, V] float32 logits of what follows them).

  Args:
    params: Sampler's view.
    cache: Updated in place under jit.
    pending: [S] int32. Last token of each slot's context.
    lengths: [S] int32, below C. Tokens before it, all in the cache.
    config: Static.
  """
  x = transformer.embed(params, config, pending)
  distances = lengths[:, None] - jnp.arange(cache.capacity)[None]
  kinds = layers.sights(config, lengths, distances, distances >= 0)
  put_key = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new[:, :, None], at, axis=2))
  put_value = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new[:, None], at, axis=1))
  keys, values = [], []
  for layer, kind, key_buffer, value_buffer in zip(params['layers'], config.kind_of_layer, cache.keys, cache.values):
    see = kinds[kind]
    q, k, v = layers.project_qkv(layer, x, see.cos, see.sin, config)
    keys.append(put_key(key_buffer, k.astype(key_buffer.dtype), lengths))
    values.append(put_value(value_buffer, v.astype(value_buffer.dtype), lengths))
    attended = attend_one(q, keys[-1], values[-1], see.mask, scale=config.query_scale, sinks=layer.get('sinks'))
    x = layers.add_mlp(layer, layers.add_attention(layer, x, attended, config), config)
  hidden = layers.norm(x, params['final_norm'], config)
  return Cache(tuple(keys), tuple(values)), transformer.logits(params, hidden, known=config.known_tokens)


def attend_one(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, scale: float = 0.0,
               sinks: jax.Array | None = None) -> jax.Array:
  """Returns the attention of one query a slot over its cache.

  Args:
    q: [S, K, H/K, Dh].
    keys: [S, K, Dh, C].
    values: [S, K, C, Dh].
    mask: [S, C] bool.
    scale: 0 for Dh^-1/2.
    sinks: [K, H/K], see `layers.attention_weights`.
  Returns:
    [S, K, H/K, Dh].
  """
  scores = jnp.einsum('skgd,skdc->skgc', q, keys, preferred_element_type=jnp.float32) * (scale or q.shape[-1]**-0.5)
  weights = layers.attention_weights(scores, mask[:, None, None], None if sinks is None else sinks[None])
  return jnp.einsum('skgc,skcd->skgd', weights.astype(values.dtype), values)


def decode(params: Params, cache: Cache, pending: jax.Array, lengths: jax.Array, budgets: jax.Array, seeds: jax.Array,
           stops: jax.Array, floor: jax.Array, *, steps: int, config: ModelConfig,
           sampling: SamplingParams = SamplingParams(), masks: MaskTable | None = None) -> tuple[Cache, Decoded]:
  """Draws up to `steps` tokens in every active slot.

  Ends early once no more than `floor` slots are active. The draw at position p of a slot depends on its context, its
  seed and p alone: not on the other slots, nor on how a turn is cut into calls.

  Args:
    params: Sampler's view.
    cache: Donate it.
    pending: [S] int32. Last token of each slot's context, not yet in the cache.
    lengths: [S] int32, below C. Tokens before it. An idle slot's too, whose place after them is overwritten.
    budgets: [S] int32. Tokens the slot may draw; 0 for an idle slot. length + budget must not exceed C.
    seeds: [S, 2] uint32. Key of the trajectory.
    stops: [S, Z] int32. Tokens that end a slot's turn; -1 for none.
    floor: int32 scalar.
    steps: Static.
    config: Static.
    sampling: Static.
    masks: Static. Asked at each step which tokens may be drawn; None for all.
  Returns:
    The cache, now holding all but the last drawn token of each slot, and what was drawn.
  """
  slots = pending.shape[0]
  keys = jax.random.wrap_key_data(seeds, impl='threefry2x32')

  def running(carry):
    step, _, _, _, _, _, active = carry
    return (step < steps) & (jnp.sum(active) > floor)

  def body(carry):
    step, cache, pending, lengths, out, stopped, active = carry
    cache, scores = next_logits(params, cache, pending, lengths, config)
    allowed = masks.allowed(lengths - first, out.tokens)[:, 0] if masks else None
    drawn = draw(scores, jax.vmap(jax.random.fold_in)(keys, lengths), sampling, allowed)
    # Column `step` of an idle slot is never read: its count says so.
    out = jax.tree.map(lambda o, d: jax.lax.dynamic_update_slice(o, d[:, None], (0, step)), out, drawn)
    hit = active & jnp.any(drawn.tokens[:, None] == stops, axis=-1)
    pending = jnp.where(active, drawn.tokens, pending)
    lengths = lengths + active
    stopped |= hit
    active &= ~hit & (lengths - first < budgets)
    return step + 1, cache, pending, lengths, out, stopped, active

  first = lengths
  out = Drawn(jnp.zeros((slots, steps), jnp.int32), jnp.zeros((slots, steps)), jnp.zeros((slots, steps)))
  carry = (jnp.int32(0), cache, pending, lengths, out, jnp.zeros(slots, bool), budgets > 0)
  step, cache, _, lengths, out, stopped, _ = jax.lax.while_loop(running, body, carry)
  return cache, Decoded(*out, lengths - first, stopped, step)
