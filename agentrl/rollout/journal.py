"""What a session drew and was told, in order: enough to run its program again to where it was.

A coroutine cannot be saved, but one whose every step follows from what it drew and what its tools answered can be run
again: `Session.generate` gives it the recorded tokens instead of drawing, and the tools' executor the recorded answers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Sequence
import zlib

from absl import logging
import numpy as np

from agentrl.core.types import Part, Segment, ToolResult
from agentrl.sampling.constrain import Grammar
from agentrl.tools.recording import Recording


@dataclasses.dataclass
class Draw:
  """A turn as it was drawn, whatever became of it afterwards.

  Attributes:
    context: Checksum of what stood before it.
    tokens: [n] int32.
    log_probs: [n] float32, nats.
    entropies: [n] float32, nats.
    versions: [n] int32, of the policy that drew each token.
    reason: Why it ended, 'stop' or 'length'; None while it goes on.
    asked: Checksum of what else the draw follows from, see `terms`; None in journals of before this was compared.
  """

  context: int
  tokens: np.ndarray
  log_probs: np.ndarray
  entropies: np.ndarray
  versions: np.ndarray
  reason: str | None
  asked: int | None = None


class Journal:
  """The draws of one session and the answers of its tools.

  Attributes:
    draws: In the order in which they were asked for.
    recording: The tools' answers.
  """

  def __init__(self, draws: list[Draw] | None = None, recording: Recording | None = None):
    self.draws = draws or []
    self.recording = recording or Recording()
    self._asked = 0

  def ask(self, context: Segment, asked: int) -> Draw | None:
    """Returns what was drawn the last time the program came here; None where it goes on from here.

    Where it comes with another context than it did, or asks for another turn, the rest of the journal is forgotten: what
    was drawn does not follow.

    Args:
      context: What stands before the turn.
      asked: Checksum of what else it follows from, see `terms`.
    """
    draw = self.draws[self._asked] if self._asked < len(self.draws) else None
    if draw is not None and (draw.context != checksum(context) or draw.asked not in (None, asked)):
      logging.warning('A program that was run again went another way after %d turns; it goes on from there', self._asked)
      draw = None
    if draw is None or draw.reason is None:
      del self.draws[self._asked:]
      self.recording.forget()
    else:
      self._asked += 1
    return draw

  def note(self, context: Segment, start: int, reason: str, asked: int):
    """Takes note of a turn that was drawn from index `start` of the context on."""
    self.draws.append(drawn(context, start, reason, asked))
    self._asked += 1


def checksum(context: Segment, end: int | None = None) -> int:
  """Returns a checksum of a context's tokens, up to index `end`."""
  return zlib.crc32(context.tokens[:end].tobytes())


def terms(budget: int, stops: Sequence[str], grammar: Grammar | None, policy: str) -> int:
  """Returns a checksum of what a turn follows from beside its context.

  Args:
    budget: Most tokens.
    stops: Strings that end it, in any order.
    grammar: What it may be; None for anything.
    policy: Who draws it.
  """
  return zlib.crc32(repr((budget, sorted(set(stops)), grammar and grammar.checksum, policy)).encode())


def drawn(context: Segment, start: int, reason: str | None, asked: int) -> Draw:
  """Returns what stands in a context from index `start` on."""
  columns = (context.tokens, context.log_probs, context.entropies, context.versions)
  return Draw(checksum(context, start), *(c[start:] for c in columns), reason, asked)


def to_plain(draws: list[Draw], recording: Recording) -> dict[str, Any]:
  """Returns a journal as dicts, lists and arrays, for `from_plain`."""
  answers = [None if a is None else [dataclasses.asdict(r) for r in a] for a in recording.answers]
  return {'draws': [dataclasses.asdict(d) for d in draws], 'answers': answers}


def from_plain(plain: Mapping[str, Any]) -> Journal:
  """Returns what `to_plain` was given."""
  answers = [None if a is None else [_result(r) for r in a] for a in plain['answers']]
  return Journal([Draw(**d) for d in plain['draws']], Recording(answers))


def _result(fields: Mapping[str, Any]) -> ToolResult:
  return ToolResult(**{**fields, 'parts': tuple(Part(**part) for part in fields['parts'])})
