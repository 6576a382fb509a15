"""What TPU chips can do at most, as their maker states it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip.

  Attributes:
    flops: Floating-point operations a second, bfloat16.
    hbm_bytes: Of the main memory, what the compiler lets a program have.
    hbm_bandwidth: Bytes a second.
    ici_bandwidth: Bytes a second over all its links, both directions together.
    torus: Dimensions of the torus.
    source: Of these numbers but the second, which libtpu 0.0.42 says of a program that does not fit.
  """

  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_bandwidth: float
  torus: int
  source: str

  @property
  def ring_bandwidth(self) -> float:
    """Bytes a second that a chip can send in a collective along one dimension of the torus, both ways round."""
    return self.ici_bandwidth / 2 / self.torus


CHIPS = {
    'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 400e9, 2, 'cloud.google.com/tpu/docs/v5e'),
    'v6e': Chip(918e12, 31.25 * 2**30, 1_600e9, 800e9, 2, 'cloud.google.com/tpu/docs/v6e'),
    'v5p': Chip(459e12, 95.74 * 2**30, 2_765e9, 1_200e9, 3, 'cloud.google.com/tpu/docs/v5p'),
}
