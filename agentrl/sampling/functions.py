"""The sampler on the device: pure functions of (parameters, cache, arrays), to be jitted with the cache donated.

    extend   write known tokens of some contexts into the cache: prompts, observations
    decode   draw up to n tokens in every active slot, in one loop on the device

The cache holds all tokens of a slot's context but the last, the pending one, whose turn through the network comes with
the next draw. The host knows every token, so it passes lengths, pending tokens and the blocks of each context with each
call, and the cache is all the state there is: a rollback is a smaller number on the host.

Axes: S slots, A rows of an extension, T its tokens, W tokens of a step, N blocks, P tokens of a block, K key/value
heads, Dh head width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agentrl.models import layers, transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import Params, param_axes
from agentrl.sampling import cache as caches
from agentrl.sampling.cache import Cache, Fresh, Reading
from agentrl.sampling.constrain import MaskTable
from agentrl.sampling.draw import Drawn, SamplingParams, draw
from agentrl.sampling.kernels import Kernels


# Logical axes of the residual stream but the last: of a step, and of an extension, whose few rows every device has.
STEP, EXTENSION = ('slots', None), (None, None)


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


def extend(params: Params, cache: Cache, tokens: jax.Array, starts: jax.Array, counts: jax.Array, tables: jax.Array,
           *, config: ModelConfig, kernels: Kernels | None = None) -> Cache:
  """Returns the cache with tokens[r, :counts[r]] at the positions from starts[r] on of the context tables[r].

  A prefill is an extension from 0.

  Args:
    params: Sampler's view.
    cache: Donate it.
    tokens: [A, T] int32.
    starts: [A] int32. Tokens that the context already holds.
    counts: [A] int32, at most T; 0 for a row to be skipped.
    tables: [A, B] int32. Blocks of each context, in order; those written belong to no other.
    config: Static.
    kernels: Static. Attend, see `kernels.choose`; None for plain products.
  """
  offsets = jnp.arange(tokens.shape[1])[None]
  positions = starts[:, None] + offsets
  lengths = starts + counts
  longest = jnp.max(lengths)
  turns = layers.sights(config, positions, positions[..., None], positions[..., None] >= 0)

  x = transformer.embed(params, config, tokens, EXTENSION)
  keys, values = [], []
  for i, (layer, kind) in enumerate(zip(params['layers'], config.kind_of_layer)):
    q, k, v = layers.project_qkv(layer, x, turns[kind].cos, turns[kind].sin, config, EXTENSION)
    keys.append(caches.write_rows(cache.keys[i], k, tables, starts, counts, axis=3))
    values.append(caches.write_rows(cache.values[i], v, tables, starts, counts, axis=2))
    window = config.kinds[kind]
    read = kernels and kernels.rows(keys[-1], values[-1], tables, positions, lengths, window)
    attended = caches.attend_rows(q, keys[-1], values[-1], tables, positions, longest, window=window,
                                  scale=config.query_scale, sinks=layer.get('sinks'), read=read)
    x = layers.add_attention(layer, x, attended, config, EXTENSION)
    x = layers.add_mlp(layer, x, config, EXTENSION)
  return Cache(tuple(keys), tuple(values))


def next_logits(params: Params, cache: Cache, fresh: Fresh, reading: Reading, tokens: jax.Array, lengths: jax.Array,
                first: jax.Array, config: ModelConfig, kernels: Kernels | None = None,
                plans: Any = None, active: jax.Array | None = None) -> tuple[Fresh, jax.Array]:
  """Returns (what is new with the keys and values of `tokens`, [S, W, V] float32 logits of what follows each of them).

  Args:
    params: Sampler's view.
    cache: Only read.
    fresh: Updated in place under jit.
    reading: Which blocks are whose.
    tokens: [S, W] int32. Last token of each slot's context, and guesses at those after it.
    lengths: [S] int32. Tokens before them; lengths - first may differ between slots that are read only if W > 1.
    first: [S] int32. Of these, those in blocks; the others are in `fresh`, which may have the blocks' tokens as well.
    config: Static.
    kernels: Static. Attend, see `kernels.choose`; None for plain products, by block.
    plans: What `kernels.plan` gives.
    active: [S] bool. Slots whose tokens are kept where they are read by table; None for all.
  """
  width = tokens.shape[1]
  positions = lengths[:, None] + jnp.arange(width)[None]
  turns = layers.sights(config, positions, positions[..., None], positions[..., None] >= 0)
  x = transformer.embed(params, config, tokens, STEP)
  keys, values = [], []
  for i, (layer, kind) in enumerate(zip(params['layers'], config.kind_of_layer)):
    q, k, v = layers.project_qkv(layer, x, turns[kind].cos, turns[kind].sin, config, STEP)
    keys.append(caches.append(fresh.keys[i], k, positions, first, reading, active, axis=3))
    values.append(caches.append(fresh.values[i], v, positions, first, reading, active, axis=2))
    window = config.kinds[kind]
    held = (cache.keys[i], cache.values[i]) if reading.tables is None else (keys[-1], values[-1])
    own = kernels and kernels.slots(*held, plans, positions, first, window)
    attended = caches.attend(q, cache.keys[i], cache.values[i], keys[-1], values[-1], reading, positions, first,
                             window=window, scale=config.query_scale, sinks=layer.get('sinks'), own=own)
    x = layers.add_attention(layer, x, attended, config, STEP)
    x = layers.add_mlp(layer, x, config, STEP)
  hidden = layers.norm(x, params['final_norm'], config)
  return Fresh(tuple(keys), tuple(values)), transformer.logits(params, hidden, known=config.known_tokens)


def decode(params: Params, cache: Cache, reading: Reading, pending: jax.Array, lengths: jax.Array, budgets: jax.Array,
           seeds: jax.Array, stops: jax.Array, floor: jax.Array, *, steps: int, config: ModelConfig,
           sampling: SamplingParams = SamplingParams(), masks: MaskTable | None = None,
           kernels: Kernels | None = None) -> tuple[Cache, Decoded]:
  """Draws up to `steps` tokens in every active slot.

  Ends early once no more than `floor` slots are active. The draw at position p of a slot depends on its context, its
  seed and p alone: not on the other slots, nor on how a turn is cut into calls.

  Args:
    params: Sampler's view.
    cache: Donate it.
    reading: Which blocks are whose.
    pending: [S] int32. Last token of each slot's context, not yet in the cache.
    lengths: [S] int32. Tokens before it.
    budgets: [S] int32. Tokens the slot may draw; 0 for an idle slot.
    seeds: [S, 2] uint32. Key of the trajectory.
    stops: [S, Z] int32. Tokens that end a slot's turn; -1 for none.
    floor: int32 scalar.
    steps: Static.
    config: Static.
    sampling: Static.
    masks: Static. Asked at each step which tokens may be drawn; None for all.
    kernels: Static. Attend, see `kernels.choose`; None for plain products, by block.
  Returns:
    The cache, now holding all but the last drawn token of each slot, and what was drawn.
  """
  slots = pending.shape[0]
  keys = jax.random.wrap_key_data(seeds, impl='threefry2x32')

  def running(carry):
    step, _, _, _, _, _, active = carry
    return (step < steps) & (jnp.sum(active) > floor)

  def body(carry):
    step, fresh, pending, lengths, out, stopped, active = carry
    fresh, scores = next_logits(params, cache, fresh, reading, pending[:, None], lengths, first, config, kernels, plans,
                                active)
    allowed = masks.allowed(lengths - first, out.tokens)[:, 0] if masks else None
    drawn = draw(scores[:, 0], jax.vmap(jax.random.fold_in)(keys, lengths), sampling, allowed)
    # Column `step` of an idle slot is never read: its count says so.
    out = jax.tree.map(lambda o, d: jax.lax.dynamic_update_slice(o, d[:, None], (0, step)), out, drawn)
    hit = active & jnp.any(drawn.tokens[:, None] == stops, axis=-1)
    pending = jnp.where(active, drawn.tokens, pending)
    lengths = lengths + active
    stopped |= hit
    active &= ~hit & (lengths - first < budgets)
    return step + 1, fresh, pending, lengths, out, stopped, active

  first = lengths
  plans = kernels and kernels.plan(reading, first, config.kinds, config.num_heads // config.num_kv_heads, cache)
  out = Drawn(jnp.zeros((slots, steps), jnp.int32), jnp.zeros((slots, steps)), jnp.zeros((slots, steps)))
  fresh = caches.init_fresh(cache, reading, steps)
  carry = (jnp.int32(0), fresh, pending, lengths, out, jnp.zeros(slots, bool), budgets > 0)
  step, fresh, _, lengths, out, stopped, _ = jax.lax.while_loop(running, body, carry)
  return caches.store(cache, fresh, reading, first, lengths - first), Decoded(*out, lengths - first, stopped, step)
