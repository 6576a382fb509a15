"""A penalty that grows over the last stretch before the token limit."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('overlong')
class Overlong:
  """Part 'overlong', added to the total: 0 up to the buffer, then falling to `-factor` at the limit.

      overlong = min(-(tokens - (max_tokens - buffer)) / buffer * factor, 0)

  'tokens' counts what the policy drew. The alternative is to leave truncated trajectories out of the loss: selector
  'mask_flags'.

  Source: Yu et al. (DAPO), arXiv 2503.14476; limits 20480, buffer 4096, factor 1.  Deviation: none where nothing but
    the policy writes; the source has no observations.
  Example:
    >>> shaping = Overlong(max_tokens=10, buffer=4)
    >>> [shaping.penalty(n) for n in (6, 8, 10, 12)]
    [0.0, -0.5, -1.0, -1.5]
  """

  needs = ('tokens', 'total')
  names = ('overlong', 'total')
  turn_names = ()

  def __init__(self, max_tokens: int, buffer: int, factor: float = 1.0):
    """Binds the settings.

    Args:
      max_tokens: Tokens a trajectory may draw.
      buffer: Tokens below that where the penalty begins.
      factor: Penalty at the limit, in the reward's unit.
    Raises:
      ValueError: if the buffer is not within the limit, or the factor negative.
    """
    if not 0 < buffer <= max_tokens or factor < 0:
      raise ValueError(f'buffer={buffer} must lie between 1 and max_tokens={max_tokens}, and factor={factor} at 0 or above')
    self._start, self._buffer, self._factor = max_tokens - buffer, buffer, factor

  def penalty(self, tokens: float) -> float:
    """Returns the part for a number of tokens drawn."""
    return min(-(tokens - self._start) / self._buffer * self._factor, 0.0) + 0.0

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the penalty and the new total of each trajectory."""
    del iteration
    penalties = [self.penalty(t.rewards['tokens']) for t in trajectories]
    return [{'overlong': p, 'total': t.rewards['total'] + p} for t, p in zip(trajectories, penalties)]
