"""The reinforcement stage: roll out, score, pack, update."""

from __future__ import annotations

from typing import Any, Sequence

from absl import logging
import jax
import numpy as np

from agentrl.algorithms.objective import Objective
from agentrl.algorithms.selectors import Selection
from agentrl.core.types import TrainBatch, Trajectory
from agentrl.experience.base import REPLAYED
from agentrl.models import lora
from agentrl.rollout.summary import summarize
from agentrl.sharding import exchange
from agentrl.training import rejected
from agentrl.training.build import Parts, make_objective
from agentrl.training.collect import Clock, Collector, group_ids
from agentrl.training.optimizer import make_optimizer, schedule
from agentrl.training.packing import TOKEN_PARTS, MaskRows, Outcome, count_tokens, pack, sequences_of
from agentrl.training.side import base as sides
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState
from agentrl.training.step import make_estimate, make_score, make_update, put


@STAGES.register('rl')
class ReinforcementStage:
  """A step rolls out `group_size` samples of each of `prompts` tasks and makes `epochs` x `minibatches` updates."""

  def __init__(self, parts: Parts, name: str):
    c, train = parts.config.rl, parts.config.train
    self._parts, self._config = parts, c
    self.steps = c.steps
    self._objective = make_objective(parts.config)
    self._collector = Collector(parts)
    names = self._collector.names
    self._sides = {label: sides.make(label, options.to_dict()) for label, options in c.side.items()}
    for label, side in self._sides.items():
      if side.needs_reference and not c.reference:
        raise ValueError(f'rl.side.{label} reads the log-probs of a reference and cannot go with rl.reference=False; set '
                         'that to True, or leave it out')
    self._part_names, self._token_part_names = _named_parts(
        self._objective, list(self._sides.values()), names, parts.reward.turn_names)
    rate = schedule(c.schedule, c.learning_rate, c.steps * c.minibatches * c.epochs, c.warmup)
    self._optimizer = make_optimizer(c.optimizer, rate, weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm)
    self._trajectories = self._collector.most_trajectories()
    # The most that trajectories at their longest could need; micro-batches beyond what is there are not run.
    per_row = train.row_length // parts.config.rollout.context_tokens
    sequences = self._trajectories * self._collector.agent.max_segments
    self._micro_batches = max(1, -(-sequences // (per_row * train.micro_rows)))
    self._rows = self._micro_batches * train.micro_rows
    self._mesh = mesh = parts.mesh if parts.mesh.size > 1 else None
    temperature = parts.config.rollout.temperature
    self._mask_rows = train.mask_rows
    self._make_steps()
    for side in self._sides.values():
      side.bind(sides.Setting(parts.model, self._micro_batches, temperature, mesh))
    self._store = parts.store('trajectories')

  def _make_steps(self):
    model, settings = self._parts.model, dict(
        micro_batches=self._micro_batches, temperature=self._parts.config.rollout.temperature, mesh=self._mesh)
    self._update = make_update(model, self._optimizer, self._objective, estimated=self._config.minibatches > 1, **settings)
    self._estimate = make_estimate(self._objective)
    self._score = make_score(model, **settings)

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state with a new optimiser and, if asked for, the present policy as the reference."""
    self._collector.begin(host)
    reference = lora.snapshot(state.params) if self._config.reference else None
    side = {label: side.begin(state.params) for label, side in self._sides.items()}
    return LearnerState(state.params, self._optimizer.init(state.params), np.int32(0), reference, side)

  def warm_up(self, state: LearnerState):
    """Compiles the sampler's shapes, the scoring pass and the update."""
    self._collector.warm_up(state.params)
    batch, used = self._pack([])
    if self._config.minibatches > 1:
      self._estimate = self._estimate.lower([batch] * self._config.minibatches, np.int32(0)).compile()
    batch = put(batch, self._mesh)
    if self._config.minibatches > 1:
      exchange.to_host(batch)
    self._update = self._update.lower(state, batch, np.int32(used)).compile()
    if self._needs_scores:
      self._score = self._score.lower(state.params, batch, np.int32(used)).compile()
    for label, side in self._sides.items():
      side.warm_up(state.side[label], batch, used)

  @property
  def _needs_scores(self) -> bool:
    return self._objective.needs_values or self._config.reference or self._config.recompute_behaviour

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Does one step; an update whose batch carries no signal is skipped and counted."""
    metrics: dict[str, Any] = {}
    clock = Clock(metrics)
    state, trajectories, batches = self.prepare(state, host, metrics, clock)
    scalars = []
    for _ in range(self._config.epochs):
      for batch, used in batches:
        state, found = self._update(state, batch, np.int32(used))
        scalars.append(found)
    metrics.update(_update_metrics([jax.device_get(s) for s in scalars]))
    self._check(host, metrics, [batch for _ in range(self._config.epochs) for batch, _ in batches])
    clock.lap('update')
    metrics['tokens_per_second/update'] = metrics['trained_tokens'] / max(1e-9, metrics['seconds/update'])
    self._collector.save(host)
    if host.stage_step % self._config.trajectories_every == 0 or host.stage_step == self.steps - 1:
      self._store.write(host.step, trajectories, {'advantages': _advantages(trajectories)})
    clock.lap('store')
    return state, metrics

  def prepare(self, state: LearnerState, host: HostState, metrics: dict[str, Any],
              clock: Clock) -> tuple[LearnerState, list[Trajectory], list[tuple[TrainBatch, int]]]:
    """Does all of a step but its updates.

    Returns:
      The state, in which only what is trained beside the policy has changed; the trajectories; and the batches to update
      on, their groups in the order in which they first occur among those, each with the number of its micro-batches that
      hold anything, and, if there are several, with their advantages.
    """
    trajectories, kept = self._collector.collect(state.params, host, metrics, clock)
    metrics.update(summarize([t for t in trajectories if not (t.rewards.get(REPLAYED) or t.loss_from)]))
    metrics['signal_groups'] = _groups_with_signal(trajectories)
    metrics['trained_tokens'], batches = 0, []
    for part in _minibatches(trajectories, self._config.minibatches):
      batch, used = self._pack([trajectories[i] for i in part], Selection(*(x[part] for x in kept)), host.stage_step)
      signal = self._has_signal(batch)
      if signal:
        metrics['trained_tokens'] += self._config.epochs * count_tokens(batch)
        batch = self._add_scores(state, put(batch, self._mesh), used)
        state, batch = self._ask_sides(state, batch, used, host, metrics)
      else:
        metrics['skipped_batches'] = metrics.get('skipped_batches', 0) + 1
      batches.append((batch, used, signal))
    return state, trajectories, self._estimated(state, batches)

  def result(self, host: HostState) -> dict[str, Any]:
    """Nothing: what it is worth the evaluation after it says."""
    return {}

  def _pack(self, trajectories: list[Trajectory], kept: Selection | None = None,
            step: int = 0) -> tuple[TrainBatch, int]:
    """Returns trajectories as a batch of the stage's one shape."""
    n, given = self._trajectories, len(trajectories)
    if given > n:
      raise RuntimeError(f'{given} trajectories came where {self._config.prompts} groups may have {n}: '
                         f'max_trajectories of agent {self._parts.config.agent.name!r} or max_replayed of memory '
                         f'{self._collector.memory_name!r} is too low')
    fill = lambda values, dtype: np.concatenate([np.asarray(values, dtype), np.zeros(n - given, dtype)])
    kept = kept or Selection(np.ones(given, np.float32), np.ones(given, bool))
    part = lambda name: fill([t.rewards.get(name, 0.0) for t in trajectories], np.float32)
    outcome = Outcome(fill(group_ids(trajectories), np.int32), part('total'), fill(kept.weights, np.float32),
                      fill(kept.baseline_mask, bool), {name: part(name) for name in self._part_names})
    sequences = [s for s in sequences_of(trajectories, self._token_part_names, step)
                 if outcome.weights[s.trajectory] > 0]
    constrained = self._parts.config.rollout.constrain
    batch, used = pack(sequences, outcome, rows=self._rows, row_length=self._parts.config.train.row_length,
                       channels=len(self._objective.channels), micro_batches=self._micro_batches,
                       share=self._parts.shares_prefixes, token_part_names=self._token_part_names, step=step,
                       masks=MaskRows(self._parts.model.vocab_size, self._mask_rows) if constrained else None)
    if constrained and len(batch.masks) > self._mask_rows:
      logging.warning('A batch has more than train.mask_rows=%d distinct masks: its steps are compiled anew for %d',
                      self._mask_rows, len(batch.masks))
      self._mask_rows = len(batch.masks)
      self._make_steps()
    to_come = {name: np.zeros(batch.tokens.shape, np.float32) for side in self._sides.values()
               for name in side.turn_names}
    return batch._replace(token_parts={**batch.token_parts, **to_come}), used

  def _has_signal(self, batch: TrainBatch) -> bool:
    """Whether an update could learn anything: a group method needs rewards that differ within a group."""
    if not batch.loss_mask.any():
      return False
    if self._objective.min_group < 2 or self._objective.regularisers or batch.parts or batch.token_parts:
      return True
    kept = batch.weights > 0
    # A reward that is not a number is no lack of signal: the update refuses it, and says so.
    return any(np.ptp(batch.rewards[kept & (batch.group_ids == g)]) != 0 for g in np.unique(batch.group_ids[kept]))

  def _add_scores(self, state: LearnerState, batch: TrainBatch, used: int) -> TrainBatch:
    if self._objective.needs_values or self._config.recompute_behaviour:
      log_probs, values = self._score(state.params, batch, np.int32(used))
      if self._objective.needs_values:
        batch = batch._replace(values=values)
      if self._config.recompute_behaviour:
        batch = batch._replace(behaviour_log_probs=log_probs)
    if self._config.reference:
      reference = lora.restored(state.params, state.reference)
      batch = batch._replace(reference_log_probs=self._score(reference, batch, np.int32(used))[0])
    return put(batch, self._mesh)

  def _estimated(self, state: LearnerState, batches: list[tuple[TrainBatch, int, bool]]) -> list[tuple[TrainBatch, int]]:
    """Returns the batches with a signal; where there are several, with what was estimated from all of them."""
    if len(batches) > 1:
      found = self._estimate(*exchange.to_host(([batch for batch, _, _ in batches], state.updates)))
      batches = [(put(batch._replace(advantages=a, returns=r), self._mesh), used, signal)
                 for (batch, used, signal), (a, r) in zip(batches, jax.device_get(found))]
    return [(batch, used) for batch, used, signal in batches if signal]

  def _ask_sides(self, state: LearnerState, batch: TrainBatch, used: int, host: HostState,
                 metrics: dict[str, Any]) -> tuple[LearnerState, TrainBatch]:
    """Lets what is trained beside the policy learn from a batch and score it."""
    for label, side in self._sides.items():
      trained, parts, found = side.learn(state.side[label], batch, used)
      batch = put(batch._replace(token_parts={**batch.token_parts, **parts}), self._mesh)
      state = state._replace(side={**state.side, label: trained})
      metrics.update({f'{label}/{name}': float(value) for name, value in found.items()})
      if not found.get('applied', 1):
        rejected.note(host, self._parts.workdir, batch, False, label)
    return state, batch

  def _check(self, host: HostState, metrics: dict[str, Any], batches: list[TrainBatch]):
    """Counts updates that were refused, and complains where sampler and learner disagree."""
    for i, (batch, applied) in enumerate(zip(batches, metrics.pop('applied_each', []))):
      rejected.note(host, self._parts.workdir, batch, applied, i)
    gap = metrics.get('log_prob_gap_max', 0.0)
    # What was kept from earlier steps was sampled by an earlier policy.
    older = self._collector.memory or (self._config.staleness and not self._config.recompute_behaviour)
    if gap > self._config.log_prob_tolerance and not older:
      logging.error('Step %d: log-probs of sampler and learner differ by up to %.2e nats, more than '
                    'rl.log_prob_tolerance=%.0e', host.step, gap, self._config.log_prob_tolerance)


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


def _named_parts(objective: Objective, sides_: Sequence[sides.SideModel], parts: set[str],
                 turn_parts: set[str]) -> tuple[list[str], list[str]]:
  """Returns the parts of trajectories and of tokens that the objective and the side models read.

  Raises:
    ValueError: if nothing gives one.
  """
  to_come = {name for side in sides_ for name in side.turn_names}
  read = sorted({*objective.reads, *(name for side in sides_ for name in (*side.needs, *side.turn_needs))} - to_come)
  of_tokens = [name for name in read if name in TOKEN_PARTS or name in turn_parts]
  of_trajectories = [name for name in read if name not in of_tokens]
  missing = sorted(set(of_trajectories) - parts)
  if missing:
    known = ', '.join(sorted(parts | turn_parts | to_come | set(TOKEN_PARTS)))
    raise ValueError(f'objective {objective.name!r}, or what rl.side trains beside it, reads the reward part '
                     f'{missing[0]!r} and cannot go with a reward that does not give it; take a part it gives '
                     f'({known}), or add a shaping to reward.shapings')
  return of_trajectories, of_tokens


def _minibatches(trajectories: list[Trajectory], count: int) -> list[np.ndarray]:
  """Returns `count` runs of whole groups, about equally long, as indices."""
  runs: list[list[int]] = [[] for _ in range(count)]
  target, at, last = -(-len(trajectories) // count), 0, None
  order = np.argsort(group_ids(trajectories), kind='stable')
  groups = group_ids(trajectories)
  for i in order:
    if groups[i] != last and len(runs[at]) >= target:
      at += 1
    runs[at].append(int(i))
    last = groups[i]
  return [np.array(run, np.int64) for run in runs]


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
