r"""What the rollout engine makes of waiting tools, shared prompts and many sessions.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python experiments/benchmarks/engine.py             # --only waiting,prefixes,sessions; --figure draws the newest

waiting: sessions of geometrically many turns (mean 6) of 32 tokens; after each a tool sleeps for a lognormal time (sigma
0.75) whose mean is the time of a turn, and 16 tokens of observation follow. The same sessions, and so the same tokens:

    barrier    as many sessions as slots; all draw, then all wait for the slowest tool; the next ones when all have ended
    engine     all sessions of an iteration at once
    partial    an iteration ends when as many groups are done as it is to have, those of later ones begun before
    kept       the same, and what older weights computed of a context is kept (`rl.keep_cache`)

Each iteration brings weights, so that, but for kept, nothing of the cache outlives it. That all trajectories are equal is
checked. A run has hundreds of iterations and these have eight: what partial rollouts give is also measured from the first
that is taken to the last for which there was still more to begin, before the last sessions have the slots to themselves.

prefixes: 64 tasks with a system prompt of 1,000 tokens in common, 8 samples each: known tokens computed, and the cache's
memory beside that of the tokens in it.

sessions: 1,000 sessions on 32 slots, each waiting most of its time: memory beyond the cache.

Writes `results/engine-<date>.json` beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import asyncio
import dataclasses
import datetime
import json
import pathlib
import platform
import resource
import threading
import time

import jax
import numpy as np
from ours import Ids, model

from agentrl.core.types import Status, Task
from agentrl.models.params import init_params, num_params
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, EngineStats, Job
from agentrl.rollout.stream import Order, Stream
from agentrl.sampling.sampler import Sampler

_RESULTS = pathlib.Path(__file__).resolve().parent / 'results'
SLOTS, GROUP, GROUPS, ITERATIONS, STALENESS = 32, 4, 16, 8, 2
PROMPT, TURN, OBSERVATION, MEAN_TURNS, MOST_TURNS, SIGMA = 64, 32, 16, 6, 20, 0.75
CONTEXT = PROMPT + MOST_TURNS * (TURN + OBSERVATION)
CAPACITIES = (96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
SEATS, ROOM = 96, 768  # sessions in the cache; tokens that it has room for, a slot on average
SHOWN_SECONDS = 8.0  # of the timelines that are kept


def make_engine(slots: int, context: int, capacities, **settings) -> Engine:
  """Returns an engine that has compiled all that it will need."""
  sampler = Sampler(model(), slots=slots, context=context, chunk=TURN, capacities=capacities,
                    token_buckets=(OBSERVATION, PROMPT),
                    **{name: settings.pop(name) for name in ('block', 'seats', 'room') if name in settings})
  sampler.set_params(params())
  sampler.warm_up()
  limits = Limits(turn_tokens=TURN, trajectory_tokens=context, context_tokens=context, turns=MOST_TURNS)
  return Engine(sampler, Ids(), limits=limits, **settings)


def params():
  """Returns the policy's parameters."""
  return init_params(model(), jax.random.key(0))


def words(*seed: int, count: int) -> np.ndarray:
  """Returns ids."""
  return np.random.default_rng(seed).integers(5, model().vocab_size, count)


# ---- waiting tools --------------------------------------------------------------------------------


class Barrier:
  """What sessions that march in step wait at: a place is passed once all that are left have come to it."""

  def __init__(self, parties: int):
    self._parties, self._waiting = parties, []

  async def arrive(self):
    """Waits for the others."""
    arrived = asyncio.get_running_loop().create_future()
    self._waiting.append(arrived)
    self._open()
    await arrived

  def leave(self):
    """Takes note that one comes no more."""
    self._parties -= 1
    self._open()

  def _open(self):
    if self._waiting and len(self._waiting) >= self._parties:
      arrived, self._waiting = self._waiting, []
      for future in arrived:
        future.set_result(None)


