"""The offline value stage: a log of a frozen policy, critics on its hidden states, imitation of the best action."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.agents.react import react
from agentrl.algorithms import offline_q
from agentrl.algorithms.supervised import supervised
from agentrl.core.types import Iteration, Status, Trajectory
from agentrl.data.iterator import TaskIterator
from agentrl.models import transformer
from agentrl.rollout import gather
from agentrl.rollout.engine import Job
from agentrl.rollout.summary import summarize
from agentrl.sampling.draw import SamplingParams
from agentrl.sharding import mesh as meshes
from agentrl.training import rejected, sums
from agentrl.training.build import Parts
from agentrl.training.optimizer import make_optimizer, schedule
from agentrl.training.packing import Outcome, TokenSequence, count_tokens, pack
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState
from agentrl.training.step import make_update, put

# Samples that only offer an action are numbered from here on, so that no draw repeats one of the log.
_OFFERS = 1 << 33


class _Log(NamedTuple):
  """What is known of each logged turn; M turns, N actions, F features.

  Attributes:
    contexts: Tokens before each turn.
    actions: Tokens of each action offered there, the logged one first.
    states: [M, F] float32.
    offers: [M, N, F] float32. Features of the state with each action.
    offered: [M, N] bool.
    draws: [M, N] int32. How many of the actions offered there are the same one.
    rewards: [M] float32.
    next_states: [M, F] float32.
    done: [M] bool.
  """

  contexts: list[np.ndarray]
  actions: list[list[np.ndarray]]
  states: np.ndarray
  offers: np.ndarray
  offered: np.ndarray
  draws: np.ndarray
  rewards: np.ndarray
  next_states: np.ndarray
  done: np.ndarray


@STAGES.register('offline_q')
class OfflineQStage:
  """The first step writes the log; `critic_steps` steps train critics on it, `actor_steps` imitate what they favour.

  The log is of the policy as it is when the stage begins, kept as the reference: its hidden states at the ends of
  contexts and of actions are the features, and it draws the `actions` - 1 actions that are offered beside the logged
  one. The reward of a trajectory is that of its last turn.

  An action that was hardly ever drawn is one that the critics have not seen: of 16, the one of largest advantage is
  then likely the most overestimated. `least_draws` sets how often one must be drawn there to be imitated.

  Source: Digi-Q, code DigiRL-agent/digiq: 16 actions, gamma 0.95, targets moved by 0.1 an epoch, critic 1e-5, actor
    1e-4, gradients clipped at 0.01.  Deviation: an epoch is a step; offers come from the logging policy, and `least_draws`
    above 1, our choices.
  """

  def __init__(self, parts: Parts, name: str):
    c, train = parts.config.offline_q, parts.config.train
    for key in ('critic_steps', 'actor_steps', 'prompts', 'group_size', 'turns', 'batch', 'least_draws'):
      if c[key] < 1:
        raise ValueError(f'offline_q.{key}={c[key]} must be at least 1')
    if c.actions < 2:
      raise ValueError(f'offline_q.actions={c.actions} leaves no choice but the logged action; take at least 2')
    if not (0.0 <= c.gamma <= 1.0 and 0.0 < c.target_rate <= 1.0):
      raise ValueError(f'offline_q.gamma={c.gamma} must lie in [0, 1] and target_rate={c.target_rate} in (0, 1]')
    self._parts, self._config, self._name = parts, c, name
    self.steps = c.critic_steps + c.actor_steps
    self._critic_optimizer = make_optimizer('adamw', c.critic_learning_rate, max_grad_norm=c.critic_max_grad_norm)
    rate = schedule(c.schedule, c.learning_rate, c.actor_steps, c.warmup)
    self._optimizer = make_optimizer(c.optimizer, rate, max_grad_norm=c.max_grad_norm)
    per_row = train.row_length // parts.config.rollout.context_tokens
    self._micro_batches = max(1, -(-c.batch // (per_row * train.micro_rows)))
    self._mesh = parts.mesh if parts.mesh.size > 1 else None
    self._update = make_update(parts.model, self._optimizer, supervised(), micro_batches=self._micro_batches,
                               temperature=parts.config.rollout.temperature, mesh=self._mesh)
    self._critic_update = jax.jit(functools.partial(
        _critic_epoch, self._critic_optimizer, c.gamma, c.target_rate, parts.mesh), donate_argnums=0)
    everywhere = meshes.replicated(parts.mesh)
    self._hidden = jax.jit(functools.partial(_hidden, parts.model), out_shardings=everywhere)
    self._best = jax.jit(functools.partial(offline_q.best_actions, threshold=c.threshold), out_shardings=everywhere)
    self._engine = parts.engine(SamplingParams(temperature=parts.config.rollout.temperature))
    self._iterator = TaskIterator(parts.train_source, c.prompts, parts.config.seed)
    self._store = parts.store('offline_log')
    self._log: _Log | None = None

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state with new optimisers and critics, and the present policy as the reference."""
    host.cursor = self._iterator.start()
    key = jax.random.fold_in(jax.random.key(self._parts.config.seed), self.steps)
    critics = offline_q.init_critics(key, self._parts.model.width, self._config.hidden)
    side = {'critics': sums.Trained(critics, self._critic_optimizer.init(critics), np.int32(0)),
            'targets': jax.tree.map(jnp.array, critics)}
    # Small enough for every device to hold them whole.
    side = jax.device_put(side, meshes.replicated(self._parts.mesh))
    reference = jax.tree.map(jnp.array, state.params)
    return LearnerState(state.params, self._optimizer.init(state.params), np.int32(0), reference, side)

  def warm_up(self, state: LearnerState):
    """Compiles the sampler's shapes, the features and the updates."""
    c, width = self._config, self._parts.model.width
    self._engine.sampler.set_params(state.reference)
    self._engine.sampler.warm_up()
    zeros = lambda *shape: np.zeros(shape, np.float32)
    self._hidden = self._hidden.lower(state.reference, np.zeros(self._shape, np.int32)).compile()
    side = state.side
    self._critic_update = self._critic_update.lower(
        (side['critics'], side['targets']), self._batches(np.random.default_rng(0)), zeros(c.turns, width),
        zeros(c.turns, width), zeros(c.turns), zeros(c.turns, width), np.zeros(c.turns, bool)).compile()
    self._best = self._best.lower(side['critics'].params, zeros(c.turns, width), zeros(c.turns, c.actions, width),
                                  np.zeros((c.turns, c.actions), bool)).compile()
    batch, used = self._pack([], np.zeros(0, np.float32))
    self._update = self._update.lower(state, put(batch, self._mesh), np.int32(used)).compile()

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Does one step of the critics or of the actor."""
    started = time.perf_counter()
    metrics: dict[str, Any] = {}
    if self._log is None:
      self._log = self._read_or_write(state, host, metrics)
    log = self._log
    rng = np.random.default_rng([self._parts.config.seed, host.stage_step])
    updating = time.perf_counter()
    if host.stage_step < self._config.critic_steps:
      (critics, targets), found = self._critic_update(
          (state.side['critics'], state.side['targets']), self._batches(rng), log.states, log.offers[:, 0], log.rewards,
          log.next_states, log.done)
      state = state._replace(side={'critics': critics, 'targets': targets})
      metrics['trained_tokens'] = 0
    else:
      best, weights = jax.device_get(self._best(
          state.side['critics'].params, log.states, log.offers, log.offered & (log.draws >= self._config.least_draws)))
      good = np.flatnonzero(weights > 0)
      chosen = rng.permutation(good)[:self._config.batch]
      metrics['imitated'] = len(good)
      metrics['changed'] = float(np.mean(best[good] > 0)) if len(good) else 0.0
      found = {}
      if len(chosen):
        batch, used = self._pack([(log.contexts[i], log.actions[i][best[i]]) for i in chosen], weights[chosen])
        state, found = self._update(state, put(batch, self._mesh), np.int32(used))
        rejected.note(host, self._parts.workdir, batch, found['applied'])
        found = {**found, 'loss': found['loss/total']}
        metrics['trained_tokens'] = count_tokens(batch)
    metrics.update({k: float(v) for k, v in jax.device_get(found).items()})
    now = time.perf_counter()
    metrics['seconds/update'], metrics['seconds/rollout'] = now - updating, updating - started
    return state, metrics

  def result(self, host: HostState) -> dict[str, Any]:
    """Nothing: what it is worth the evaluation after it says."""
    return {}

  @property
  def _shape(self) -> tuple[int, int]:
    return self._parts.config.train.micro_rows, self._parts.config.rollout.context_tokens

  # ---- the log ----------------------------------------------------------------------------------

  def _read_or_write(self, state: LearnerState, host: HostState, metrics: dict[str, Any]) -> _Log:
    """Returns the log, collected at the first step and read back where a run goes on."""
    self._engine.sampler.set_params(state.reference)
    if host.stage_step:
      return self._features(state, self._store.read_step(0), self._store.read_step(1))
    self._engine.cut()
    tasks, host.cursor = self._iterator.next(host.cursor)
    parts, c = self._parts, self._config
    logged = gather.collect(self._engine, [Job(task, k, task.id, react(parts.environment, parts.template, task))
                                           for task in tasks for k in range(c.group_size)], own=parts.reward.rate)
    parts.reward.shape(logged, Iteration(0, self.steps, host.memory.setdefault('reward', {})))
    self._store.write(0, logged)
    offer = lambda t, turn: _offer(t.segments[0].tokens[:turn.start], self._stops)
    offers = gather.collect(self._engine, [
        Job(t.task, _OFFERS + m * c.actions + k, t.task.id, offer(t, turn))
        for m, (t, turn) in enumerate(self._turns(logged)) for k in range(c.actions - 1)])
    self._store.write(1, offers)
    metrics.update(summarize(logged))
    stats, timeline = self._engine.cut()
    metrics.update(stats.metrics())
    parts.timelines.write(host.step, 'offline_q', timeline)
    return self._features(state, logged, offers)

  @property
  def _stops(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*self._parts.environment.stops, *self._parts.template.stops)))

  def _turns(self, logged: list[Trajectory]):
    """Returns the logged turns that are learned from: the first `turns` of them."""
    found = [(t, turn) for t in logged for turn in t.turns if turn.end > turn.start]
    return found[:self._config.turns]

  def _features(self, state: LearnerState, logged: list[Trajectory], offers: list[Trajectory]) -> _Log:
    m, n, width = self._config.turns, self._config.actions, self._parts.model.width
    turns = self._turns(logged)
    if not turns:
      raise RuntimeError('the log of stage offline_q holds no turn to learn from; raise offline_q.prompts')
    # Later turns than the log holds repeat it, so that there is one shape.
    turns = [turns[i % len(turns)] for i in range(m)]
    hidden = self._all_hidden(state, [s.tokens for t in (*logged, *offers) for s in t.segments[:1]])
    own = {id(t): h for t, h in zip((*logged, *offers), hidden)}
    known = {key: i for i, key in enumerate(dict.fromkeys((id(t), turn.index) for t, turn in turns))}
    states, next_states = np.zeros((2, m, width), np.float32)
    acts, offered = np.zeros((m, n, width), np.float32), np.zeros((m, n), bool)
    rewards, done, contexts, actions = np.zeros(m, np.float32), np.zeros(m, bool), [], []
    for i, (t, turn) in enumerate(turns):
      tokens, h = t.segments[0].tokens, own[id(t)]
      states[i], acts[i, 0], offered[i, 0] = h[turn.start - 1], h[turn.end - 1], True
      later = t.turns[turn.index + 1:turn.index + 2]
      done[i] = not later
      rewards[i] = t.rewards['total'] if not later else 0.0
      if later:
        next_states[i] = h[later[0].start - 1]
      contexts.append(tokens[:turn.start])
      actions.append([tokens[turn.start:turn.end]])
      at = known[id(t), turn.index] * (n - 1)
      for k, offer in enumerate(offers[at:at + n - 1], 1):
        [drawn] = offer.turns or [None]
        actions[-1].append(offer.segments[0].tokens[turn.start:])
        if drawn and drawn.stop_reason == 'stop':
          acts[i, k], offered[i, k] = own[id(offer)][drawn.end - 1], True
    return _Log(contexts, actions, states, acts, offered, _draws(actions), rewards, next_states, done)

  def _all_hidden(self, state: LearnerState, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Returns [T, F] float32 for each sequence, of the reference."""
    rows, length = self._shape
    out = []
    for start in range(0, len(sequences), rows):
      part = sequences[start:start + rows]
      tokens = np.zeros((rows, length), np.int32)
      for r, s in enumerate(part):
        tokens[r, :len(s)] = s
      hidden = jax.device_get(self._hidden(state.reference, tokens))
      out += [hidden[r, :len(s)] for r, s in enumerate(part)]
    return out

  def _batches(self, rng: np.random.Generator) -> np.ndarray:
    """Returns [updates, batch] int32: the turns of each update of an epoch."""
    c = self._config
    size = min(c.batch, c.turns)
    return rng.permutation(c.turns)[:c.turns // size * size].reshape(-1, size).astype(np.int32)

  def _pack(self, examples: list[tuple[np.ndarray, np.ndarray]], weights: np.ndarray):
    n, train = self._config.batch, self._parts.config.train
    sequences = []
    for i, (context, action) in enumerate(examples):
      tokens = np.concatenate([context, action]).astype(np.int32)
      mask = np.arange(len(tokens)) >= len(context)
      nothing = np.zeros(len(tokens), np.float32)
      sequences.append(TokenSequence(tokens, mask, nothing, nothing.astype(np.int32), i))
    fill = np.concatenate([weights, np.zeros(n - len(weights))]).astype(np.float32)
    outcome = Outcome(np.zeros(n, np.int32), fill, (fill > 0).astype(np.float32), fill > 0)
    return pack(sequences, outcome, rows=self._micro_batches * train.micro_rows, row_length=train.row_length,
                micro_batches=self._micro_batches)


def _draws(actions: list[list[np.ndarray]]) -> np.ndarray:
  """Returns [M, N] int32: how many of the actions offered with each are equal to it, itself included."""
  out = np.zeros((len(actions), max(map(len, actions))), np.int32)
  for row, offered in zip(out, actions):
    keys = [action.tobytes() for action in offered]
    row[:len(keys)] = [keys.count(key) for key in keys]
  return out


def _offer(context: np.ndarray, stops: tuple[str, ...]):
  """Returns a program that draws one turn and ends."""
  async def program(session):
    session.append(context)
    await session.generate(stops=stops)
    session.finish(Status.FINISHED)
  return program


def _hidden(config, params, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return transformer.hidden_states(params, config, tokens, positions, jnp.ones_like(tokens)).astype(jnp.float32)


def _critic_epoch(optimizer, gamma, rate, mesh, carried, batches, states, actions, rewards, next_states, done):
  """One pass over the log, then the targets move."""
  trained, targets = carried

  def one(trained, index):
    loss = lambda p: offline_q.critic_loss(p, targets, states[index], actions[index], rewards[index],
                                           next_states[index], done[index], gamma=gamma)
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained.params)
    trained, scalars = sums.apply_gradient(trained, optimizer, value, grads)
    return trained, {**metrics, **scalars}

  trained = trained._replace(updates=jnp.asarray(trained.updates, jnp.int32))
  trained, metrics = jax.lax.scan(one, trained, batches)
  carried = sums.replicated((trained, offline_q.moved(targets, trained.params, rate)), mesh)
  return carried, jax.tree.map(jnp.mean, metrics)
