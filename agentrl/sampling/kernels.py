"""Which kernels attend over the blocks of the cache, and what one has to offer.

`tpu_kernel` has those for TPUs, `cpu_kernel` those for CPUs. `cache.attend_rows` and `cache.attend` are the same in plain
XLA, which runs anywhere.

Axes: as in `cache`; A contexts (rows or slots), B blocks of a context.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterable, Protocol

from absl import logging
import jax
from jax.sharding import NamedSharding

from agentrl.models.config import ModelConfig
from agentrl.sampling import tpu_kernel
from agentrl.sampling.cache import Cache, Partial, Reading


class Kernels(Protocol):
  """Attention over the cache, in its two forms: `rows` for an extension, `plan` and `slots` for a step."""

  def rows(self, keys: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array, lengths: jax.Array,
           window: int) -> Callable[[jax.Array], Partial]:
    """Returns what gives, for scaled queries [A, K, R, Dh], the attention over the blocks of their contexts.

    Args:
      keys: [N, K, Dh, P].
      values: [N, K, P, Dh].
      tables: [A, B] int32. Blocks of each context, in order.
      positions: [A, T] int32. Of the queries, each one more than that before.
      lengths: [A] int32. Tokens of each context; of queries beyond them nothing is said.
      window: Tokens back that a query sees, itself included; 0 for all.
    """

  def plan(self, reading: Reading, first: jax.Array, windows: Iterable[int], queries: int, cache: Cache) -> Any:
    """Returns what `slots` needs to know for a call of `decode`.

    Args:
      reading: Which blocks are whose.
      first: [S] int32. Position of the first query of each slot.
      windows: Of the layers.
      queries: R.
      cache: To be read; its shape counts.
    """

  def slots(self, keys: jax.Array, values: jax.Array, plans: Any, positions: jax.Array, first: jax.Array,
            window: int) -> Callable[[jax.Array], Partial]:
    """Returns what gives, for scaled queries [S, K, R, Dh], the attention of slots over the blocks that they alone read.

    By table, over all of their blocks.

    Args:
      keys: [N, K, Dh, P].
      values: [N, K, P, Dh].
      plans: See `plan`.
      positions: [S, W] int32. Of the queries, each one more than that before.
      first: [S] int32. Tokens of each slot that are in blocks.
      window: As for `rows`.
    """


def choose(config: ModelConfig, block: int, where: NamedSharding | None, platform: str | None = None) -> Kernels | None:
  """Returns the kernels for a cache, or None where plain products are to be taken.

  Args:
    config: Of the policy. Its `attention` 'xla' asks for plain products.
    block: P.
    where: How the cache is split; None if one device has it.
    platform: As jax names it; None for that of `where`, or of the default backend.
  """
  platform = platform or platform_of(where)
  if platform == 'cpu' and reads_by_table(config, where):
    from agentrl.sampling import cpu_kernel  # pylint: disable=g-import-not-at-top  (not where numba is of no use)

    return cpu_kernel.CpuKernels()
  fits = block % tpu_kernel.LANES == 0 and (config.head_dim % tpu_kernel.LANES == 0 or config.head_dim == 64)
  if platform != 'tpu' or config.attention == 'xla' or not fits:
    return None
  return tpu_kernel.TpuKernels(where if where is not None and where.mesh.size > 1 else None)


def platform_of(where: NamedSharding | None) -> str:
  """Returns the platform of the devices that a cache lies on, as jax names it; None for the default device."""
  return where.mesh.devices.flat[0].platform if where else jax.default_backend()


def reads_by_table(config: ModelConfig, where: NamedSharding | None) -> bool:
  """Returns whether the cache is read by table, see `cache`: on one CPU device, where numba compiles the kernel.

  Args:
    config: Of the policy. Its `attention` 'xla' asks for plain products.
    where: How the cache is split; None for the default device.
  """
  if platform_of(where) != 'cpu' or config.attention == 'xla' or (where is not None and where.mesh.size > 1):
    return False
  try:
    from agentrl.sampling import cpu_kernel  # pylint: disable=g-import-not-at-top

    cpu_kernel.register()
  except Exception as error:  # pylint: disable=broad-exception-caught  (whatever numba, llvmlite or XLA say)
    _say(f'decoding takes plain products, which are slower: the kernel for CPUs cannot be used, {error!r}')
    return False
  return True


@functools.cache
def _say(message: str):
  logging.warning(message)