def session_of(task: int, sample: int, mean_delay: float, barrier: Barrier | None = None):
  """Returns the program of a session; its turns and delays are its own whoever else there is."""
  rng = np.random.default_rng((task, sample))
  turns = min(int(rng.geometric(1 / MEAN_TURNS)), MOST_TURNS)
  delays = mean_delay * rng.lognormal(-SIGMA**2 / 2, SIGMA, turns)

  async def run(session):
    session.append(words(task, count=PROMPT))
    for turn, delay in enumerate(delays):
      await session.generate()
      if turn == turns - 1:
        break
      if barrier:
        await barrier.arrive()
      await asyncio.sleep(delay)
      if barrier:
        await barrier.arrive()
      session.append(words(task, sample, turn, count=OBSERVATION))
    session.finish(Status.FINISHED)
    if barrier:
      barrier.leave()

  return run


def jobs_of(iteration: int, mean_delay: float) -> list[list[Job]]:
  """Returns the groups of an iteration."""
  return [[Job(Task(str(task), 'benchmark', (), None), k, str(task), session_of(task, k, mean_delay))
           for k in range(GROUP)] for task in range(iteration * GROUPS, (iteration + 1) * GROUPS)]


def in_step(engine: Engine, iteration: int, mean_delay: float) -> list:
  """Collects an iteration, as many sessions as there are slots at a time."""
  jobs, out = [job for group in jobs_of(iteration, mean_delay) for job in group], []
  for at in range(0, len(jobs), SLOTS):
    wave = jobs[at:at + SLOTS]
    step = Barrier(len(wave))
    out += engine.collect([dataclasses.replace(j, program=session_of(int(j.task.id), j.sample, mean_delay, step))
                           for j in wave])
  return out


def partial(engine: Engine, mean_delay: float, taken_at: list[float], keep_cache: bool) -> list:
  """Collects all iterations, each begun before the one ahead of it has ended; adds when each had as many as it needs."""
  stream, out, asked = Stream(engine, staleness=STALENESS, keep_cache=keep_cache), [], 0
  try:
    for iteration in range(ITERATIONS):
      stream.take_weights(params(), iteration)
      while asked < min(iteration + 1 + STALENESS, ITERATIONS):
        stream.ask([Order(group) for group in jobs_of(asked, mean_delay)])
        asked += 1
      out += [t for group in stream.take(GROUPS) for t in group]
      taken_at.append(time.perf_counter())
  finally:
    stream.close()
  return out


