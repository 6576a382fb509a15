"""Products of stretches of rows with matrices of their own, by the implementation that the platform is best at."""

from __future__ import annotations

import jax

_ROWS = 128  # a stretch of rows that the kernel takes at a time is a multiple of it


def product(x: jax.Array, weights: jax.Array, sizes: jax.Array, implementation: str = 'auto') -> jax.Array:
  """Returns x[i] @ weights[g] for the rows i of each group g, [M, F] in x's dtype.

  Args:
    x: [M, D]. The first sizes[0] rows are of group 0, the next sizes[1] of group 1, and so on.
    weights: [E, D, F] in x's dtype.
    sizes: [E] int32, adding up to at most M; rows beyond are not defined.
    implementation: 'xla' for `jax.lax.ragged_dot`, whose gradient for weights XLA's TPU backend computes as a dense
      product E times as large; 'megablox' for the Pallas kernels of TPU, which need M to be a multiple of 128; 'auto'
      for the latter where it can run.
  """
  if implementation == 'auto':
    implementation = 'megablox' if jax.default_backend() == 'tpu' and x.shape[0] % _ROWS == 0 else 'xla'
  if implementation == 'xla':
    return jax.lax.ragged_dot(x, weights, sizes)
  return megablox_product(x, weights, sizes)


def megablox_product(x: jax.Array, weights: jax.Array, sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
  """Returns `product` by the kernels of megablox; `interpret` runs them without a TPU."""
  from jax.experimental.pallas.ops.tpu.megablox import ops as megablox  # pylint: disable=g-import-not-at-top

  rows = next(r for r in (512, 256, _ROWS) if x.shape[0] % r == 0)
  tiling = rows, min(1_024, weights.shape[1]), min(1_024, weights.shape[2])
  return megablox.gmm(x, weights, sizes, x.dtype, tiling, None, None, False, interpret)
