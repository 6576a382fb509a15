"""The reinforcement stage: roll out, score, pack, update."""

from __future__ import annotations

import time
from typing import Any

from absl import logging
import jax
import numpy as np

from agentrl.agents.react import react
from agentrl.core.types import TrainBatch, Trajectory
from agentrl.data.iterator import TaskIterator
from agentrl.rollout.engine import EngineStats, Job
from agentrl.rollout.store import TrajectoryStore
from agentrl.rollout.summary import summarize
from agentrl.sampling.draw import SamplingParams
from agentrl.training import rejected
from agentrl.training.build import Parts, make_objective
from agentrl.training.optimizer import make_optimizer, schedule
from agentrl.training.packing import Outcome, pack, sequences_of
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState
from agentrl.training.step import make_score, make_update


@STAGES.register('rl')
class ReinforcementStage:
  """A step rolls out `group_size` samples of each of `prompts` tasks and makes `minibatches` updates on them."""

  def __init__(self, parts: Parts, name: str):
    c, train = parts.config.rl, parts.config.train
    self._parts, self._config = parts, c
    self.steps = c.steps
    self._objective = make_objective(parts.config)
    rate = schedule(c.schedule, c.learning_rate, c.steps * c.minibatches, c.warmup)
    self._optimizer = make_optimizer(c.optimizer, rate, weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm)
    self._trajectories = c.prompts * c.group_size // c.minibatches
    # The most that trajectories at their longest could need; micro-batches beyond what is there are not run.
    per_row = train.row_length // parts.config.rollout.context_tokens
    self._micro_batches = max(1, -(-self._trajectories // (per_row * train.micro_rows)))
    self._rows = self._micro_batches * train.micro_rows
    mesh = parts.mesh if parts.mesh.size > 1 else None
    temperature = parts.config.rollout.temperature
    self._update = make_update(parts.model, self._optimizer, self._objective, micro_batches=self._micro_batches,
                               temperature=temperature, mesh=mesh)
    self._score = make_score(parts.model, micro_batches=self._micro_batches, temperature=temperature, mesh=mesh)
    self._engine = parts.engine(SamplingParams(temperature=temperature))
    self._iterator = TaskIterator(parts.train_source, c.prompts, parts.config.seed)
    self._store = TrajectoryStore(parts.workdir / 'trajectories', lambda i: parts.tokenizer.pieces([i])[0])

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state with a new optimiser and, if asked for, the present policy as the reference."""
    host.cursor = self._iterator.start()
    reference = jax.tree.map(lambda x: x.copy(), state.params) if self._config.reference else None
    return LearnerState(state.params, self._optimizer.init(state.params), np.int32(0), reference)

  def warm_up(self, state: LearnerState):
    """Compiles the sampler's shapes, the scoring pass and the update."""
    self._engine.sampler.set_params(state.params)
    self._engine.sampler.warm_up()
    batch, used = self._pack([])
    self._update = self._update.lower(state, batch, np.int32(used)).compile()
    if self._needs_scores:
      self._score = self._score.lower(state.params, batch, np.int32(used)).compile()

  @property
  def _needs_scores(self) -> bool:
    return self._objective.needs_values or self._config.reference

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Does one step; an update whose batch carries no signal is skipped and counted."""
    metrics: dict[str, Any] = {}
    clock = _Clock(metrics)
    trajectories = self._roll_out(state, host)
    clock.lap('rollout')
    for t in trajectories:
      t.rewards.update(self._parts.reward(t.task, t))
    metrics.update(summarize(trajectories))
    clock.lap('reward')
    size, updates, tokens = self._trajectories, [], 0
    for start in range(0, len(trajectories), size):
      part = trajectories[start:start + size]
      batch, used = self._pack(part)
      metrics['signal_groups'] = metrics.get('signal_groups', 0) + _groups_with_signal(part)
      if not self._has_signal(batch):
        metrics['skipped_batches'] = metrics.get('skipped_batches', 0) + 1
        continue
      batch = self._add_scores(state, batch, used)
      state, scalars = self._update(state, batch, np.int32(used))
      updates.append((scalars, batch))
      tokens += int((batch.segment_ids > 0).sum())
    metrics.update(_update_metrics([jax.device_get(s) for s, _ in updates]))
    self._check(host, metrics, [b for _, b in updates])
    clock.lap('update')
    metrics['tokens_per_second/update'] = tokens / max(1e-9, metrics['seconds/update'])
    metrics['trained_tokens'] = tokens
    stats = self._engine.stats
    metrics['tokens_per_second/decode'] = stats.decoded_tokens / max(1e-9, stats.total_seconds)
    metrics['decoded_tokens'] = stats.decoded_tokens
    if host.stage_step % self._config.trajectories_every == 0 or host.stage_step == self.steps - 1:
      self._store.write(host.step, trajectories, {'advantages': _advantages(trajectories)})
      clock.lap('store')
    return state, metrics

  def result(self, host: HostState) -> dict[str, Any]:
    """Nothing: what it is worth the evaluation after it says."""
    return {}

  def _roll_out(self, state: LearnerState, host: HostState) -> list[Trajectory]:
    tasks, host.cursor = self._iterator.next(host.cursor)
    program = lambda task: react(self._parts.environment, self._parts.template, task)
    epoch = host.cursor['epoch']
    jobs = [Job(task, epoch * self._config.group_size + k, task.id, program(task))
            for task in tasks for k in range(self._config.group_size)]
    self._engine.sampler.set_params(state.params)
    self._engine.stats = EngineStats()
    return self._engine.collect(jobs, policy_version=host.stage_step)

  def _pack(self, trajectories: list[Trajectory]) -> tuple[TrainBatch, int]:
    """Returns trajectories as a batch of the stage's one shape."""
    n = self._trajectories
    groups = {g: i for i, g in enumerate(dict.fromkeys(t.group_id for t in trajectories))}
    outcome = Outcome(np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, bool))
    for i, t in enumerate(trajectories):
      outcome.group_ids[i] = groups[t.group_id]
      outcome.rewards[i] = t.rewards['total']
      outcome.weights[i] = 1.0
      outcome.baseline_mask[i] = True
    sequences = sequences_of(trajectories)
    if self._config.drop_without_signal:
      dull = _without_signal(trajectories)
      outcome.weights[[i for i, t in enumerate(trajectories) if t.group_id in dull]] = 0.0
      sequences = [s for s in sequences if outcome.weights[s.trajectory] > 0]
    return pack(sequences, outcome, rows=self._rows, row_length=self._parts.config.train.row_length,
                channels=len(self._objective.channels), micro_batches=self._micro_batches)

  def _has_signal(self, batch: TrainBatch) -> bool:
    """Whether an update could learn anything: a group method needs rewards that differ within a group."""
    if not batch.loss_mask.any():
      return False
    if self._objective.min_group < 2 or self._config.reference:
      return True
    kept = batch.weights > 0
    # A reward that is not a number is no lack of signal: the update refuses it, and says so.
    return any(np.ptp(batch.rewards[kept & (batch.group_ids == g)]) != 0 for g in np.unique(batch.group_ids[kept]))

  def _add_scores(self, state: LearnerState, batch: TrainBatch, used: int) -> TrainBatch:
    if self._objective.needs_values:
      batch = batch._replace(values=self._score(state.params, batch, np.int32(used))[1])
    if self._config.reference:
      batch = batch._replace(reference_log_probs=self._score(state.reference, batch, np.int32(used))[0])
    return batch

  def _check(self, host: HostState, metrics: dict[str, Any], batches: list[TrainBatch]):
    """Counts updates that were refused, and complains where sampler and learner disagree."""
    for i, (batch, applied) in enumerate(zip(batches, metrics.pop('applied_each', []))):
      rejected.note(host, self._parts.workdir, batch, applied, i)
    gap = metrics.get('log_prob_gap_max', 0.0)
    if gap > self._config.log_prob_tolerance:
      logging.error('Step %d: log-probs of sampler and learner differ by up to %.2e nats, more than '
                    'rl.log_prob_tolerance=%.0e', host.step, gap, self._config.log_prob_tolerance)


class _Clock:
  """Writes the seconds since the last lap into metrics."""

  def __init__(self, metrics: dict[str, Any]):
    self._metrics, self._last = metrics, time.perf_counter()

  def lap(self, phase: str):
    now = time.perf_counter()
    self._metrics[f'seconds/{phase}'] = now - self._last
    self._last = now


def _update_metrics(scalars: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns means over the updates of a step; agreement with the sampler is that of the first, before any drift."""
  if not scalars:
    return {}
  out = {name: float(np.mean([s[name] for s in scalars])) for name in scalars[0]}
  for name in ('log_prob_gap', 'log_prob_gap_max', 'policy/ratio_max'):
    if name in scalars[0]:
      out[name] = float(scalars[0][name])
  out['loss'] = out.pop('loss/total')
  return {**out, 'applied_each': [bool(s['applied']) for s in scalars]}


def _without_signal(trajectories: list[Trajectory]) -> set[str]:
  """Returns the groups whose rewards are all equal."""
  rewards: dict[str, list[float]] = {}
  for t in trajectories:
    rewards.setdefault(t.group_id, []).append(t.rewards['total'])
  return {g for g, r in rewards.items() if min(r) == max(r)}


def _groups_with_signal(trajectories: list[Trajectory]) -> int:
  return len({t.group_id for t in trajectories}) - len(_without_signal(trajectories))


def _advantages(trajectories: list[Trajectory]) -> list[float]:
  """Returns reward minus the group's mean, for the viewer."""
  groups: dict[str, list[float]] = {}
  for t in trajectories:
    groups.setdefault(t.group_id, []).append(t.rewards['total'])
  return [t.rewards['total'] - float(np.mean(groups[t.group_id])) for t in trajectories]
