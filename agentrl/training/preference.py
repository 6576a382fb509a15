"""The preference stage: roll out, find pairs, make the preferred of each likelier."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.agents import base as agents
from agentrl.algorithms import preference as preferences
from agentrl.core import registry
from agentrl.core.types import Iteration, TrainBatch, Trajectory
from agentrl.data.iterator import TaskIterator
from agentrl.models import lora, transformer
from agentrl.rollout import gather
from agentrl.rollout.engine import Job
from agentrl.rollout.summary import summarize
from agentrl.sampling.draw import SamplingParams
from agentrl.synthesis import pairs as mining
from agentrl.training import rejected, sums
from agentrl.training.build import Parts
from agentrl.training.optimizer import make_optimizer, schedule
from agentrl.training.packing import Outcome, Plan, TokenSequence, count_tokens, pack, plan_rows
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState
from agentrl.training.step import lay_out, make_score, put

REFERENCES = ('stage', 'round')
HEAD_NOISE = 1e-3


@STAGES.register('preference')
class PreferenceStage:
  """A step is a round: it rolls out with the present policy, mines pairs, and makes `epochs` passes over them.

  The reference is the policy at the beginning of the stage or of the round; in the latter case its log-probs are those
  recorded at sampling. Pairs beyond `max_updates` updates of `pairs` each are left out, drawn at random, and counted; a
  round without a pair updates nothing.

  With `heads`, every miner's pairs go through an output layer of their own over the one trunk; the policy that samples
  and is saved has the heads' mean with the weights given there, which for linear layers is the mix of their logits.

  Source: several heads: MAH-DPO, code pearls-lab/multiobj-align.  Deviation: none known.
  """

  def __init__(self, parts: Parts, name: str):
    c, train = parts.config.preference, parts.config.train
    self._parts, self._config, self._name = parts, c, name
    self.steps = c.steps
    self._preference = preferences.make(c.loss, **c.options.to_dict())
    self._labels = sorted(c.miners)
    self._miners = [_miner(label, c.miners[label].to_dict(), parts.reward.names) for label in self._labels]
    self._mix = _mix(c.heads.to_dict(), self._labels, parts.model)
    _check(c)
    self._agent = agents.make(parts.config.agent.name, parts.environment, parts.template,
                              parts.config.agent.options.to_dict())
    self._agent.max_trajectories(c.group_size)  # refuses a size that is too small
    rate = schedule(c.schedule, c.learning_rate, c.steps * c.max_updates * c.epochs, c.warmup)
    self._optimizer = make_optimizer(c.optimizer, rate, weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm)
    per_row = train.row_length // parts.config.rollout.context_tokens
    # Pairs at their longest that a micro-batch has room for.
    held = per_row * train.micro_rows // 2
    self._micro_batches = -(-c.pairs // held) if held else 2 * c.pairs
    self._together = bool(held)
    self._mesh = mesh = parts.mesh if parts.mesh.size > 1 else None
    temperature = parts.config.rollout.temperature
    self._update = make_pair_update(parts.model, self._optimizer, self._preference, micro_batches=self._micro_batches,
                                    temperature=temperature, mesh=mesh, mix=self._mix, together=self._together)
    self._score = make_score(parts.model, micro_batches=self._micro_batches, temperature=temperature, mesh=mesh)
    self._engine = parts.engine(SamplingParams(temperature=temperature))
    self._iterator = TaskIterator(parts.train_source, c.prompts, parts.config.seed)
    self._store = parts.store('trajectories')

  @property
  def _keeps_reference(self) -> bool:
    return self._preference.needs_reference and self._config.reference == 'stage'

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state with a new optimiser and, if it is kept, the present policy as the reference."""
    host.cursor = self._iterator.start()
    side = {}
    if self._mix is not None:
      key = jax.random.fold_in(jax.random.key(self._parts.config.seed), len(self._mix))
      head = state.params['head']
      noise = HEAD_NOISE * jax.random.normal(key, (len(self._mix), *head.shape), head.dtype)
      side['heads'] = head[None] + noise
    reference = lora.snapshot(state.params) if self._keeps_reference else None
    state = LearnerState(state.params, {}, np.int32(0), reference, side)
    return state._replace(opt_state=self._optimizer.init(_trained(state)))

  def warm_up(self, state: LearnerState):
    """Compiles the sampler's shapes, the scoring pass and the update."""
    self._engine.sampler.set_params(state.params)
    self._engine.sampler.warm_up()
    batch, found, used = self._pack([])
    batch, found = put((batch, found), self._mesh)
    self._update = self._update.lower(state, batch, found, np.int32(used)).compile()
    if self._keeps_reference:
      self._score = self._score.lower(lora.restored(state.params, state.reference), batch, np.int32(used)).compile()

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Does one round."""
    started = time.perf_counter()
    trajectories = self._roll_out(state, host)
    metrics: dict[str, Any] = {**summarize(trajectories), 'seconds/rollout': time.perf_counter() - started}
    stats, timeline = self._engine.cut()
    metrics.update(stats.metrics())
    self._parts.timelines.write(host.step, self._name, timeline)
    updating = time.perf_counter()
    batches = self._batches(state, self._mine(trajectories, host, metrics), metrics)
    metrics['skipped_batches'] = int(not batches)
    scalars = []
    for _ in range(self._config.epochs):
      for batch, found, used in batches:
        state, new = self._update(state, batch, found, np.int32(used))
        scalars.append(new)
    scalars = jax.device_get(scalars)
    for i, one in enumerate(scalars):
      rejected.note(host, self._parts.workdir, batches[i % len(batches)][0], one['applied'], i)
    metrics.update({k: float(np.mean([s[k] for s in scalars])) for k in (scalars[0] if scalars else ())})
    metrics['seconds/update'] = time.perf_counter() - updating
    if host.stage_step % self._config.trajectories_every == 0 or host.stage_step == self.steps - 1:
      self._store.write(host.step, trajectories, {'stage': self._name})
    return state, metrics

  def result(self, host: HostState) -> dict[str, Any]:
    """Nothing: what it is worth the evaluation after it says."""
    return {}

  def _roll_out(self, state: LearnerState, host: HostState) -> list[Trajectory]:
    self._engine.sampler.set_params(state.params)
    self._engine.cut()
    tasks, host.cursor = self._iterator.next(host.cursor)
    first = host.cursor['epoch'] * self._config.group_size
    iteration = self._iteration(host, 'agent')
    jobs = [Job(task, first + k, task.id, program) for task in tasks for k, program in enumerate(
        self._agent.programs(task, self._config.group_size, iteration))]
    rate = functools.partial(self._parts.reward.rate, step=host.stage_step)
    trajectories = gather.collect(self._engine, jobs, own=rate, policy_version=host.stage_step)
    self._parts.reward.shape(trajectories, self._iteration(host, 'reward'))
    self._agent.learn(trajectories, iteration)
    return trajectories

  def _iteration(self, host: HostState, reader: str) -> Iteration:
    return Iteration(host.stage_step, self.steps, host.memory.setdefault(reader, {}))

  def _mine(self, trajectories: list[Trajectory], host: HostState,
            metrics: dict[str, Any]) -> list[tuple[mining.Pair, int]]:
    """Returns the pairs to train on, each with the index of its miner, in random order."""
    c, found = self._config, []
    memory = self._iteration(host, 'miners').memory
    for i, (label, miner) in enumerate(zip(self._labels, self._miners)):
      rng = np.random.default_rng([self._parts.config.seed, host.step, i])
      new = miner(trajectories, rng, Iteration(host.stage_step, self.steps, memory.setdefault(label, {})))
      found += [(pair, i) for pair in new]
      if len(self._labels) > 1:
        metrics[f'pairs/{label}'] = len(new)
    order = np.random.default_rng([self._parts.config.seed, host.step, len(self._miners)]).permutation(len(found))
    kept = [found[i] for i in order[:c.pairs * c.max_updates]]
    metrics['pairs'], metrics['pairs_left_out'] = len(found), len(found) - len(kept)
    return kept

  def _batches(self, state: LearnerState, found: list[tuple[mining.Pair, int]], metrics: dict[str, Any]):
    """Returns the updates' batches, about equally full, and counts their tokens."""
    count = -(-len(found) // self._config.pairs)
    parts = np.array_split(np.arange(len(found)), count) if count else []
    batches = [self._pack([found[i] for i in part]) for part in parts]
    metrics['trained_tokens'] = self._config.epochs * sum(count_tokens(b) for b, _, _ in batches)
    batches = [(*put((batch, pairs), self._mesh), used) for batch, pairs, used in batches]
    if not self._keeps_reference:
      return batches
    reference = lora.restored(state.params, state.reference)
    scored = lambda batch, used: put(batch._replace(
        reference_log_probs=self._score(reference, batch, np.int32(used))[0]), self._mesh)
    return [(scored(batch, used), pairs, used) for batch, pairs, used in batches]

  def _pack(self, found: list[tuple[mining.Pair, int]]) -> tuple[TrainBatch, PairBatch, int]:
    """Returns pairs as a batch of the stage's one shape: trajectory 2p is the chosen of pair p, 2p + 1 the rejected."""
    n, train = self._config.pairs, self._parts.config.train
    excerpts = [e for pair, _ in found for e in (pair.chosen, pair.rejected)]
    sequences = [_sequence(e, i) for i, e in enumerate(excerpts)]
    ones = np.ones(2 * n, np.float32)
    outcome = Outcome(np.repeat(np.arange(n, dtype=np.int32), 2), np.zeros(2 * n, np.float32), ones, ones > 0)
    share = self._parts.shares_prefixes
    plan = plan_pairs(sequences, train.micro_rows, train.row_length, share) if self._together else None
    batch, used = pack(sequences, outcome, rows=self._micro_batches * train.micro_rows, row_length=train.row_length,
                       micro_batches=self._micro_batches, plan=plan, share=share)
    if self._preference.needs_reference:
      batch = batch._replace(reference_log_probs=batch.behaviour_log_probs)
    fill = lambda values, dtype: np.concatenate([np.asarray(values, dtype), np.zeros(n - len(found), dtype)])
    return batch, PairBatch(fill([pair.weight for pair, _ in found], np.float32),
                            fill([label for _, label in found], np.int32)), used


def plan_pairs(sequences: Sequence[TokenSequence], rows: int, row_length: int, share: bool = False) -> Plan:
  """Returns the rows of micro-batches, each of `rows` rows, such that both of every pair lie in one of them.

  Args:
    sequences: Those of pair p are 2p and 2p + 1.
    rows: Of a micro-batch.
    row_length: Tokens.
    share: See `plan_rows`.
  """
  def lay_out(some):
    plan = plan_rows([sequences[i] for i in some], row_length, share)
    return [[some[k] for k in row] for row in plan.rows], plan.starts

  plan: list[list[int]] = []
  starts: list[int] = []
  own: list[int] = []
  laid, its = lay_out(own)
  for i in range(0, len(sequences), 2):
    own = [*own, i, i + 1]
    trial = lay_out(own)
    if len(trial[0]) > rows and laid:
      plan += laid + [[]] * (rows - len(laid))
      starts += its
      own = [i, i + 1]
      trial = lay_out(own)
    laid, its = trial
  return Plan(plan + laid, [*starts, *its])


class PairBatch(NamedTuple):
  """What a batch of pairs has besides its tokens.

  Attributes:
    weights: [P] float32. 0 for padding.
    labels: [P] int32. Which miner found the pair.
  """

  weights: Any
  labels: Any


def make_pair_update(config: Any, optimizer: Any, preference: preferences.Preference, *, micro_batches: int,
                     temperature: float = 1.0, mesh: jax.sharding.Mesh | None = None, mix: Any = None,
                     together: bool = False):
  """Returns a jitted `update(state, batch, pairs, used) -> (state, metrics)` that donates the state.

  Trajectories 2p and 2p + 1 of the batch are the chosen and the rejected of pair p. The loss is the mean over all pairs
  of the batch, or the mean of the means of the heads, whatever the micro-batches.

  Args:
    config: Of the policy.
    optimizer: Whose state `state.opt_state` is: of the parameters, or of `{'heads', 'policy'}` with heads.
    preference: The loss of a pair.
    micro_batches: As for `step.make_update`.
    temperature: Of the policy.
    mesh: As for `step.make_update`.
    mix: [H] float32: how the heads of `state.side['heads']` [H, V, D] make the policy's; None without heads.
    together: Whether both of each pair lie in one micro-batch, which saves a forward pass.
  Returns:
    Metrics are float32 scalars by name: 'loss', 'grad_norm', 'applied', and those of `preference.pair_loss`.
  """
  heads = 0 if mix is None else len(mix)
  outputs = _log_probs_by_head(config, temperature, heads) if heads else sums.log_probs_of(config, temperature)
  gradient = sums.make_gradient(outputs, micro_batches=micro_batches, mesh=mesh, together=together)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: LearnerState, batch: TrainBatch, found: PairBatch, used: jax.Array):
    count = batch.weights.shape[0]
    planes = sums.planes_of(batch)
    planes['label'] = jnp.where(batch.trajectory_ids < 0, 0, jnp.repeat(found.labels, 2)[batch.trajectory_ids])
    of = lambda values: preferences.sums_of_trajectories(
        jnp.where(batch.loss_mask, values, 0.0), batch.trajectory_ids, count)
    reference, tokens = sums.replicated(
        (of(batch.reference_log_probs), of(jnp.ones(batch.tokens.shape, jnp.float32))), mesh)
    even = jnp.arange(0, count, 2)
    labels = found.labels if heads else jnp.zeros_like(found.labels)
    pairs = preferences.Pairs(even, even + 1, preferences.normalised(found.weights, labels, heads or 1))
    loss = lambda totals: preferences.pair_loss(preference, totals, reference, tokens, pairs, state.updates)
    (value, metrics), grads = gradient(_trained(state), planes, count, used, loss)
    new, scalars = sums.apply_gradient(sums.Trained(_trained(state), state.opt_state, state.updates), optimizer, value,
                                       grads)
    params, side = new.params, state.side
    if heads:
      mixed = jnp.tensordot(jnp.asarray(mix, jnp.float32), new.params['heads'].astype(jnp.float32), 1)
      params = {**params['policy'], 'head': mixed.astype(params['heads'].dtype)}
      side = {**side, 'heads': new.params['heads']}
    params, opt_state = lay_out((params, new.opt_state), config, mesh)
    return state._replace(params=params, opt_state=opt_state, updates=new.updates, side=side), {**metrics, **scalars}

  return update


