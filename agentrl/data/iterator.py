"""A resumable order over a task source."""

from __future__ import annotations

import functools
from typing import Any, Mapping

import numpy as np

from agentrl.core import types
from agentrl.data import base


class TaskIterator:
  """Batches of tasks in an order that is a function of (seed, epoch) only.

  It holds no position: `next` takes a state and returns the next one. A state is a small JSON
  object. Every epoch is a new permutation; its last len(source) % batch tasks are left out, so that
  a batch never holds a task twice.

  Example:
    >>> iterator = TaskIterator(source=list('abcd'), batch=2, seed=0)
    >>> first, state = iterator.next(iterator.start())
    >>> second, state = iterator.next(state)
    >>> sorted(first + second)
    ['a', 'b', 'c', 'd']
  """

  def __init__(self, source: base.TaskSource, batch: int, seed: int):
    """Binds a source.

    Args:
      source: Where tasks come from.
      batch: Tasks a batch.
      seed: Of the order.
    Raises:
      ValueError: if the batch is not positive or larger than the source.
    """
    if not 1 <= batch <= len(source):
      raise ValueError(
          f'batch must be between 1 and the {len(source)} tasks of the source, got {batch}')
    self._source = source
    self._batch = batch
    self._seed = seed
    # Two epochs at most are in use around an epoch's end.
    self._order = functools.lru_cache(maxsize=2)(self._permutation)

  def start(self) -> dict[str, int]:
    """Returns the state before the first batch."""
    return {'seed': self._seed, 'size': len(self._source), 'epoch': 0, 'position': 0}

  def next(self, state: Mapping[str, Any]) -> tuple[list[types.Task], dict[str, int]]:
    """Returns the batch at a state, and the state after it; the one given is not changed.

    The batch size may differ from that of the iterator that wrote the state.

    Raises:
      ValueError: if the state is another iterator's or has another shape.
    """
    state = self.restore(state)
    epoch, position = state['epoch'], state['position']
    if position + self._batch > len(self._source):
      epoch, position = epoch + 1, 0
    indices = self._order(epoch)[position:position + self._batch]
    tasks = [self._source[int(i)] for i in indices]
    return tasks, {**state, 'epoch': epoch, 'position': position + self._batch}

  def restore(self, state: Mapping[str, Any]) -> dict[str, int]:
    """Returns the state, checked, as read from a checkpoint.

    Raises:
      ValueError: if it was written for another seed or source, or has another shape.
    """
    expected = self.start()
    if set(state) != set(expected) or not all(isinstance(v, int) for v in state.values()):
      raise ValueError(
          f'no state of a task iterator: {state!r}; expected integers {sorted(expected)}')
    for key in ('seed', 'size'):
      if state[key] != expected[key]:
        raise ValueError(
            f'the state was written for {key} {state[key]}, here it is {expected[key]}: '
            'go on with the same data and seed, or start a new run')
    if state['epoch'] < 0 or not 0 <= state['position'] <= expected['size']:
      raise ValueError(f'state out of range: {state!r}')
    return dict(state)

  def _permutation(self, epoch: int) -> np.ndarray:
    return np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
