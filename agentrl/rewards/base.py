"""Named parts of a reward, their weighted sum, and what shapes it over a whole batch.

A data source's reward is the module of this package that has its name and registers a function
giving components. A shaping is a module of `agentrl.rewards.shaping`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, Mapping, Protocol, Sequence

from agentrl.core import registry
from agentrl.core import types

REWARDS: registry.Registry[Callable[..., Any]] = registry.Registry(
    'reward', package='agentrl.rewards')
SHAPINGS: registry.Registry[Callable[..., Any]] = registry.Registry(
    'reward shaping', package='agentrl.rewards.shaping')


Number = float | Callable[[int], float]  # a number, or a function of the step of the stage


class Component(Protocol):
  """Scores a finished trajectory. Pure; never raises for what a policy may have written.

  Raises for a task that could never be scored, even without an answer.
  """

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


class Shaping(Protocol):
  """Changes or adds parts of the trajectories of a batch; for what depends on the group, or on time.

  Attributes:
    needs: Parts that it reads.
    names: Parts of a trajectory that a call returns; 'total' may be among them.
    turn_names: Parts of turns that a call returns.
  """

  needs: tuple[str, ...]
  names: tuple[str, ...]
  turn_names: tuple[str, ...]

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> Sequence[Mapping[str, Any]]:
    """Returns, for each trajectory, its new parts by name: a float, or one float a turn.

    Changes nothing but `iteration.memory`, which is the shaping's own.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Extent:
  """Parts 'turns', 'tokens' (drawn by the policy) and 'truncated' (1 if it ran out of tokens or turns)."""

  names: tuple[str, ...] = ('turns', 'tokens', 'truncated')

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]:
    del task
    truncated = trajectory.status in (types.Status.LENGTH, types.Status.TURN_LIMIT, types.Status.CALL_LIMIT)
    return {'turns': float(len(trajectory.turns)), 'tokens': float(trajectory.num_sampled),
            'truncated': float(truncated)}


class Reward:
  """Components, the weights of their parts, and shapings, in this order.

      total = sum over parts p of weights[p] * p, unless a shaping says otherwise

  Example:
    >>> from agentrl.core import types
    >>> reward = Reward([Format(), Calls()], {'format': 1.0, 'failed_calls': -0.1})
    >>> task = types.Task('0', 'tools', (), None)
    >>> done = types.Trajectory(task, 0, '0', 0, status=types.Status.FINISHED, answer='4')
    >>> reward(task, done)['total']
    1.0
  """

  def __init__(self, components: Sequence[Component], weights: Mapping[str, Number],
               shapings: Mapping[str, Shaping] | None = None):
    """Checks that weights and shapings speak of parts that exist.

    Args:
      components: What to compute; the parts without a weight are recorded and count nothing.
      weights: By part; a number, or a function of the step.
      shapings: By name, in the order they are applied.
    Raises:
      ValueError: if two components share a part, a weight has no part or is not finite, or a
        shaping reads a part that nothing before it gives.
    """
    names = [name for component in components for name in component.names]
    if len(set(names)) != len(names) or 'total' in names:
      raise ValueError(f"parts must differ from each other and from 'total', got {names}")
    for name, weight in weights.items():
      if name not in names:
        raise ValueError(f'weight of unknown part {name!r}; parts: {sorted(names)}')
      if not math.isfinite(_at(weight, 0)):
        raise ValueError(f'weight of {name!r} must be finite, got {_at(weight, 0)}')
    self._components = tuple(components)
    self._weights = dict(weights)
    self._shapings = dict(shapings or {})
    self.names, self.turn_names = {*names, 'total'}, set()
    for label, shaping in self._shapings.items():
      missing = sorted(set(shaping.needs) - self.names - self.turn_names)
      if missing:
        raise ValueError(f'reward shaping {label!r} reads the part {missing[0]!r}, which nothing before it gives; '
                         f'parts: {sorted(self.names | self.turn_names)}')
      self.names |= set(shaping.names)
      self.turn_names |= set(shaping.turn_names)

  def __call__(self, task: types.Task, trajectory: types.Trajectory, step: int = 0) -> dict[str, float]:
    """Returns every part of one trajectory in its own unit, and 'total'; shapings left out.

    Args:
      task: What was asked.
      trajectory: What came of it.
      step: That weights are of.
    Raises:
      ValueError: if a component returns other parts than it names.
    """
    parts: dict[str, float] = {}
    for component in self._components:
      new = component(task, trajectory)
      if set(new) != set(component.names):
        raise ValueError(f'{component} names parts {component.names} and returned {sorted(new)}')
      parts.update({name: float(value) for name, value in new.items()})
    parts['total'] = float(sum(_at(weight, step) * parts[name] for name, weight in self._weights.items()))
    return parts

  def check(self, task: types.Task, split: str = ''):
    """Refuses a task whose answer could not be scored.

    Args:
      task: Any.
      split: Of the data set, for the message.

    Raises:
      ValueError: saying what is wrong with it.
    """
    try:
      self(task, types.Trajectory(task, 0, task.id, 0))
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'the answer of {split} task {task.id!r} cannot be scored ({type(error).__name__}: {error}): '
                       'its ground truth is not what the reward reads') from error

  def score(self, trajectories: Sequence[types.Trajectory], iteration: types.Iteration):
    """Writes every part of every trajectory, shapings included, onto the trajectories: `rate`, then `shape`."""
    self.rate(trajectories, iteration.step)
    self.shape(trajectories, iteration)

  def rate(self, trajectories: Sequence[types.Trajectory], step: int = 0):
    """Writes the parts that each trajectory has by itself; these may be some of a step."""
    for trajectory in trajectories:
      trajectory.rewards.update(self(trajectory.task, trajectory, step))

  def shape(self, trajectories: Sequence[types.Trajectory], iteration: types.Iteration):
    """Writes the parts that shapings give.

    Args:
      trajectories: All of a step, rated: groups must be whole.
      iteration: Where the run stands; each shaping keeps its memory under its own name.
    Raises:
      ValueError: if a shaping returns other parts than it names, or not one number a turn.
    """
    for label, shaping in self._shapings.items():
      own = dataclasses.replace(iteration, memory=iteration.memory.setdefault(label, {}))
      for trajectory, new in zip(trajectories, shaping(trajectories, own), strict=True):
        for name, value in new.items():
          _write_part(trajectory, label, shaping, name, value)