def _trained(state: LearnerState) -> Any:
  """The tree that the optimiser sees: the parameters, or the trunk and all heads."""
  if 'heads' not in state.side:
    return state.params
  return {'heads': state.side['heads'], 'policy': {k: v for k, v in state.params.items() if k != 'head'}}


def _log_probs_by_head(config: Any, temperature: float, heads: int) -> sums.Outputs:
  """Log-probs of each token under the head that the plane 'label' names; the trunk is run once."""
  def outputs(params, planes):
    hidden = transformer.hidden_states(params['policy'], config, *(planes[k] for k in (
        'tokens', 'positions', 'segment_ids')))
    before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    out = jnp.zeros(planes['tokens'].shape, jnp.float32)
    for h in range(heads):
      own = {**params['policy'], 'head': params['heads'][h]}
      scores = transformer.logits(own, before, temperature, config.known_tokens)
      log_probs = jnp.take_along_axis(scores, planes['tokens'][..., None], axis=-1)[..., 0]
      out = jnp.where(planes['label'] == h, log_probs - jax.nn.logsumexp(scores, axis=-1), out)
    return jnp.where(transformer.follows(planes['segment_ids']), out, 0.0)
  return outputs


def _sequence(excerpt: mining.Excerpt, index: int) -> TokenSequence:
  segment, stop = excerpt.trajectory.segments[0], excerpt.stop
  tokens = segment.tokens[:stop]
  mask = segment.sampled[:stop] & (np.arange(len(tokens)) >= excerpt.start)
  return TokenSequence(tokens, mask, segment.log_probs[:stop], segment.turns[:stop], index)


