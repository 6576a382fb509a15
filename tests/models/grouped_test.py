"""The TPU's kernels for grouped products, in interpret mode, against a loop over the groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import grouped

ROWS, D, F = 256, 32, 48
# Empty groups, one that crosses a block of rows, and rows at the end that belong to none.
SIZES = np.asarray([50, 0, 130, 40], np.int32)


def by_loop(x, weights):
  edges = np.r_[0, np.cumsum(SIZES)]
  return jnp.concatenate([x[a:b] @ weights[g] for g, (a, b) in enumerate(zip(edges, edges[1:]))])


@pytest.mark.parametrize('product', [
    lambda x, w: grouped.product(x, w, SIZES, 'auto'),
    lambda x, w: grouped.megablox_product(x, w, SIZES, interpret=True),
], ids=['auto', 'megablox'])
def test_products_and_gradients_are_those_of_a_loop(product):
  rng = np.random.default_rng(0)
  x, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((ROWS, D), (len(SIZES), D, F)))
  n = SIZES.sum()
  mix = jnp.cos(jnp.arange(n * F, dtype=jnp.float32)).reshape(n, F)
  run = lambda f: jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(f(x, w)[:n] * mix), (0, 1)))(x, weights)
  (got, (got_x, got_w)), (want, (want_x, want_w)) = run(product), run(by_loop)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(got_x[:n], want_x[:n], atol=1e-4)
  np.testing.assert_allclose(got_w, want_w, atol=1e-4)
