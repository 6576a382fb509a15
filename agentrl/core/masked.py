"""Reductions over the entries that a mask keeps; what it leaves out cannot leak, not even as NaN.

The only module of core that imports jax. Masks are boolean and select by `where`, never by a
product, so that a NaN or an infinity outside the mask changes neither a value nor a gradient.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def safe_divide(numerator: chex.Array, denominator: chex.Array) -> chex.Array:
  """Returns numerator / denominator, and 0 where the denominator is 0.

  The gradient is finite there too, which `where(d == 0, 0, n / d)` alone would not give.

  Example:
    >>> float(safe_divide(jnp.float32(3.), jnp.float32(0.)))
    0.0
  """
  empty = denominator == 0
  return jnp.where(empty, 0.0, numerator / jnp.where(empty, 1.0, denominator))


def masked_sum(x: chex.Array, mask: chex.Array, axis: int | tuple[int,
               ...] | None = None) -> chex.Array:
  """Returns the sum of `x` over the entries that `mask` keeps.

  Args:
    x: [...] float.
    mask: Same shape as `x`, bool.
    axis: Axes summed over; None for all.
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type(mask, bool)
  return jnp.sum(jnp.where(mask, x, 0.0), axis=axis)


def masked_mean(x: chex.Array, mask: chex.Array, axis: int | tuple[int,
                ...] | None = None) -> chex.Array:
  """Returns the mean of `x` over the entries that `mask` keeps, 0 if it keeps none.

  For reporting and for statistics of a whole batch. Never average it over micro-batches: carry
  `masked_sum` and the count.

  Example:
    >>> mask = jnp.array([[True, False], [True, False]])
    >>> float(masked_mean(jnp.array([[1., 100.], [1., -50.]]), mask))
    1.0
  """
  return safe_divide(masked_sum(x, mask, axis), jnp.sum(mask, axis=axis, dtype=x.dtype))


def masked_extremes(x: chex.Array, mask: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Returns the smallest and the largest entry that `mask` keeps; (inf, -inf) if it keeps none."""
  chex.assert_equal_shape([x, mask])
  chex.assert_type(mask, bool)
  return jnp.min(jnp.where(mask, x, jnp.inf)), jnp.max(jnp.where(mask, x, -jnp.inf))


def masked_variance(x: chex.Array, mask: chex.Array, ddof: int = 0) -> chex.Array:
  """Returns the variance of `x` over the entries that `mask` keeps, 0 if they are not more than
  `ddof`.

  Args:
    x: [...] float.
    mask: Same shape as `x`, bool.
    ddof: 0 for the population's variance, 1 for the unbiased estimate from a sample.
  """
  deviation = x - masked_mean(x, mask)
  degrees = jnp.sum(mask, dtype=x.dtype) - ddof
  return safe_divide(masked_sum(jnp.square(deviation), mask), jnp.maximum(degrees, 0.0))


def row_segment_sum(x: chex.Array, ids: chex.Array) -> chex.Array:
  """Gives every entry the sum over the entries of its row that share its id.

      y[b, t] = sum over s with ids[b, s] == ids[b, t] of x[b, s]

  Args:
    x: [B, T] float.
    ids: [B, T] int32, from 0 to T.
  Returns:
    [B, T], of `x`'s dtype.
  Example:
    >>> row_segment_sum(jnp.array([[1., 2., 4.]]), jnp.array([[1, 1, 2]])).tolist()
    [[3.0, 3.0, 4.0]]
  """
  return _over_rows(jax.ops.segment_sum, x, ids)


def row_segment_max(x: chex.Array, ids: chex.Array) -> chex.Array:
  """Gives every entry the largest of the entries of its row that share its id.

  Args:
    x: [B, T].
    ids: [B, T] int32, from 0 to T.
  Returns:
    [B, T], of `x`'s dtype.
  Example:
    >>> row_segment_max(jnp.array([[1, 4, 2]]), jnp.array([[1, 1, 2]])).tolist()
    [[4, 4, 2]]
  """
  return _over_rows(jax.ops.segment_max, x, ids)


def _over_rows(reduce, x, ids):
  chex.assert_rank([x, ids], 2)
  chex.assert_equal_shape([x, ids])

  def one_row(row, row_ids):
    return reduce(row, row_ids, num_segments=row.shape[0] + 1)[row_ids]

  return jax.vmap(one_row)(x, ids)