def _miner(label: str, options: dict[str, Any], parts: set[str]) -> mining.Miner:
  section = f'preference.miners.{label}'
  name = registry.pop_name(section, options)
  miner = registry.call(section, mining.MINERS.get(name), options)
  missing = sorted(set(miner.needs) - parts)
  if missing:
    raise ValueError(f'{section} reads the reward part {missing[0]!r} and cannot go with a reward that does not give '
                     f'it; parts: {", ".join(sorted(parts))}; add a shaping to reward.shapings')
  return miner


def _mix(weights: dict[str, float], labels: list[str], model: Any) -> np.ndarray | None:
  if not weights:
    return None
  if sorted(weights) != labels:
    raise ValueError(f'preference.heads={weights} must give one weight for each of preference.miners, {labels}')
  if model.tied_embeddings or model.adapted:
    raise ValueError('preference.heads gives the policy several output layers and cannot go with '
                     'model.tied_embeddings=True or adapters; set model.tied_embeddings to False, or leave heads out')
  found = np.array([weights[label] for label in labels], np.float32)
  if not np.all(np.isfinite(found)) or not found.sum() > 0:
    raise ValueError(f'preference.heads={weights} must be finite and add up to more than 0')
  return found / found.sum()


def _check(c: Any):
  if c.reference not in REFERENCES:
    raise ValueError(f'preference.reference={c.reference!r} is none of {", ".join(REFERENCES)}')
  if not len(c.miners):
    raise ValueError("preference.miners is empty, so that no pair would be found; name one, such as "
                     "{'pairs': {'name': 'ranked_pairs'}}")
  for key in ('pairs', 'max_updates', 'epochs', 'prompts'):
    if c[key] < 1:
      raise ValueError(f'preference.{key}={c[key]} must be at least 1')
  if c.group_size < 2:
    raise ValueError(f'preference.group_size={c.group_size} leaves nothing to compare; pairs are found among the '
                     'samples of one task, take at least 2')
