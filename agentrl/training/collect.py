"""The collecting half of a reinforcement step: ask, roll out, score, choose."""

from __future__ import annotations

import functools
import inspect
import time
from typing import Any, Callable, Iterable, Mapping

import numpy as np

from agentrl.agents import base as agents
from agentrl.agents.react import react
from agentrl.algorithms import schedules
from agentrl.algorithms.selectors import COMPARES_GROUPS, SELECTORS, Candidates, Selection
from agentrl.core import registry
from agentrl.core.types import Iteration, Status, Task, Trajectory
from agentrl.data.iterator import TaskIterator
from agentrl.experience import base as memories
from agentrl.experience.base import REPLAYED
from agentrl.rollout import gather
from agentrl.rollout.budget import Budget
from agentrl.rollout.engine import Engine, Job
from agentrl.rollout.store import decode_task, encode_task
from agentrl.rollout.stream import Order, Stream
from agentrl.rollout.summary import staleness
from agentrl.sampling.draw import SamplingParams
from agentrl.sharding import exchange
from agentrl.training.build import Parts
from agentrl.training.state import HostState

# The part of a trajectory that is the reward of the likeliest one of its task; see `rl.greedy_baseline`.
GREEDY = 'greedy'
# Samples of tasks that a memory asks again are numbered from here on, so that no draw repeats.
ASKED_AGAIN = 1 << 32
# Batches of tasks drawn at most for one that a memory leaves tasks out of.
MAX_DRAWS = 16


