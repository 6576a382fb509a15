"""Masked reductions against numpy on the selected entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.core import masked


def _random(seed=0, shape=(5, 7)):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32), rng.random(shape) < 0.5


def test_reductions_equal_numpy_on_the_selected_entries():
  x, mask = _random()
  np.testing.assert_allclose(masked.masked_sum(x, mask), x[mask].sum(), rtol=1e-5)
  np.testing.assert_allclose(masked.masked_mean(x, mask), x[mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(masked.masked_variance(x, mask), x[mask].var(), rtol=1e-5)
  np.testing.assert_allclose(masked.masked_variance(x, mask, 1), x[mask].var(ddof=1), rtol=1e-5)
  smallest, largest = masked.masked_extremes(x, mask)
  assert (smallest, largest) == (x[mask].min(), x[mask].max())


def test_reductions_along_an_axis_equal_numpy_row_by_row():
  x, mask = _random(1)
  expected = [row[keep].mean() for row, keep in zip(x, mask)]
  np.testing.assert_allclose(masked.masked_mean(x, mask, axis=1), expected, rtol=1e-5)


def test_the_numerator_is_masked_too():
  # A known defect of a rival: the mean of 1 and 1 came out as 26.
  x = jnp.array([[1., 100.], [1., -50.]])
  assert masked.masked_mean(x, jnp.array([[True, False], [True, False]])) == 1.0


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_masked_out_reaches_neither_value_nor_gradient(bad):
  x = jnp.array([1., bad, 3.])
  mask = jnp.array([True, False, True])
  value, gradient = jax.value_and_grad(masked.masked_mean)(x, mask)
  # The mean of 1 and 3, each with weight one half.
  assert value == 2.0
  np.testing.assert_array_equal(gradient, [0.5, 0.0, 0.5])


def test_an_empty_mask_gives_zero_with_a_zero_gradient():
  x, mask = jnp.ones(3), jnp.zeros(3, bool)
  for reduction in (masked.masked_sum, masked.masked_mean, masked.masked_variance):
    value, gradient = jax.value_and_grad(reduction)(x, mask)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_safe_divide_has_a_finite_gradient_where_the_denominator_is_zero():
  gradients = jax.grad(masked.safe_divide, argnums=(0, 1))(jnp.float32(3.), jnp.float32(0.))
  assert np.all(np.isfinite(gradients))


def test_row_segment_sum_equals_a_double_loop():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(3, 6)).astype(np.float32)
  ids = rng.integers(0, 4, size=(3, 6)).astype(np.int32)
  expected = [[sum(x[b, s] for s in range(6) if ids[b, s] == ids[b, t]) for t in range(6)]
              for b in range(3)]
  np.testing.assert_allclose(masked.row_segment_sum(x, ids), expected, rtol=1e-5, atol=1e-6)


def test_a_mask_of_numbers_is_refused():
  with pytest.raises(AssertionError):
    masked.masked_mean(jnp.ones(3), jnp.ones(3))
