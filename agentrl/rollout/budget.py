"""Limits of a turn, of a trajectory, and of all that are collected together."""

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
    calls: Calls of tools; with the turn that makes the last of them it ends.
    redraws: Times `trajectory_tokens` that it may draw in all, what is rolled back included.
    forks: Sessions that may descend from one sample.
    seconds: Wall time of its program, waiting included: what ends one that never would.
  """

  turn_tokens: int = 64
  trajectory_tokens: int = 1024
  context_tokens: int = 1024
  turns: int = 8
  calls: int = 1_024
  redraws: int = 8
  forks: int = 256
  seconds: float = 3_600.0

  def __post_init__(self):
    bad = [f'{f.name}={getattr(self, f.name)}' for f in dataclasses.fields(self)
           if not getattr(self, f.name) >= 1 or f.name != 'seconds' and getattr(self, f.name) % 1]
    if bad:
      raise ValueError(f'limits must be at least 1, and whole but for seconds, got {", ".join(bad)}')


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much the trajectories of one collection may use together, 0 for no bound; those under way when it is spent are cut.

  Attributes:
    tokens: Drawn tokens.
    turns: Turns.
    calls: Calls of tools.
    seconds: Wall time.
  """

  tokens: int = 0
  turns: int = 0
  calls: int = 0
  seconds: float = 0.0

  def __post_init__(self):
    bad = [f'{f.name}={getattr(self, f.name)}' for f in dataclasses.fields(self) if getattr(self, f.name) < 0]
    if bad:
      raise ValueError(f'a budget must be at least 0, which is none, got {", ".join(bad)}')
