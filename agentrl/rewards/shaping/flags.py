"""What is wrong with a trajectory, so that a selector may leave it out."""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np

from agentrl.core import types
from agentrl.rewards import base

# Failures that say nothing of the policy: another attempt might have gone well.
NOISE = ('transient', 'timeout', 'crash', 'cancelled')
_ILLEGAL = ('malformed', 'unknown_tool', 'too_many_calls', 'repeated')


@base.SHAPINGS.register('flags')
class Flags:
  """Parts that are 1 or 0: 'void_turn', 'repetitive', 'unreadable' and 'noisy'.

  'void_turn': some turn has neither a call nor an answer. 'repetitive': a run of `n` drawn tokens occurs `times` times
  or more. 'unreadable': a turn holds a character that could not be decoded. 'noisy': the environment or a tool failed
  for reasons of its own, or the policy made `illegal_calls` or more calls that could not be run.

  Source: SPEAR (20-grams 10 times, void turns, unreadable text); IPA (what counts as noise; the count of illegal calls
    is our choice); SimpleTIR for void turns, recalled.  Deviation: n-grams are of our tokens.
  """

  needs = ()
  names = ('void_turn', 'repetitive', 'unreadable', 'noisy')
  turn_names = ()

  def __init__(self, n: int = 20, times: int = 10, illegal_calls: int = 3):
    """Binds the settings.

    Args:
      n: Tokens of a run.
      times: Occurrences that make a trajectory repetitive, overlapping ones included.
      illegal_calls: Refused calls that count as noise.
    Raises:
      ValueError: if one is not positive.
    """
    if min(n, times, illegal_calls) < 1:
      raise ValueError(f'n={n}, times={times} and illegal_calls={illegal_calls} must be at least 1')
    self._n, self._times, self._illegal_calls = n, times, illegal_calls

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the flags of each trajectory."""
    del iteration
    return [{'void_turn': float(has_void_turn(t)), 'repetitive': float(self._is_repetitive(t)),
             'unreadable': float(any('\ufffd' in turn.text for turn in t.turns)),
             'noisy': float(self._is_noisy(t))} for t in trajectories]

  def _is_repetitive(self, trajectory: types.Trajectory) -> bool:
    counts = [most_frequent(s.tokens[s.sampled], self._n) for s in trajectory.segments]
    return max(counts, default=0) >= self._times

  def _is_noisy(self, trajectory: types.Trajectory) -> bool:
    errors = [result.error for result in trajectory.results]
    failed = trajectory.status in (types.Status.ENVIRONMENT_FAILURE, types.Status.TOOL_FAILURE)
    illegal = sum(error in _ILLEGAL for error in errors)
    return failed or any(error in NOISE for error in errors) or illegal >= self._illegal_calls


def has_void_turn(trajectory: types.Trajectory) -> bool:
  """Whether some turn has neither a call nor, being the last, an answer."""
  silent = [turn for turn in trajectory.turns if not turn.calls]
  return any(turn is not trajectory.turns[-1] or not (trajectory.answer or '').strip() for turn in silent)


def most_frequent(tokens: np.ndarray, n: int) -> int:
  """Returns how often the most frequent run of n tokens occurs; 0 if there are fewer.

  Example:
    >>> most_frequent(np.array([1, 2, 1, 2, 1, 2]), 2), most_frequent(np.array([1]), 2)
    (3, 0)
  """
  if len(tokens) < n:
    return 0
  runs = np.lib.stride_tricks.sliding_window_view(tokens, n)
  return int(np.unique(runs, axis=0, return_counts=True)[1].max())
