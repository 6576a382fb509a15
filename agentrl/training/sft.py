"""The supervised stage: imitation of the demonstrations, packed."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from agentrl.algorithms.supervised import supervised
from agentrl.core.types import TrainBatch
from agentrl.training import demonstrations
from agentrl.training import rejected
from agentrl.training.build import Parts
from agentrl.training.optimizer import make_optimizer, schedule
from agentrl.training.packing import Outcome, Plan, TokenSequence, count_tokens, pack, plan_rows
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState
from agentrl.training.step import make_update, put


@STAGES.register('sft')
class SupervisedStage:
  """A step is `updates_per_step` updates on `batch_rows` packed rows each; the order follows from seed and epoch.

  Attributes:
    section: Of the config.
  """

  section = 'sft'

  def __init__(self, parts: Parts, name: str):
    c = parts.config[self.section]
    self._parts, self._config = parts, c
    self.steps = c.steps
    rate = schedule(c.schedule, c.learning_rate, c.steps * c.updates_per_step, c.warmup)
    self._optimizer = make_optimizer(c.optimizer, rate, weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm)
    self._micro_batches = max(1, c.batch_rows // parts.config.train.micro_rows)
    self._mesh = parts.mesh if parts.mesh.size > 1 else None
    self._update = make_update(parts.model, self._optimizer, supervised(), micro_batches=self._micro_batches,
                               mesh=self._mesh)
    self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
    self._lay_out(self._find())

  def _find(self) -> list[TokenSequence]:
    """Returns what there is to imitate when the run starts."""
    parts = self._parts
    return demonstrations.tokenize(parts.demonstrations(), parts.template, parts.schemas, parts.config.train.row_length)

  def _lay_out(self, sequences: list[TokenSequence]):
    """Puts sequences into rows; refuses too few of them."""
    self._sequences = sequences
    self._rows = plan_rows(sequences, self._parts.config.train.row_length).rows
    if len(self._rows) < self._config.batch_rows:
      raise ValueError(f'{len(sequences)} demonstrations fill {len(self._rows)} rows, fewer than '
                       f'sft.batch_rows={self._config.batch_rows}; raise sft.traces or lower sft.batch_rows')

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state with a new optimiser."""
    return state._replace(opt_state=self._optimizer.init(state.params), updates=np.int32(0), reference=None)

  def warm_up(self, state: LearnerState):
    """Compiles the update."""
    self._update = self._update.lower(state, put(self._batch(0), self._mesh), np.int32(self._micro_batches)).compile()

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Makes `updates_per_step` updates."""
    started = time.perf_counter()
    n, tokens, metrics = self._config.updates_per_step, 0, []
    for i in range(host.stage_step * n, (host.stage_step + 1) * n):
      batch = self._batch(i)
      tokens += count_tokens(batch)
      state, scalars = self._update(state, put(batch, self._mesh), np.int32(self._micro_batches))
      metrics.append(scalars)
    metrics = jax.device_get(metrics)
    for i, scalars in enumerate(metrics):
      batch = None if scalars['applied'] else self._batch(host.stage_step * n + i)
      rejected.note(host, self._parts.workdir, batch, scalars['applied'], i)
    mean = lambda name: float(np.mean([m[name] for m in metrics]))
    seconds = time.perf_counter() - started
    # Demonstrations have behaviour log-probs of 0, so the distance from those is the negative log-likelihood.
    return state, {'loss': mean('log_prob_gap'), 'grad_norm': mean('grad_norm'), 'applied': mean('applied'),
                   'trained_tokens': tokens, 'seconds/update': seconds, 'tokens_per_second': tokens / seconds}

  def result(self, host: HostState) -> dict[str, Any]:
    """Nothing: what it is worth the evaluation after it says."""
    return {}

  def _batch(self, update: int) -> TrainBatch:
    """Returns the rows of one update."""
    rows = self._config.batch_rows
    epoch, at = divmod(update, len(self._rows) // rows)
    if self._order[0] != epoch:
      rng = np.random.default_rng([self._parts.config.seed, epoch])
      self._order = epoch, rng.permutation(len(self._rows))
    plan = [self._rows[r] for r in self._order[1][at * rows:(at + 1) * rows]]
    members = [i for row in plan for i in row]
    index = {i: k for k, i in enumerate(members)}
    n = rows * max(len(row) for row in self._rows)  # the same for every batch: one shape
    ones = np.ones(n, np.float32)
    outcome = Outcome(np.zeros(n, np.int32), ones, ones, ones > 0)
    sequences = [self._sequences[i]._replace(trajectory=index[i]) for i in members]
    batch, _ = pack(sequences, outcome, rows=rows, row_length=self._parts.config.train.row_length,
                    micro_batches=self._micro_batches, plan=Plan([[index[i] for i in row] for row in plan]))
    return batch
