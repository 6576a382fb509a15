"""What a trajectory's tools answered, kept so that its program can be run again to where it was."""

from __future__ import annotations

import contextvars
from typing import Sequence

from agentrl.core.types import ToolResult


class Recording:
  """The answers to one trajectory's calls, in the order in which they were asked for.

  A program that is run again asks in the same order, and is given what stands here; from there on it is added to.
  """

  def __init__(self, answers: Sequence[Sequence[ToolResult] | None] = ()):
    """Goes on from answers.

    Args:
      answers: A list of results for each time that calls were run together; None for what was not answered yet.
    """
    self.answers: list[tuple[ToolResult, ...] | None] = [None if a is None else tuple(a) for a in answers]
    self._asked = 0

  def ask(self) -> int:
    """Returns the place of calls that are about to be run."""
    self._asked += 1
    if self._asked > len(self.answers):
      self.answers.append(None)
    return self._asked - 1

  def forget(self):
    """Leaves out what has not been asked for again: the program has gone another way."""
    del self.answers[self._asked:]


# Of the trajectory whose program runs in this context; None where nothing is recorded.
RECORDING: contextvars.ContextVar[Recording | None] = contextvars.ContextVar('recording', default=None)
