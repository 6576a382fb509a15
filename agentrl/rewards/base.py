"""Named parts of a reward and their weighted sum."""

from __future__ import annotations

import dataclasses
import math
from typing import Mapping, Protocol, Sequence

from agentrl.core import types


class Component(Protocol):
  """Scores a finished trajectory. Pure; never raises for what a policy may have written."""

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the parts that a call returns, always all of them."""
    ...

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]: ...


@dataclasses.dataclass(frozen=True)
class Format:
  """Part 'format': 1 if the policy finished with an answer that is not blank, else 0."""

  names: tuple[str, ...] = ('format',)

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]:
    del task
    finished = trajectory.status == types.Status.FINISHED
    return {'format': float(finished and bool((trajectory.answer or '').strip()))}


@dataclasses.dataclass(frozen=True)
class Calls:
  """Parts 'calls' and 'failed_calls': how many there were. Negative weights make them penalties."""

  names: tuple[str, ...] = ('calls', 'failed_calls')

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]:
    del task
    results = trajectory.results
    return {'calls': float(len(results)), 'failed_calls': float(sum(not r.ok for r in results))}


class Reward:
  """Components and the weights of their parts.

      total = sum over parts p of weights[p] * p

  Example:
    >>> from agentrl.core import types
    >>> reward = Reward([Format(), Calls()], {'format': 1.0, 'failed_calls': -0.1})
    >>> task = types.Task('0', 'tools', (), None)
    >>> done = types.Trajectory(task, 0, '0', 0, status=types.Status.FINISHED, answer='4')
    >>> reward(task, done)['total']
    1.0
  """

  def __init__(self, components: Sequence[Component], weights: Mapping[str, float]):
    """Checks that the weights speak of parts that exist.

    Args:
      components: What to compute; the parts without a weight are recorded and count nothing.
      weights: By part.
    Raises:
      ValueError: if two components share a part, a weight has no part or is not finite.
    """
    names = [name for component in components for name in component.names]
    if len(set(names)) != len(names) or 'total' in names:
      raise ValueError(f"parts must differ from each other and from 'total', got {names}")
    for name, weight in weights.items():
      if name not in names:
        raise ValueError(f'weight of unknown part {name!r}; parts: {sorted(names)}')
      if not math.isfinite(weight):
        raise ValueError(f'weight of {name!r} must be finite, got {weight}')
    self._components = tuple(components)
    self._weights = dict(weights)

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> dict[str, float]:
    """Returns every part in its own unit, and 'total'.

    Raises:
      ValueError: if a component returns other parts than it names.
    """
    parts: dict[str, float] = {}
    for component in self._components:
      new = component(task, trajectory)
      if set(new) != set(component.names):
        raise ValueError(f'{component} names parts {component.names} and returned {sorted(new)}')
      parts.update({name: float(value) for name, value in new.items()})
    parts['total'] = float(sum(weight * parts[name] for name, weight in self._weights.items()))
    return parts
