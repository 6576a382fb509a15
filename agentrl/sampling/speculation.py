"""Decoding several tokens a step: what the slot's own text suggests is proposed, and kept where it is drawn anyway.

Agents copy what tools return, so the tokens that followed an earlier occurrence of the last few are a good guess at the
next ones. All guesses go through the network in one step. Each position is then drawn with its own key, as it would
have been without guesses, and the draws are kept up to the first that is not the guess: what comes out is the same
tokens, in fewer steps.

Axes: S slots, P proposed tokens, W = P + 1 tokens of a step, C columns of the history, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import jax
import jax.numpy as jnp

from agentrl.models.config import ModelConfig
from agentrl.models.params import Params
from agentrl.sampling import cache as caches
from agentrl.sampling.cache import Cache, Reading
from agentrl.sampling.constrain import MaskTable
from agentrl.sampling.draw import Drawn, SamplingParams, draw
from agentrl.sampling.functions import Decoded, next_logits
from agentrl.sampling.kernels import Kernels

NOTHING = -1  # a proposal that no draw equals


@dataclasses.dataclass(frozen=True)
class Speculation:
  """How much is proposed, and on what evidence.

  Attributes:
    tokens: P, tokens proposed a step.
    ngram: Tokens that must have occurred before in the same order. Of several places the one is taken whose past
      agrees longest, up to twice as many tokens; of equal ones the latest.
  """

  tokens: int
  ngram: int = 3

  def __post_init__(self):
    if self.tokens < 1 or self.ngram < 1:
      raise ValueError(f'{self} proposes nothing: tokens and ngram must be at least 1')


def propose(history: jax.Array, lengths: jax.Array, speculation: Speculation) -> jax.Array:
  """Returns [S, P] int32: the tokens that followed the best match of each slot's last ones, `NOTHING` without one.

  A match that reaches into the last tokens themselves is gone round again: what repeats is proposed to go on.

  Args:
    history: [S, C] int32. Tokens of each slot's context.
    lengths: [S] int32. Index of its last one; what stands beyond is not read.
    speculation: Static.
  """
  slots, capacity = history.shape
  index = jnp.arange(capacity)[None]
  run, score = jnp.ones((slots, capacity), bool), jnp.zeros((slots, capacity), jnp.int32)
  for back in range(2 * speculation.ngram):
    last = jnp.take_along_axis(history, jnp.maximum(lengths - back, 0)[:, None], axis=1)
    earlier = jnp.pad(history, ((0, 0), (back, 0)))[:, :capacity]
    run &= (earlier == last) & (index >= back)
    score += run
  score = jnp.where((index < lengths[:, None]) & (score >= speculation.ngram), score, 0)
  best = capacity - 1 - jnp.argmax(score[:, ::-1], axis=1)  # argmax takes the first of equals, this the last
  period = jnp.maximum(lengths - best, 1)[:, None]
  ahead = best[:, None] + 1 + jnp.arange(speculation.tokens)[None] % period
  found = jnp.max(score, axis=1, keepdims=True) > 0
  return jnp.where(found, jnp.take_along_axis(history, jnp.minimum(ahead, capacity - 1), axis=1), NOTHING)


def decode(params: Params, cache: Cache, reading: Reading, pending: jax.Array, lengths: jax.Array, budgets: jax.Array,
           seeds: jax.Array, stops: jax.Array, floor: jax.Array, history: jax.Array, *, steps: int, config: ModelConfig,
           speculation: Speculation, sampling: SamplingParams = SamplingParams(), masks: MaskTable | None = None,
           kernels: Kernels | None = None) -> tuple[Cache, Decoded]:
  """Draws what `functions.decode` would, up to `steps` x W tokens in every active slot: several a step where guesses are right.

  Args:
    params: As there, and so are all that are not named here.
    cache: Donate it.
    reading: As there.
    pending: [S] int32.
    lengths: [S] int32.
    budgets: [S] int32.
    seeds: [S, 2] uint32.
    stops: [S, Z] int32.
    floor: int32 scalar.
    history: [S, C] int32. The tokens before the pending ones; what stands beyond is not read.
    steps: Static. Passes through the network.
    config: Static.
    speculation: Static.
    sampling: Static.
    masks: Static.
    kernels: Static.
  Returns:
    The cache and what was drawn; its arrays are [S, steps x W].
  """
  slots, width = pending.shape[0], speculation.tokens + 1
  keys = jax.random.wrap_key_data(seeds, impl='threefry2x32')
  fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
  ahead, rows = jnp.arange(width)[None], jnp.arange(slots)[:, None]
  rows_of = lambda x: None if x is None else x.reshape(slots * width, -1)
  first = lengths
  plans = kernels and kernels.plan(reading, first, config.kinds, width * config.num_heads // config.num_kv_heads, cache)

  def running(carry):
    step, _, _, _, _, _, active = carry
    return (step < steps) & (jnp.sum(active) > floor)

  def body(carry):
    step, fresh, history, lengths, out, stopped, active = carry
    proposals = propose(history, lengths, speculation)
    last = jnp.take_along_axis(history, lengths[:, None], axis=1)
    tokens = jnp.concatenate([last, jnp.maximum(proposals, 0)], axis=1)
    fresh, scores = next_logits(params, cache, fresh, reading, tokens, lengths, first, config, kernels, plans, active)
    allowed = masks.allowed(lengths - first, out.tokens, proposals) if masks else None
    drawn = draw(rows_of(scores), fold(keys, lengths[:, None] + ahead).reshape(-1), sampling, rows_of(allowed))
    drawn = jax.tree.map(lambda x: x.reshape(slots, width), drawn)
    hits = jnp.any(drawn.tokens[:, :, None] == stops[:, None], axis=-1)
    counts = jnp.where(active, _kept(drawn.tokens, proposals, hits, first + budgets - lengths), 0)
    # What is not kept goes to a column past the end, and with it nowhere.
    kept = ahead < counts[:, None]
    columns = jnp.where(kept, (lengths - first)[:, None] + ahead, steps * width)
    out = jax.tree.map(lambda o, d: o.at[rows, columns].set(d, mode='drop'), out, drawn)
    places = jnp.where(kept, lengths[:, None] + 1 + ahead, history.shape[1])
    history = history.at[rows, places].set(drawn.tokens, mode='drop')
    lengths = lengths + counts
    stopped |= jnp.any(hits & kept, axis=1)
    active &= ~stopped & (lengths - first < budgets)
    return step + 1, fresh, history, lengths, out, stopped, active

  nothing = jnp.zeros((slots, steps * width))
  out = Drawn(nothing.astype(jnp.int32), nothing, nothing)
  history = history.at[jnp.arange(slots), lengths].set(pending)
  fresh = caches.init_fresh(cache, reading, steps * width)
  carry = (jnp.int32(0), fresh, history, lengths, out, jnp.zeros(slots, bool), budgets > 0)
  step, fresh, _, lengths, out, stopped, _ = jax.lax.while_loop(running, body, carry)
  return caches.store(cache, fresh, reading, first, lengths - first), Decoded(*out, lengths - first, stopped, step)


def _kept(tokens: jax.Array, proposals: jax.Array, hits: jax.Array, left: jax.Array) -> jax.Array:
  """Returns [S] int32: draws [S, W] up to the first that is no proposal or a stop, that one included, `left` at most."""
  goes_on = (tokens[:, :-1] == proposals) & ~hits[:, :-1]
  return jnp.minimum(1 + jnp.sum(jnp.cumprod(goes_on.astype(jnp.int32), axis=1), axis=1), left)