class _Scheduled:
  """A shaping some of whose numbers depend on the step."""

  def __init__(self, label: str, options: Mapping[str, Any]):
    self._make = lambda step: registry.call(
        f'reward.shapings, {label}', SHAPINGS.get(label), {k: _at(v, step) for k, v in options.items()})
    first = self._make(0)
    self.needs, self.names, self.turn_names = first.needs, first.names, first.turn_names

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> Sequence[Mapping[str, Any]]:
    return self._make(iteration.step)(trajectories, iteration)


def _at(value: Any, step: int) -> Any:
  return value(step) if callable(value) else value


def _write_part(trajectory: types.Trajectory, label: str, shaping: Shaping, name: str, value: Any):
  if name in shaping.turn_names:
    if len(value) != len(trajectory.turns):
      raise ValueError(f'reward shaping {label!r} gave {len(value)} numbers {name!r} for {len(trajectory.turns)} turns')
    trajectory.turn_rewards[name] = [float(v) for v in value]
  elif name in shaping.names:
    trajectory.rewards[name] = float(value)
  else:
    raise ValueError(f'reward shaping {label!r} returned the part {name!r}, which it does not name')


def make(name: str, weights: Mapping[str, Number] | None = None,
         shapings: Sequence[Mapping[str, Any]] = ()) -> Reward:
  """Returns the reward of that name.

  Args:
    name: Of a module of this package, usually that of the data source.
    weights: By part; None or {} is 1 for 'accuracy'. Any of them may be a function of the step.
    shapings: The 'name' and the options of each, in order; likewise.
  Raises:
    agentrl.core.registry.UnknownNameError: if a name is unknown; lists those there are.
    ValueError: if one is listed twice, or see `Reward`.
  """
  made = {}
  for options in map(dict, shapings):
    label = registry.pop_name('reward.shapings', options)
    if label in made:
      raise ValueError(f'reward shaping {label!r} is listed twice')
    if any(callable(value) for value in options.values()):
      made[label] = _Scheduled(label, options)
    else:
      made[label] = registry.call(f'reward.shapings, {label}', SHAPINGS.get(label), options)
  return Reward([*REWARDS.get(name)(), Format(), Calls(), Extent()], weights or {'accuracy': 1.0}, made)
