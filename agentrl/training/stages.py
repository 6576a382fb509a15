"""What a run consists of: stages, each a number of steps that the loop drives, logs and saves between.

A stage holds what can be made again from the config; what cannot is in `LearnerState` and `HostState`.
"""

from __future__ import annotations

from typing import Any, Protocol

from agentrl.core import registry
from agentrl.training.state import HostState, LearnerState

STAGES: registry.Registry = registry.Registry('stage', package='agentrl.training')


class Stage(Protocol):
  """One stage; made by `STAGES.get(kind)(parts, name)`.

  Attributes:
    steps: How many there are.
  """

  steps: int

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state to start from: a new optimiser, a new reference. Not called on a resume."""

  def warm_up(self, state: LearnerState):
    """Compiles all that a step needs; changes nothing."""

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Does step number `host.stage_step` and returns the new state and metrics. The state given is consumed."""

  def result(self, host: HostState) -> dict[str, Any]:
    """Returns what the summary keeps of this stage, once its steps are done."""
