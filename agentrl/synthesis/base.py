"""Scripted demonstrations of a data source, found by its name."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Sequence

from agentrl.core import registry
from agentrl.core import types

DEMONSTRATORS: registry.Registry = registry.Registry('demonstrator', package='agentrl.synthesis')


@dataclasses.dataclass(frozen=True)
class Trace:
  """A scripted conversation.

  Attributes:
    task: What was asked.
    messages: The task's messages and all that follow, ending in the answer.
    strategy: Which script wrote it.
    right: Whether the answer scores full marks; a guess may be lucky.
  """

  task: types.Task
  messages: tuple[types.Message, ...]
  strategy: str
  right: bool


class Demonstrator(Protocol):
  """Writes one trace a task, in their order; blocks. The same tasks and seed give the same traces."""

  def __call__(self, tasks: Sequence[types.Task], executor: Any, *, seed: int, share_right: float,
               call_format: Any, **options: Any) -> list[Trace]:
    """Returns the traces.

    Args:
      tasks: Of the source whose name the demonstrator is registered under.
      executor: Of the run; what tools say in a trace they have really said.
      seed: Of the choices.
      share_right: Probability that a trace is scripted to end in a right answer.
      call_format: Of the run.
      **options: Of the demonstrator.
    Raises:
      ValueError: if a task has no script or a tool is missing.
    """
    ...
