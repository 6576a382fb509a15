"""Policy-optimisation algorithms: pure functions on arrays, and objectives composed of them.

    objective = make('grpo', clip_high=.28)

A new objective is one file here that registers a factory; `compose.py` and `choices.py` hold what
it is put together from, `objective.py` how it is used.
"""

from __future__ import annotations

from typing import Any

from agentrl.core.registry import Registry

OBJECTIVES = Registry('objective', package='agentrl.algorithms')


def make(name: str, **options) -> Any:
  """Returns the objective of that name, an `objective.Objective`.

  Args:
    name: 'grpo', 'ppo' or any other that a module of this package registers.
    **options: Of its factory.
  Raises:
    UnknownNameError: if there is none; the known ones are listed.
    ValueError: if options cannot go together.
  Example:
    >>> make('ppo', lam=.95).needs_values
    True
  """
  return OBJECTIVES.get(name)(**options)
