"""Collecting over the processes of a run: each rolls out groups of its own, and all end with all trajectories.

What follows a rollout, shaping, memories, selectors and packing, then has on every process the same trajectories in the
same order as one process alone would have, and comes to the same. The policy's work is divided; the host's is repeated,
but for what is done to trajectories one by one. A group is never divided.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pickle
from typing import Any, Callable, Sequence

import jax

from agentrl.core.types import Task, Trajectory
from agentrl.rollout.engine import Engine, Job
from agentrl.rollout.stats import WALL_SECONDS, EngineStats
from agentrl.sharding import exchange


def collect(engine: Engine, jobs: Sequence[Job], *, own: Callable[[list[Trajectory]], None] | None = None,
            **options: Any) -> list[Trajectory]:
  """Returns the trajectories of all jobs, in order, each followed by its forks. Blocks until every process is done.

  Every process must call it with the same jobs. The engine's stats become those of all processes: tokens added up,
  wall time and its parts those of the slowest.

  Args:
    engine: This process's.
    jobs: Of all processes; those of a group stand next to each other.
    own: Called with the trajectories of this process before the others get them: for what takes time and looks at one
      trajectory at a time.
    **options: Of `Engine.collect`.
  """
  before, engine.stats = engine.stats, EngineStats()
  collected = engine.collect(share(jobs, exchange.count(), jax.process_index()), **options)
  if own:
    own(collected)
  tasks = {id(job.task): job.task for job in jobs}
  parts = [collected], [engine.stats]
  if exchange.count() > 1:
    # Between processes of one run, which trust each other as far as jax's own messages do.
    sent = exchange.gather(_dump((collected, engine.stats), list(tasks.values())))
    parts = zip(*(_load(part, list(tasks.values())) for part in sent))
  collected, stats = parts
  engine.stats = add_stats([before, _slowest(stats)])
  return list(itertools.chain.from_iterable(collected))


def share(jobs: Sequence[Job], processes: int, process: int) -> list[Job]:
  """Returns the jobs of one process: whole groups, as many as another has or one more or less.

  The shares of all processes one after the other are the jobs in their order.
  """
  groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.group_id)]
  bounds = [len(groups) * k // processes for k in (process, process + 1)]
  return [job for group in groups[slice(*bounds)] for job in group]


def add_stats(stats: Sequence[EngineStats]) -> EngineStats:
  """Returns the stats of one stretch of work after another."""
  return EngineStats(**{f.name: sum(getattr(s, f.name) for s in stats) for f in dataclasses.fields(EngineStats)})


def _slowest(stats: Sequence[EngineStats]) -> EngineStats:
  """Returns the stats of work side by side."""
  slowest = max(stats, key=lambda s: s.total_seconds)
  return dataclasses.replace(add_stats(stats), **{name: getattr(slowest, name) for name in WALL_SECONDS})


def _dump(value: Any, tasks: list[Task]) -> bytes:
  """Pickles a value; tasks, which every process has, as their numbers."""
  numbers = {id(task): i for i, task in enumerate(tasks)}
  out = io.BytesIO()
  pickler = pickle.Pickler(out, protocol=pickle.HIGHEST_PROTOCOL)
  pickler.persistent_id = lambda x: numbers.get(id(x))
  pickler.dump(value)
  return out.getvalue()


def _load(data: bytes, tasks: list[Task]) -> Any:
  unpickler = pickle.Unpickler(io.BytesIO(data))
  unpickler.persistent_load = lambda number: tasks[number]
  return unpickler.load()
