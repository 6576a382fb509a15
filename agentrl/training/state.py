"""The state of a run: what a resume needs, all of it saved, nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax


class LearnerState(NamedTuple):
  """The arrays of a run.

  Attributes:
    params: Of the policy, master dtype, layers stacked.
    opt_state: Of the optimiser of the present stage.
    updates: int32 scalar. Updates applied in the present stage.
    reference: Of the reference policy, what `models.lora.snapshot` keeps; None without one.
    side: What the present stage trains beside the policy, by name: further heads, critics, reward models.
  """

  params: Any
  opt_state: Any
  updates: jax.Array
  reference: Any = None
  side: Any = {}


@dataclasses.dataclass
class HostState:
  """The rest of it, in JSON.

  Attributes:
    stage: Index into the config's stages.
    stage_step: Steps of that stage done.
    step: Steps of the run done, over all stages: the x axis of every plot.
    cursor: Place in the stage's data, as the iterator wrote it.
    results: What finished stages found, by stage name.
    seconds: Wall time by phase, over all processes that worked on this run.
    totals: Sums over steps of what is counted, such as tokens, by stage and name.
    memory: What shapings, agents and memories of trajectories find again, by their kind and name.
    carried: Groups under way from one step to the next, see `agentrl.rollout.stream`; {} where there are none.
    rejected_in_a_row: Updates in a row that were not applied because they were not finite.
  """

  stage: int = 0
  stage_step: int = 0
  step: int = 0
  cursor: dict[str, Any] = dataclasses.field(default_factory=dict)
  results: dict[str, Any] = dataclasses.field(default_factory=dict)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  totals: dict[str, float] = dataclasses.field(default_factory=dict)
  memory: dict[str, Any] = dataclasses.field(default_factory=dict)
  carried: dict[str, Any] = dataclasses.field(default_factory=dict)
  rejected_in_a_row: int = 0

  def to_json(self) -> dict[str, Any]:
    """Returns a JSON-able dict that `HostState(**dict)` reads back."""
    return dataclasses.asdict(self)
