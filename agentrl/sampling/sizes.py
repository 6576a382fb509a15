"""Sizes to compile for: few enough, and close enough to what is asked for."""

from __future__ import annotations

from typing import Sequence, TypeVar

T = TypeVar('T')


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
  """Returns sizes with two significant bits from `smallest` on, the last at least `largest`.

  >>> buckets(64, 200)
  (64, 96, 128, 192, 256)
  """
  sizes, power = [], 1
  while not sizes or sizes[-1] < largest:
    sizes.extend(s for s in (power, power * 3 // 2) if s >= smallest and (not sizes or sizes[-1] < largest))
    power *= 2
  return tuple(dict.fromkeys(sizes))


def block_of(context: int, about: int = 64) -> int:
  """Returns a size of blocks, about so many tokens, of which contexts of `context` tokens waste little.

  >>> block_of(80), block_of(112), block_of(4096), block_of(112, 32)
  (80, 56, 64, 32)
  """
  return -(-context // max(1, round(context / about)) // 8) * 8


def thinned(sizes: Sequence[int], most: int = 3) -> list[int]:
  """Returns the largest of some sizes and, of the others, those of which each is at most half of the next; `most` in all.

  >>> thinned([96, 128, 192, 256])
  [128, 256]
  """
  kept: list[int] = []
  for size in sorted(sizes, reverse=True):
    if len(kept) < most and (not kept or 2 * size <= kept[-1]):
      kept.append(size)
  return kept[::-1]


def split_rows(rows: list[T], sizes: Sequence[int]) -> list[list[T]]:
  """Cuts rows into parts that fill one of `sizes` at least to half, where that is possible."""
  parts = []
  while rows:
    size = next((s for s in reversed(sizes) if len(rows) > s // 2), sizes[0])
    parts.append(rows[:size])
    rows = rows[size:]
  return parts
