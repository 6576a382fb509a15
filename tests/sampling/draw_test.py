"""Tests of the draw against the distribution it claims, by counting and by identities."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.sampling.draw import BLOCK, SamplingParams, draw, truncate

ROWS = 20_000


@functools.cache
def jitted(params):
  return jax.jit(functools.partial(draw, params=params))


def many(logits, seed=0, params=SamplingParams()):
  """Draws ROWS times from one row of logits."""
  keys = jax.random.split(jax.random.key(seed), ROWS)
  return jax.device_get(jitted(params)(np.tile(np.float32(logits), (ROWS, 1)), keys))


def softmax(x):
  e = np.exp(np.float64(x) - np.max(x))
  return e / e.sum()


def check_counts(tokens, probs):
  """Chi-square of the counts, cells of at least 5 expected, below its mean + 5 deviations."""
  counts = np.bincount(tokens, minlength=len(probs))
  assert not counts[probs == 0].any()
  order = np.argsort(probs)
  # Rare tokens share a cell.
  rare = order[np.cumsum(probs[order]) * ROWS < 5]
  common = np.setdiff1d(np.flatnonzero(probs), rare)
  expected = probs[common] * ROWS
  chi2 = np.sum((counts[common] - expected)**2 / expected)
  assert chi2 < len(common) + 5 * np.sqrt(2 * len(common))


# Within one block, padded; exactly one; several and padded.
@pytest.mark.parametrize('size', [5, BLOCK, 3 * BLOCK + 10])
def test_draws_follow_the_softmax(size):
  logits = np.random.default_rng(size).normal(size=size) * 1.5
  drawn, probs = many(logits), softmax(logits)
  check_counts(drawn.tokens, probs)
  np.testing.assert_allclose(drawn.log_probs, np.log(probs)[drawn.tokens], atol=1e-5)
  np.testing.assert_allclose(drawn.entropies, -(probs * np.log(probs)).sum(), atol=1e-5)


def test_draws_within_a_block_are_independent_of_the_block():
  # Two blocks of equal weights: block and place within it make a table of independent counts.
  tokens = many(np.zeros(2 * BLOCK), seed=3).tokens
  table = np.bincount(tokens, minlength=2 * BLOCK).reshape(2, BLOCK)
  expected = ROWS / (2 * BLOCK)
  assert np.sum((table - expected)**2) / expected < 127 + 5 * np.sqrt(2 * 127)


def test_temperature_divides_the_logits():
  logits = np.random.default_rng(1).normal(size=20)
  drawn, probs = many(logits, params=SamplingParams(temperature=0.5)), softmax(logits / 0.5)
  check_counts(drawn.tokens, probs)
  np.testing.assert_allclose(drawn.log_probs, np.log(probs)[drawn.tokens], atol=1e-5)


TRUNCATED = [SamplingParams(top_k=4), SamplingParams(top_p=0.6),
             SamplingParams(temperature=2.0, top_k=50, top_p=0.8)]


@pytest.mark.parametrize('params', TRUNCATED, ids=str)
def test_truncated_draws_are_recorded_under_the_truncated_distribution(params):
  logits = np.random.default_rng(2).normal(size=100) * 2
  drawn = many(logits, params=params)
  probs = softmax(logits / params.temperature)
  order = np.argsort(-probs)
  keep = order[:params.top_k or 100]
  within = probs[keep] / probs[keep].sum()
  # The fewest whose probability reaches top_p: all before the one at which the sum reaches it.
  keep = keep[:np.searchsorted(np.cumsum(within), params.top_p) + 1]
  expected = np.zeros(100)
  expected[keep] = probs[keep] / probs[keep].sum()
  check_counts(drawn.tokens, expected)
  seen = {int(t): float(p) for t, p in zip(drawn.tokens, drawn.log_probs)}
  # Not those of the whole softmax, whose probabilities of these tokens sum to less.
  assert sum(np.exp(list(seen.values()))) == pytest.approx(expected[list(seen)].sum(), abs=1e-4)
  assert sum(np.exp(list(seen.values()))) > 0.99
  entropy = -(expected[keep] * np.log(expected[keep])).sum()
  np.testing.assert_allclose(drawn.entropies, entropy, atol=1e-4)


def allowed_of(size, ids):
  out = np.zeros((ROWS, size), bool)
  out[:, ids] = True
  return out


@pytest.mark.parametrize('params', [SamplingParams(), SamplingParams(temperature=2.0, top_k=6, top_p=0.8)], ids=str)
def test_draws_from_a_set_follow_the_softmax_over_the_set(params):
  logits = np.random.default_rng(7).normal(size=150) * 1.5
  ids = np.asarray([3, 64, 65, 66, 100, 127, 128, 149])
  keys = jax.random.split(jax.random.key(8), ROWS)
  rows = np.tile(np.float32(logits), (ROWS, 1))
  drawn = jax.device_get(jax.jit(functools.partial(draw, params=params))(rows, keys, allowed=allowed_of(150, ids)))
  alone = np.full(150, -np.inf)
  alone[ids] = logits[ids]
  # The set first, then truncation within it.
  same = jax.device_get(jitted(params)(np.tile(np.float32(alone), (ROWS, 1)), keys))
  np.testing.assert_array_equal(drawn.tokens, same.tokens)
  np.testing.assert_allclose(drawn.log_probs, same.log_probs, atol=1e-6)
  np.testing.assert_allclose(drawn.entropies, same.entropies, atol=1e-6)
  if params == SamplingParams():
    check_counts(drawn.tokens, softmax(alone))


def test_the_only_token_of_a_set_is_certain_at_any_temperature():
  logits = np.random.default_rng(9).normal(size=(3, 100)).astype(np.float32)
  allowed = np.arange(100)[None] == np.asarray([5, 64, 99])[:, None]
  for temperature in (0.0, 0.1, 1.0):
    params = SamplingParams(temperature=temperature)
    drawn = jax.jit(functools.partial(draw, params=params))(logits, jax.random.split(jax.random.key(0), 3), allowed=allowed)
    assert drawn.tokens.tolist() == [5, 64, 99]
    np.testing.assert_allclose([drawn.log_probs, drawn.entropies], 0.0, atol=1e-6)


def test_truncation_that_keeps_everything_changes_nothing():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)))
  np.testing.assert_array_equal(truncate(logits, 0, 1.0), logits)
  np.testing.assert_array_equal(truncate(logits, 10, 1.0), logits)


def test_the_most_likely_token_survives_any_truncation():
  logits = jnp.asarray([[0.0, 3.0, 1.0]])
  for out in (truncate(logits, 1, 1.0), truncate(logits, 0, 1e-6)):
    np.testing.assert_array_equal(out, [[-np.inf, 3.0, -np.inf]])


def test_temperature_zero_takes_the_most_likely_token():
  logits = np.random.default_rng(4).normal(size=100)
  drawn, probs = many(logits, params=SamplingParams(temperature=0.0)), softmax(logits)
  assert set(drawn.tokens) == {int(np.argmax(logits))}
  np.testing.assert_allclose(drawn.log_probs, np.log(probs.max()), atol=1e-5)


def test_tokens_of_probability_zero_are_never_drawn():
  logits = np.zeros(2 * BLOCK + 5)
  logits[::2] = -np.inf
  logits[BLOCK:2 * BLOCK] = -np.inf
  logits[3] = -200.0  # exp underflows.
  tokens = many(logits).tokens
  assert not np.isin(tokens, np.flatnonzero(logits < 0)).any() and tokens.max() < len(logits)


def test_a_race_time_of_zero_does_not_let_a_weightless_token_win():
  # This key's uniform draw at place 7 of the block is exactly 0, which comes once in 2^23: the race
  # would be 0 / 0 there. The first number is the block's.
  key = jax.random.split(jax.random.key(5), 1 << 14)[863]
  assert float(jax.random.exponential(key, (1 + BLOCK,))[8]) == 0.0
  logits = jnp.zeros((1, BLOCK)).at[0, 7].set(-jnp.inf)
  drawn = jitted(SamplingParams())(logits, key[None])
  assert int(drawn.tokens[0]) != 7
  assert float(drawn.log_probs[0]) == pytest.approx(-np.log(BLOCK - 1), abs=1e-5)


def test_a_draw_depends_on_its_own_row_and_key_alone():
  logits = np.random.default_rng(5).normal(size=(6, 70)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 6)
  together = jitted(SamplingParams())(logits, keys)
  order = np.asarray([3, 1, 5, 0, 2, 4])
  shuffled = jitted(SamplingParams())(logits[order], keys[order])
  np.testing.assert_array_equal(together.tokens[order], shuffled.tokens)
  same = many(logits[0], seed=7).tokens
  np.testing.assert_array_equal(same, many(logits[0], seed=7).tokens)
  assert (same != many(logits[0], seed=8).tokens).mean() > 0.5


@pytest.mark.parametrize('settings', [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0),
                                      dict(top_p=1.5)])
def test_settings_that_are_no_distribution_are_refused(settings):
  with pytest.raises(ValueError, match='no distribution'):
    SamplingParams(**settings)