def waiting() -> dict:
  """Measures three ways of going about tools that take their time."""
  engine = make_engine(SLOTS, CONTEXT, CAPACITIES, seats=SEATS, room=ROOM)
  no_tool = [Job(Task(str(i), 'benchmark', (), None), 0, str(i), session_of(i, 0, 0.0)) for i in range(SLOTS)]
  engine.collect(no_tool)
  engine.stats = EngineStats()
  for _ in range(3):
    engine.collect(no_tool)
  # All 32 draw all the time only at the beginning; a step costs about the same however few draw.
  turn_seconds = engine.stats.decode_seconds / engine.stats.steps * TURN
  taken_at: dict[str, list[float]] = {'partial': [], 'kept': []}
  modes = {
      'barrier': lambda: [t for i in range(ITERATIONS) for t in in_step(engine, i, turn_seconds)],
      'engine': lambda: [t for i in range(ITERATIONS) for t in
                         engine.collect([j for g in jobs_of(i, turn_seconds) for j in g])],
      'partial': lambda: partial(engine, turn_seconds, taken_at['partial'], keep_cache=False),
      'kept': lambda: partial(engine, turn_seconds, taken_at['kept'], keep_cache=True),
  }
  found, first = {}, None
  for name, collect in modes.items():
    engine.stats = EngineStats()
    engine.timeline.cut()
    started = time.perf_counter()
    trajectories = collect()
    seconds = time.perf_counter() - started
    tokens = {(t.task.id, t.sample): t.segments[0].tokens for t in trajectories}
    first = first or tokens
    assert tokens.keys() == first.keys() and all(np.array_equal(tokens[k], first[k]) for k in first), name
    drawn = sum(t.num_sampled for t in trajectories)
    found[name] = {'seconds': seconds, 'tokens': drawn, 'tokens_per_second': drawn / seconds,
                   **engine.stats.metrics(), 'host_share_of_decode': engine.stats.host_seconds / engine.stats.decode_seconds,
                   'timeline': [[s.row, s.kind, round(s.start, 3), round(s.end, 3)] for s in engine.timeline.stretches
                                if s.start < SHOWN_SECONDS]}
    found[name]['times_barrier'] = found['barrier']['seconds'] / seconds
    print(name, json.dumps({k: v for k, v in found[name].items() if k != 'timeline'}), flush=True)
  engine.close()
  # The last iterations' sessions have the slots to themselves.
  full = ITERATIONS - STALENESS
  for name, times in taken_at.items():
    seconds = (times[full - 1] - times[0]) / (full - 1)
    found[name]['seconds_an_iteration_while_full'] = seconds
    found[name]['times_barrier_while_full'] = found['barrier']['seconds'] / ITERATIONS / seconds
    print(name, json.dumps({k: v for k, v in found[name].items() if k.endswith('full')}), flush=True)
  return {'turn_seconds': turn_seconds, 'sessions': ITERATIONS * GROUPS * GROUP, 'iterations': ITERATIONS,
          'staleness': STALENESS, 'slots': SLOTS, 'seats': SEATS, **found}


# ---- shared prompts -------------------------------------------------------------------------------


def prefixes() -> dict:
  """Measures what prompts in common cost."""
  tasks, group, system = 64, 8, 1_000

  def program(task):
    async def run(session):
      session.append(np.concatenate([words(1, count=system), words(2, task, count=PROMPT)]))
      await session.generate()
      session.finish(Status.FINISHED)
    return run

  jobs = [Job(Task(str(i), 'benchmark', (), None), k, str(i), program(i)) for i in range(tasks) for k in range(group)]
  context = system + PROMPT + TURN
  # Room in tokens a slot on average, what is shared being there once.
  engine = make_engine(SLOTS, context, (64, 128), block=8, room=76)
  started = time.perf_counter()
  engine.collect(jobs)
  stats = engine.stats
  least = system + tasks * PROMPT
  out = {'seconds': time.perf_counter() - started, 'tasks': tasks, 'samples': group, 'system_tokens': system,
         'computed_tokens': stats.extended_tokens, 'least_tokens': least, 'times_least': stats.extended_tokens / least,
         'block': engine.sampler.block, 'memory_times_live': stats.cache_tokens / stats.stored_tokens,
         'times_without_sharing': tasks * group * (system + PROMPT) / stats.extended_tokens}
  engine.close()
  print('prefixes', json.dumps(out), flush=True)
  return out


# ---- many sessions --------------------------------------------------------------------------------