class Collector:
  """Rolls out groups, scores them, and says which of them are trained on.

  Attributes:
    agent: Makes the programs of a group.
    memory: Keeps and gives back trajectories; None without one.
    memory_name: In messages; '' without one.
    names: Parts that a trajectory may have once it is collected.
    engine: Samples.
  """

  def __init__(self, parts: Parts):
    """Makes what a run's config asks for.

    Raises:
      ValueError: if the agent, the memory, the selectors and the staleness cannot go together.
    """
    c = parts.config.rl
    self._parts, self._config = parts, c
    self.agent = agents.make(parts.config.agent.name, parts.environment, parts.template,
                             parts.config.agent.options.to_dict())
    self.memory, self.memory_name = None, ''
    if len(c.memory):
      options = c.memory.to_dict()
      self.memory_name = registry.pop_name('rl.memory', options)
      self.memory = memories.make(self.memory_name, options)
      self._check_memory()
    self._check_agent()
    self._streamed = c.staleness > 0 or c.overlap
    self._stream: Stream | None = None  # while steps are done
    self._budget, self._cut = Budget(**c.budget), 0
    self._check_stream()
    self.names = parts.reward.names | {REPLAYED, *self.agent.names, *(self.memory.names if self.memory else ()),
                                       *((GREEDY,) if c.greedy_baseline else ())}
    self._selectors = [_selector(choice, c.group_size, self.names) for choice in c.select]
    self.engine = parts.engine(SamplingParams(temperature=parts.config.rollout.temperature))
    self._greedy = parts.engine(SamplingParams(temperature=0.0)) if c.greedy_baseline else None
    self._iterator = TaskIterator(_first(parts.train_source, c.tasks), c.prompts, parts.config.seed)
    self._memory_store = parts.store('memory', pieces=False)

  def most_trajectories(self) -> int:
    """Returns the most trajectories of an update: what its batch is laid out for."""
    c = self._config
    of_group = self.agent.max_trajectories(c.group_size)
    fresh = c.prompts * of_group
    total = fresh + (self.memory.max_replayed(fresh) if self.memory else 0)
    most = -(-total // c.minibatches)
    # Groups of different sizes do not divide evenly.
    return most if total == c.prompts * c.group_size else most + (of_group if c.minibatches > 1 else 0)

  def begin(self, host: HostState):
    """Goes to the start of the data."""
    host.cursor, host.carried = self._iterator.start(), {}

  @property
  def _engines(self) -> list[Engine]:
    return [self.engine, self._greedy] if self._greedy else [self.engine]

  def warm_up(self, params: Any):
    """Compiles the sampler's shapes."""
    for engine in self._engines:
      engine.sampler.set_params(params)
      engine.sampler.warm_up()

  def collect(self, params: Any, host: HostState, metrics: dict[str, Any],
              clock: Clock) -> tuple[list[Trajectory], Selection]:
    """Returns scored trajectories to train on, and what the selectors leave of each.

    Rolls out further prompts while too few groups are left, `max_generation_batches` batches at most.
    """
    c, trajectories, kept = self._config, [], []
    if self._greedy:
      self._greedy.sampler.set_params(params)
    if not self._stream:
      for engine in self._engines:
        engine.cut()
    self._cut = 0
    self._take_weights(params, host)
    for batch in range(c.max_generation_batches):
      fresh = self._roll_out(host, batch)
      greedy = self._roll_out_greedily(fresh, host) if self._greedy else {}
      clock.lap('rollout')
      self._parts.reward.shape(fresh, self._iteration(host, 'reward'))
      for t in fresh if self._greedy else ():
        t.rewards[GREEDY] = greedy[t.task.id]
      self.agent.learn(fresh, self._iteration(host, 'agent'))
      rng = np.random.default_rng([self._parts.config.seed, host.step, batch])
      if self.memory:
        fresh = self._exchange(fresh, rng, host)
      trajectories += fresh
      kept.append(self._select(fresh, rng, host.stage_step))
      clock.lap('reward')
      selection = Selection(*map(np.concatenate, zip(*kept)))
      chosen = dict.fromkeys(t.group_id for t, w in zip(trajectories, selection.weights) if w > 0)
      if len(chosen) >= c.prompts:
        break
    metrics['generation_batches'] = batch + 1
    metrics['cut_trajectories'] = self._cut
    if c.max_generation_batches > 1 and chosen:
      groups = {g: i for i, g in enumerate(chosen)}
      part = [i for i, t in enumerate(trajectories) if groups.get(t.group_id, c.prompts) < c.prompts]
      trajectories, selection = [trajectories[i] for i in part], Selection(*(x[part] for x in selection))
    stats, timeline = (self._stream or self.engine).cut()
    if self._greedy:
      stats = gather.add_stats([stats, self._greedy.cut()[0]])
    metrics.update(stats.metrics())
    self._parts.timelines.write(host.step, 'rl', timeline, keep=True)
    if self._stream:
      metrics.update(staleness([t for t in trajectories if not t.rewards.get(REPLAYED)], host.stage_step))
      metrics['carried_groups'] = self._stream.under_way
    return trajectories, selection

  def save(self, host: HostState):
    """Writes what the memory holds and what is under way after a step; ends it after the last."""
    if self._stream and host.stage_step == self._config.steps - 1:
      self._stream.close()
      self._stream = None
    host.carried = self._stream.snapshot() if self._stream else {}
    if self.memory:
      self._memory_store.write(host.step + 1, self.memory.trajectories)
      self._memory_store.keep_last(self._parts.config.checkpoint.keep + 1)

  def _roll_out(self, host: HostState, batch: int) -> list[Trajectory]:
    c = self._config
    rate = functools.partial(self._parts.reward.rate, step=host.stage_step)
    if self._stream:
      self._keep_under_way(min(1 + c.staleness, c.steps - host.stage_step) * c.prompts, host, batch)
      groups = self._stream.take(min(c.prompts, self._stream.under_way))
      collected = [t for group in groups for t in group]
      rate(collected)
    else:
      iteration = self._iteration(host, 'agent')
      jobs = [job for task, first in self._ask(host, batch, host.stage_step * c.max_generation_batches + batch)
              for job in self._jobs(task, first, task.id, iteration)]
      collected = gather.collect(self.engine, jobs, own=rate, policy_version=host.stage_step, enough=c.enough,
                                 budget=self._budget)
    kept = [t for t in collected if t.status is not Status.CUT]
    self._cut += len(collected) - len(kept)
    return kept

  def _roll_out_greedily(self, trajectories: list[Trajectory], host: HostState) -> dict[str, float]:
    """Returns what the policy's likeliest words earn, by task of the trajectories."""
    parts, tasks = self._parts, {t.task.id: t.task for t in trajectories}
    jobs = [Job(task, 0, task.id, react(parts.environment, parts.template, task)) for task in tasks.values()]
    rate = functools.partial(parts.reward.rate, step=host.stage_step)
    collected = gather.collect(self._greedy, jobs, own=rate, policy_version=host.stage_step)
    parts.reward.shape(collected, self._iteration(host, GREEDY))
    return {t.task.id: t.rewards['total'] for t in collected}

  def _jobs(self, task: Task, first: int, group_id: str, iteration: Iteration) -> list[Job]:
    programs = self.agent.programs(task, self._config.group_size, iteration)
    return [Job(task, first + k, group_id, program) for k, program in enumerate(programs)]

  def _take_weights(self, params: Any, host: HostState):
    """Gives the engine new weights; begins, or goes on with, what is under way."""
    if not self._streamed:
      self.engine.sampler.set_params(params)
      return
    begun = self._stream is not None
    if not begun:
      c = self._config
      self._stream = Stream(self.engine, staleness=c.staleness, overlap=c.overlap, keep_cache=c.keep_cache)
      self._parts.on_close(self._stream.close)
    self._stream.take_weights(params, host.stage_step)
    if not begun and host.carried:
      self._stream.restore(host.carried, self._jobs_again)

  def _keep_under_way(self, count: int, host: HostState, batch: int):
    """Asks for batches of groups while no more than `count` are under way."""
    orders = None
    while orders != [] and self._stream.under_way <= max(0, count - self._config.prompts):
      number, orders = self._stream.asked, []
      for task, first in self._ask(host, batch, -(-number // self._config.prompts)):
        # A task that comes again while it is under way is a group of its own.
        note = {'task': encode_task(task), 'first': first, 'group': f'{task.id}/{number}' if task.id in
                self._stream.group_ids else task.id, 'step': host.stage_step}
        orders.append(Order(self._jobs(task, first, note['group'], self._iteration(host, 'agent')), note))
      self._stream.ask(orders)

  def _jobs_again(self, note: dict[str, Any]) -> list[Job]:
    iteration = Iteration(note['step'], self._config.steps)
    return self._jobs(decode_task(note['task']), note['first'], note['group'], iteration)

  def _ask(self, host: HostState, batch: int, number: int) -> list[tuple[Task, int]]:
    """Returns the tasks of a batch of a step, batch `number` of all, and the number of the first sample of each."""
    c, asked = self._config, {}
    if self.memory and host.stage_step and not self.memory.trajectories:
      self.memory.trajectories = self._memory_store.read_step(host.step)
    again = ASKED_AGAIN + number * c.group_size
    for draw in range(MAX_DRAWS):
      due, host.cursor = self._iterator.next(host.cursor)
      first = host.cursor['epoch'] * c.group_size
      ids, tasks = {task.id for task in due}, due
      if self.memory:
        rng = np.random.default_rng([self._parts.config.seed, host.step, batch, draw])
        tasks = self.memory.ask(due, rng, self._iteration(host, 'memory'))
      for task in tasks:
        asked.setdefault(task.id, (task, first if task.id in ids else again))
      if len(asked) >= c.prompts:
        break
    return list(asked.values())[:c.prompts]

  def _exchange(self, fresh: list[Trajectory], rng: np.random.Generator, host: HostState) -> list[Trajectory]:
    return self.memory.exchange(fresh, rng, self._iteration(host, 'memory'))

  def _select(self, trajectories: list[Trajectory], rng: np.random.Generator, step: int) -> Selection:
    n = len(trajectories)
    parts = {name: np.array([t.rewards.get(name, 0.0) for t in trajectories], np.float32)
             for name in sorted(self.names)}
    candidates = Candidates(parts['total'], group_ids(trajectories), parts, np.ones(n, np.float32), np.ones(n, bool))
    for selector in self._selectors:
      candidates = candidates._replace(**selector(candidates, rng, step)._asdict())
    return Selection(candidates.weights, candidates.baseline_mask)

  def _iteration(self, host: HostState, reader: str) -> Iteration:
    return Iteration(host.stage_step, self._config.steps, host.memory.setdefault(reader, {}))

  def _check_agent(self):
    """Refuses an agent whose trajectories this run could not learn from."""
    if self.agent.needs_recompute and not self._config.recompute_behaviour:
      raise ValueError(f'agent {self._parts.config.agent.name!r} edits contexts after sampling and cannot go with '
                       "rl.recompute_behaviour=False, as nothing would know its words' log-probs; set that to True, or "
                       "take agent 'react'")

  def _check_stream(self):
    """Refuses what cannot go with groups that are under way for several steps."""
    c, name = self._config, self._parts.config.agent.name
    if not self._streamed:
      return
    if type(self.agent).learn is not agents.Agent.learn:
      raise ValueError(f'agent {name!r} learns from a batch what it shows in the next and cannot go with '
                       f'rl.staleness={c.staleness} or rl.overlap, where the next has begun; set them to 0 and False, '
                       "or take agent 'react'")
    if c.greedy_baseline:
      raise ValueError('rl.greedy_baseline rolls out beside what is under way and cannot go with rl.staleness='
                       f'{c.staleness} or rl.overlap; set them to 0 and False, or take another baseline')
    if exchange.count() > 1:
      raise ValueError(f'rl.staleness={c.staleness} and rl.overlap={c.overlap} cannot go with {exchange.count()} '
                       'processes: what is under way is saved by one; set them to 0 and False, or run one process')
    if self._budget != Budget():
      name, value = next((name, value) for name, value in c.budget.items() if value)
      raise ValueError(f'rl.budget.{name}={value} ends a step where it is spent and cannot go with rl.staleness='
                       f'{c.staleness} or rl.overlap, which carry what is under way over to the next; set it to 0')
    if c.enough < 1.0:
      raise ValueError(f'rl.enough={c.enough} cuts the slowest and cannot go with rl.staleness={c.staleness} or '
                       'rl.overlap, which carry them over to the next step; set it to 1')

  def _check_memory(self):
    """Refuses a memory that this run cannot feed."""
    name, known = self.memory_name, self._parts.reward.names
    missing = sorted(set(self.memory.needs) - known)
    if missing:
      raise ValueError(f'rl.memory {name!r} reads the reward part {missing[0]!r} and cannot go with a reward that does '
                       f'not give it; parts: {", ".join(sorted(known))}; add a shaping to reward.shapings')
    if self._config.recompute_behaviour:
      raise ValueError(f'rl.memory {name!r} gives back what earlier policies sampled, with their log-probs, and cannot go '
                       'with rl.recompute_behaviour, which replaces them; set that to False, or take no memory')
    if self._config.max_generation_batches > 1 and self.memory.max_replayed(self._config.prompts):
      raise ValueError(f'rl.memory {name!r} adds groups of its own to every batch of rollouts and cannot go with '
                       f'rl.max_generation_batches={self._config.max_generation_batches}; set that to 1, or take a '
                       "memory that only replaces, such as 'prompt_success'")


class Clock:
  """Adds the seconds since the last lap to metrics."""

  def __init__(self, metrics: dict[str, Any]):
    self._metrics, self._last = metrics, time.perf_counter()

  def lap(self, phase: str):
    now = time.perf_counter()
    key = f'seconds/{phase}'
    self._metrics[key] = self._metrics.get(key, 0.0) + now - self._last
    self._last = now


def _first(source: Any, count: int) -> Any:
  """Returns the first tasks of a source; all of them for 0."""
  if not 0 <= count <= len(source):
    raise ValueError(f'rl.tasks={count} must be between 0, which is all, and the {len(source)} tasks of the source')
  return [source[i] for i in range(count)] if count else source


def _selector(choice: Mapping[str, Any], group_size: int, parts: Iterable[str]) -> Callable[..., Selection]:
  """Returns a selector of a step's number too, with a config's options bound, tried on a step without trajectories.

  Raises:
    ValueError: if it does not take an option, refuses its value, reads a part that there is none of, or compares the
      samples of groups of one.
  """
  options = dict(choice)
  name = registry.pop_name('rl.select', options)
  rule = SELECTORS.get(name)
  signature = inspect.signature(rule)
  taken = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
  strange = sorted(set(options) - set(taken))
  if strange:
    raise ValueError(f'rl.select {name!r} does not take {strange[0]!r}; known: {", ".join(taken) or "no options"}')
  if group_size < 2 and name in COMPARES_GROUPS:
    raise ValueError(f'rl.select {name!r} compares the samples of a group and cannot go with rl.group_size={group_size}; '
                     "take a group size of at least 2, or one that judges each sample alone, such as 'mask_flags'")
  options = schedules.on_host(options)
  bound = lambda candidates, rng, step: rule(
      candidates, rng, **{k: v(step) if callable(v) else v for k, v in options.items()})
  none = np.zeros(0, np.float32)
  nobody = Candidates(none, none.astype(np.int32), {part: none for part in parts}, none, none > 0)
  try:
    bound(nobody, np.random.default_rng(0), 0)
  except KeyError as error:
    raise ValueError(f'rl.select {name!r} reads the part {error} and cannot go with a reward that does not give it; '
                     f'parts: {", ".join(sorted(parts))}; add a shaping to reward.shapings') from error
  return bound


def group_ids(trajectories: list[Trajectory]) -> np.ndarray:
  """Returns [N] int32: groups numbered in the order in which they first occur."""
  numbers = {g: i for i, g in enumerate(dict.fromkeys(t.group_id for t in trajectories))}
  return np.array([numbers[t.group_id] for t in trajectories], np.int32)
