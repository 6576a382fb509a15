"""Sequences of tasks, by name."""

from __future__ import annotations

from typing import Any, Protocol

from agentrl.core import registry
from agentrl.core import types

SOURCES: registry.Registry = registry.Registry('task source', package='agentrl.data')


class TaskSource(Protocol):
  """A fixed sequence of tasks: reading an index twice gives equal tasks."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> types.Task: ...


class DataError(ValueError):
  """A data set does not have the shape that was asked for."""


def make_source(name: str, **settings: Any) -> TaskSource:
  """Returns the source of that name, such as 'reasoning_gym' or 'jsonl'.

  A new source is one new module of this package that registers a class or a function.

  Args:
    name: Of the source.
    **settings: Its own arguments: see `reasoning_gym.ReasoningGymSource` and `jsonl.JsonlSource`.
  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
  """
  return SOURCES.get(name)(**settings)
