"""Right answers are worth more the fewer calls they took; wrong ones nothing."""

from __future__ import annotations

import math
from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base

VARIANTS = ('smooth', 'fewest')


@base.SHAPINGS.register('mult_eff')
class MultiplicativeEfficiency:
  """Replaces the total by alpha times correctness times 'call_efficiency', a part from 0 to 1.

      smooth:  cos(m pi / (2 m + c))
      fewest:  1                          where m = n = 0
               cos(m pi / (2 m + c))      where n = 0
               sin(f pi / (2 n))          else, f = 2 m n / (m + n): 1 at m = n, 0 at m = 0

  m is the number of calls, n the fewest of any right answer to this task so far in the run. Under an advantage that
  divides by the group's deviation, alpha has no effect.

  Source: OTC, read on a secondary page; 'smooth' is its form for PPO, 'fewest' that for GRPO.  Deviation: c is not
    known, "about the most calls".
  Example:
    >>> round(smooth(0, 4), 3), round(smooth(4, 4), 3), fewest(3, 3, 4), round(fewest(6, 3, 4), 3), fewest(0, 3, 4)
    (1.0, 0.5, 1.0, 0.866, 0.0)
  """

  names = ('call_efficiency', 'total')
  turn_names = ()

  def __init__(self, variant: str, max_calls: int, alpha: float = 1.0, part: str = 'accuracy'):
    """Binds the settings.

    Args:
      variant: 'smooth' or 'fewest'.
      max_calls: c, about the most calls of a trajectory.
      alpha: Reward of a right answer at full efficiency.
      part: Correctness.
    Raises:
      ValueError: if the variant is unknown, or a number not positive.
    """
    if variant not in VARIANTS or max_calls < 1 or alpha <= 0:
      raise ValueError(f'variant={variant!r} must be one of {", ".join(VARIANTS)}, and max_calls={max_calls} and '
                       f'alpha={alpha} positive')
    self._variant, self._c, self._alpha, self._part = variant, max_calls, alpha, part
    self.needs = ('calls', part)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns efficiency and total of each trajectory; keeps the fewest calls by task in the memory."""
    known = iteration.memory.setdefault('fewest', {})
    for t in trajectories:
      if self._variant == 'fewest' and t.rewards[self._part] >= 1:
        known[t.task.id] = min(known.get(t.task.id, math.inf), t.rewards['calls'])
    return [self._parts(t, known.get(t.task.id)) for t in trajectories]

  def _parts(self, trajectory: types.Trajectory, n: float | None) -> dict[str, float]:
    m, right = trajectory.rewards['calls'], trajectory.rewards[self._part]
    # Nobody was right yet, so the product is 0 whatever this says.
    efficiency = smooth(m, self._c) if n is None else fewest(m, n, self._c)
    return {'call_efficiency': efficiency, 'total': self._alpha * right * efficiency}


def smooth(m: float, c: float) -> float:
  """Returns the efficiency of m calls, by itself."""
  return math.cos(m * math.pi / (2 * m + c))


def fewest(m: float, n: float, c: float) -> float:
  """Returns the efficiency of m calls where n are known to suffice."""
  if n == 0:
    return 1.0 if m == 0 else smooth(m, c)
  return math.sin(2 * m * n / (m + n) * math.pi / (2 * n))