def resident() -> int:
  """Returns the process's resident memory, bytes."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize()


def sessions() -> dict:
  """Measures memory with many more sessions than slots."""
  count, turns, context = 1_000, 3, PROMPT + 3 * (TURN + OBSERVATION)
  engine = make_engine(SLOTS, context, (context,))

  def program(number):
    async def run(session):
      session.append(words(3, number, count=PROMPT))
      for turn in range(turns):
        await session.generate()
        await asyncio.sleep(0.5 + number % 7)  # longer than all the others need for a turn
        session.append(words(4, number, turn, count=OBSERVATION))
      session.finish(Status.FINISHED)
    return run

  jobs = [Job(Task(str(i), 'benchmark', (), None), 0, str(i), program(i)) for i in range(count)]
  engine.collect(jobs[:SLOTS])
  engine.stats = EngineStats()
  before, most, done = resident(), [0], threading.Event()

  def watch():
    while not done.wait(0.02):
      most[0] = max(most[0], resident())

  watcher = threading.Thread(target=watch)
  watcher.start()
  started = time.perf_counter()
  engine.collect(jobs)
  seconds = time.perf_counter() - started
  done.set()
  watcher.join()
  stats = engine.stats
  out = {'sessions': count, 'slots': SLOTS, 'seconds': seconds, 'more_bytes': most[0] - before,
         'parked': stats.parked, 'unparked': stats.unparked, 'evictions': stats.evictions, **stats.metrics(),
         'host_share_of_decode': stats.host_seconds / stats.decode_seconds}
  engine.close()
  print('sessions', json.dumps(out), flush=True)
  return out


# ---- the figure -----------------------------------------------------------------------------------


def draw(record: dict, path: pathlib.Path):
  """Draws what slots and device did, under a barrier and without."""
  from matplotlib import figure as figure_lib  # Its objects need no display or global state.
  colours = {'draw': '#2a6f97', 'wait': '#f2c14e', 'ready': '#c9c9c9', 'decode': '#2a6f97', 'prefill': '#9b5de5', 'idle': '#e8e8e8',
             'linger': '#c9c9c9'}
  names = {'barrier': 'barrier after every turn', 'engine': 'engine', 'partial': 'engine, partial rollouts',
           'kept': 'engine, partial rollouts, cache kept'}
  figure = figure_lib.Figure(figsize=(10, 8), layout='constrained')
  for axis, (mode, title) in zip(figure.subplots(len(names), 1, sharex=True), names.items()):
    for row, kind, start, end in record['waiting'][mode]['timeline']:
      height = (-8, 5) if row == 'device' else (row, 0.9)
      axis.broken_barh([(start, end - start)], height, facecolors=colours[kind], linewidth=0)
    axis.set_ylim(2 * SLOTS, -10)
    axis.set_ylabel('device | sessions')
    axis.set_yticks([])
    times = record['waiting'][mode]['times_barrier']
    axis.set_title(f'{title}: {times:.1f} times as fast' if mode != 'barrier' else title, loc='left')
  axis.set_xlim(0, SHOWN_SECONDS)
  axis.set_xlabel('seconds')
  handles = [figure_lib.Figure().subplots().bar(0, 0, color=colours[k], label=label) for k, label in
             (('draw', 'a session draws; the device decodes'), ('wait', 'a session waits for its tool'), ('ready', 'a session waits for a slot'),
              ('prefill', 'the device reads prompts and observations'), ('idle', 'the device has nothing to do'))]
  figure.legend(handles=handles, loc='outside lower center', ncols=3, frameon=False)
  figure.savefig(path, dpi=110)


PHASES = {'waiting': waiting, 'prefixes': prefixes, 'sessions': sessions}


def main():
  """Measures and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default=','.join(PHASES), help='phases, with commas')
  parser.add_argument('--figure', metavar='PATH', help='measure nothing; draw the newest result there')
  args = parser.parse_args()
  if args.figure:
    newest = max(p for p in _RESULTS.glob('engine-2*.json') if 'waiting' in json.loads(p.read_text()))
    draw(json.loads(newest.read_text()), pathlib.Path(args.figure))
    return
  unknown = sorted(set(args.only.split(',')) - set(PHASES))
  if unknown:
    parser.error(f'phase {unknown[0]!r} is unknown; known: {", ".join(PHASES)}')
  record = {'parameters': num_params(model()), 'jax': jax.__version__, 'cores': len(os.sched_getaffinity(0)),
            'processor': platform.processor() or platform.machine(), 'load': os.getloadavg(),
            **{name: PHASES[name]() for name in args.only.split(',')}}
  date = datetime.datetime.now().strftime('%Y-%m-%dT%H%M%S')
  (_RESULTS / f'engine-{date}.json').write_text(json.dumps(record) + '\n')


if __name__ == '__main__':
  main()
