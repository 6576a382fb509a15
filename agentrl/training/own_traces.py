"""Imitation of what the run itself did right, between two stages of reinforcement."""

from __future__ import annotations

from typing import Any

import numpy as np

from agentrl.rollout import store
from agentrl.training.build import Parts
from agentrl.training.packing import TokenSequence, plan_rows, sequences_of
from agentrl.training.sft import SupervisedStage
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState


@STAGES.register('own_traces')
class OwnTracesStage(SupervisedStage):
  """As the stage 'sft', on the latest right trajectories that the 'rl' stages before it stored.

  What was drawn is in the loss, and nothing else. Where there is none, its steps change nothing. How many there are
  depends on `rl.trajectories_every`: 1 stores them all.
  """

  section = 'own_traces'

  def __init__(self, parts: Parts, name: str):
    super().__init__(parts, name)
    part, known = self._config.part, parts.reward.names
    if part not in known:
      raise ValueError(f'own_traces.part={part!r} is no part of the reward; parts: {", ".join(sorted(known))}')

  def _find(self) -> list[TokenSequence]:
    """Returns nothing: what there is to imitate is yet to be drawn."""
    return []

  def _lay_out(self, sequences: list[TokenSequence]):
    """Puts sequences into rows, repeated until they fill an update."""
    self._sequences, self._rows = sequences, []
    if sequences:
      rows = plan_rows(sequences, self._parts.config.train.row_length).rows
      self._rows = rows * -(-self._config.batch_rows // len(rows))

  def warm_up(self, state: LearnerState):
    """Reads the trajectories and compiles the update."""
    self._lay_out(self._traces())
    if self._rows:
      super().warm_up(state)

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Makes `updates_per_step` updates."""
    if not self._rows:
      return state, {'traces': 0}
    state, metrics = super().step(state, host)
    return state, {**metrics, 'traces': len(self._sequences)}

  def _traces(self) -> list[TokenSequence]:
    """Returns the right trajectories, the latest first, each sequence of tokens once."""
    right: dict[bytes, Any] = {}
    for path in reversed(store.list_paths(self._parts.workdir / 'trajectories')):
      stored = store.read(path)
      # Evaluations are of held-out tasks, and name their stage.
      if 'stage' not in stored.extra and len(right) < self._config.most:
        good = (t for t in stored.trajectories if t.rewards.get(self._config.part, 0.0) >= 1)
        right.update({b''.join(s.tokens.tobytes() for s in t.segments): t for t in good})
    sequences = sequences_of(list(right.values())[:self._config.most])
    return [s._replace(log_probs=np.zeros(len(s.tokens), np.float32), trajectory=i) for i, s in enumerate(sequences)]
