"""Logits to tokens, with the log-probability and entropy of the distribution drawn from."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from agentrl.models.layers import MASKED

# A draw chooses a block of this many tokens, then a token in it: V / 64 + 64 random numbers, not V.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The distribution to draw from, made of the policy's softmax.

  Attributes:
    temperature: Divides the logits; 0 takes the most likely token, whose log-prob is then that at temperature 1.
    top_k: Keep the k most likely tokens; 0 keeps all.
    top_p: Keep the fewest tokens whose probability reaches this; 1 keeps all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f'{self} is no distribution: temperature and top_k must not be negative and '
                       'top_p must be in (0, 1]')


class Drawn(NamedTuple):
  """Tokens [S] int32 with their log-probs and the entropies, [S] float32 nats, of what they were drawn from."""

  tokens: jax.Array
  log_probs: jax.Array
  entropies: jax.Array


def draw(logits: jax.Array, keys: jax.Array, params: SamplingParams = SamplingParams(),
         allowed: jax.Array | None = None) -> Drawn:
  """Returns one token a row, a plain function of (logits, key).

  An exponential race, argmax_i w_i / e_i with e_i ~ Exp(1), first between blocks of the vocabulary and then within the
  winner. It is exact, and rounding of the logits changes a draw only if two runners are that close; inverting the
  cumulative distribution would change it at any of V edges, so that trajectories would depend on the batch they ran in.

  Axes: S rows, V vocabulary.

  Args:
    logits: [S, V] float32, not yet divided by the temperature.
    keys: [S] typed PRNG keys, one a row.
    params: Static; which distribution to draw from.
    allowed: [S, V] bool. Tokens that may be drawn, at least one a row; None for all.
  Returns:
    The draw. Log-probs and entropies are those of the distribution drawn from: of what is allowed, truncated.
  """
  if allowed is not None:
    logits = jnp.where(allowed, logits, MASKED)
  if params.temperature == 0:
    return _greedy(logits)
  logits = truncate(logits / params.temperature, params.top_k, params.top_p)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  tokens, total = _race(weights, keys)
  log_z = top[:, 0] + jnp.log(total)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  mean = jnp.sum(jnp.where(weights > 0, weights * logits, 0.0), axis=-1) / total
  return Drawn(tokens, chosen - log_z, log_z - mean)


def truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Returns logits [S, V] with -inf where top-k or top-p leaves a token out.

  Source: top-p, Holtzman et al., arXiv 1904.09751; the token that crosses top_p is kept.
  """
  if top_k and top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def _greedy(logits):
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
  return Drawn(tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0], entropies)


def _race(weights, keys):
  """Returns the drawn index [S] int32 and the total weight [S]."""
  s, v = weights.shape
  blocks = jnp.pad(weights, ((0, 0), (0, -v % BLOCK))).reshape(s, -1, BLOCK)
  sums = jnp.sum(blocks, axis=-1)
  count = sums.shape[1]
  times = jax.vmap(lambda key: jax.random.exponential(key, (count + BLOCK,)))(keys)
  # One time in 2^23 is 0, and 0 / 0 would let a token without weight win.
  times = jnp.maximum(times, jnp.finfo(jnp.float32).tiny)
  block = jnp.argmax(sums / times[:, :count], axis=-1)
  inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  index = jnp.argmax(inner / times[:, count:], axis=-1)
  return (block * BLOCK + index).astype(jnp.int32), jnp.sum(sums, axis=-1)
