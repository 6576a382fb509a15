"""Rewards in order of priority: a lower one counts only where every higher one is met."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base

REDUCTIONS = {'mean': lambda x: sum(x) / len(x), 'min': min}


@base.SHAPINGS.register('gate')
class Gate:
  """Replaces the total by the rewards that the gates before them let through; part 'gates' counts those passed.

      total = sum over k of weight_k r_k prod over j < k of 1[r_j >= threshold_j]

  Stages of growing demand ('does the call parse, is the format right, how good is the answer') are gates too.

  Source: G-RA, read on a secondary page: thresholds and the order of accumulation are our choice. Staged rewards (PRS
    of VSPO): their weights are our choice as well.  Deviation: unknown.
  Example:
    >>> order = ({'part': 'accuracy', 'threshold': 1.0}, {'part': 'brief', 'weight': 0.5})
    >>> Gate(order).total({'accuracy': 0.0, 'brief': 1.0}), Gate(order).total({'accuracy': 1.0, 'brief': 0.5})
    (0.0, 1.25)
  """

  names = ('total', 'gates')
  turn_names = ()

  def __init__(self, order: Sequence[Mapping[str, Any]]):
    """Binds the settings.

    Args:
      order: Highest priority first; of each its 'part', the 'threshold' (1) below which nothing after it counts, and
        its 'weight' (1). A part of turns needs 'reduce', 'mean' or 'min' over the turns.
    Raises:
      ValueError: if there is none, or one has other keys.
    """
    if not order:
      raise ValueError("order must list at least one gate, such as {'part': 'accuracy'}")
    known = {'part', 'threshold', 'weight', 'reduce'}
    for gate in order:
      if 'part' not in gate or set(gate) - known or gate.get('reduce', 'mean') not in REDUCTIONS:
        raise ValueError(f"a gate has 'part', and perhaps 'threshold', 'weight' and 'reduce' ({', '.join(REDUCTIONS)}); "
                         f'got {dict(gate)}')
    self._order = [dict(gate) for gate in order]
    self.needs = tuple(dict.fromkeys(gate['part'] for gate in order))

  def total(self, parts: Mapping[str, Any]) -> float:
    """Returns the reward of a trajectory with such parts; those of turns are lists."""
    return self._through(parts)[0]

  def _through(self, parts: Mapping[str, Any]) -> tuple[float, int]:
    total = 0.0
    for passed, gate in enumerate(self._order):
      value = parts[gate['part']]
      if 'reduce' in gate:
        value = REDUCTIONS[gate['reduce']](value) if len(value) else 0.0
      total += gate.get('weight', 1.0) * value
      if value < gate.get('threshold', 1.0):
        return total, passed
    return total, len(self._order)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the total of each trajectory, and how many gates it passed."""
    del iteration
    found = [self._through({**t.turn_rewards, **t.rewards}) for t in trajectories]
    return [{'total': total, 'gates': float(passed)} for total, passed in found]
