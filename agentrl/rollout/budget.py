"""Limits of a turn and of a trajectory."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much a trajectory may use.

  Attributes:
    turn_tokens: Tokens the policy may draw in one turn.
    trajectory_tokens: Tokens it may draw in all turns together.
    context_tokens: Longest context, drawn and forced tokens together.
    turns: Turns.
    redraws: Times `trajectory_tokens` that it may draw in all, what is rolled back included.
    forks: Sessions that may descend from one sample.
    seconds: Wall time of its program, waiting included: what ends one that never would.
  """

  turn_tokens: int = 64
  trajectory_tokens: int = 1024
  context_tokens: int = 1024
  turns: int = 8
  redraws: int = 8
  forks: int = 256
  seconds: float = 3_600.0

  def __post_init__(self):
    bad = [f'{f.name}={getattr(self, f.name)}' for f in dataclasses.fields(self)
           if getattr(self, f.name) < 1]
    if bad:
      raise ValueError(f'limits must be at least 1, got {", ".join(bad)}')
