"""Weighted sums: merging in parts must equal computing at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.metrics import sums


def test_micro_batches_of_unequal_size_give_the_mean_of_the_whole():
  # Mean of (1, 2, 3, 10) is 4; the mean of the parts' means, (2 + 10) / 2 = 6, is the classic
  # mistake.
  parts = [{'loss': sums.Sum(6.0, 3.0)}, {'loss': sums.Sum(10.0, 1.0)}]
  assert sums.finalize(sums.merge(parts)) == {'loss': 4.0}


@pytest.mark.parametrize('splits', [(), (1,), (3, 4), (2, 5, 9)])
def test_every_split_gives_the_same_value(splits):
  values = np.random.default_rng(0).normal(size=11)
  parts = [{
      'm': sums.Sum(p.sum(), float(p.size)),
      'top': sums.Max(float(p.max()))
  } for p in np.split(values, splits)]
  merged = sums.finalize(sums.merge(parts))
  # Definition of mean and maximum over the whole.
  assert merged['m'] == pytest.approx(values.mean())
  assert merged['top'] == values.max()


def test_plain_numbers_average_and_missing_names_do_not_count():
  merged = sums.finalize(sums.merge([{'a': 1.0, 'b': 5}, {'a': 2.0}, {'a': 6.0}]))
  assert merged == {'a': 3.0, 'b': 5.0}  # (1 + 2 + 6) / 3; b was seen once.


def test_nothing_counted_is_nan_not_zero():
  assert math.isnan(sums.finalize({'failed_call_rate': sums.Sum(0.0, 0.0)})['failed_call_rate'])


def test_adding_under_jit_and_scan_equals_adding_on_the_host():
  values = jnp.arange(6.0).reshape(3, 2)

  @jax.jit
  def scanned(values):

    def body(carry, row):
      return sums.add(carry, {'m': sums.Sum(row.sum(), 2.0), 'top': sums.Max(row.max())}), None

    start = {'m': sums.Sum(jnp.float32(0), jnp.float32(0)), 'top': sums.Max(jnp.float32(-jnp.inf))}
    return jax.lax.scan(body, start, values)[0]

  assert sums.finalize(scanned(values)) == {'m': 2.5, 'top': 5.0}  # Mean and maximum of 0..5.


def test_a_sum_does_not_merge_with_a_maximum():
  with pytest.raises(TypeError, match="'x' is a Sum in one part and a Max"):
    sums.merge([{'x': 1.0}, {'x': sums.Max(1.0)}])
