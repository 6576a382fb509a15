"""What is written of a run for whoever asks where its time goes: timelines, traces, profiles."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from typing import Iterator

import jax

from agentrl.metrics import timelines
from agentrl.rollout.stats import Timeline
from agentrl.sharding import exchange

PROFILES = 'profile'
_RANGE = re.compile(r'\s*(\d+)\s*(?:-\s*(\d+)\s*)?')


def parse_steps(text: str) -> list[range] | None:
  """Returns the steps that a text names; None for all.

  Args:
    text: 'all', or numbers and ranges, both ends included, separated by commas; '' for none.
  Raises:
    ValueError: if it is neither.
  Example:
    >>> parse_steps('5, 100-120'), parse_steps('all'), parse_steps('')
    ([range(5, 6), range(100, 121)], None, [])
  """
  if text == 'all':
    return None
  found = []
  for part in text.split(',') if text else ():
    match = _RANGE.fullmatch(part)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
      raise ValueError(f"--trace={text!r}: {part!r} names no steps of the run; give 'all', or steps such as 5 or 100-120, "
                       'separated by commas')
    found.append(range(first, last + 1))
  return found


class Timelines:
  """Writes what the slots did when: of the last rollout into timeline.json, of chosen steps into trace/.

  Of several processes each writes what its own did, see `agentrl.metrics.timelines`.
  """

  def __init__(self, workdir: str | os.PathLike, traced: str = ''):
    """Makes a writer.

    Args:
      workdir: The run's folder.
      traced: Steps of the run, see `parse_steps`.
    Raises:
      ValueError: see `parse_steps`.
    """
    self._workdir = pathlib.Path(workdir)
    self._traced = parse_steps(traced)

  def write(self, step: int, stage: str, timeline: Timeline, keep: bool = False):
    """Takes a step's timeline.

    Args:
      step: Of the run.
      stage: Its name.
      timeline: Of its rollout.
      keep: Whether this is one that the report shows, until the next.
    """
    process = jax.process_index()
    if keep:
      timelines.write(self._workdir, step, stage, timeline.picture(), process)
    if self._traced is None or any(step in steps for steps in self._traced):
      timelines.write_trace(self._workdir, step, timeline.trace(), process)


class Profiler(contextlib.AbstractContextManager):
  """Has jax profile a few steps of each stage, in the first process; what is under way when its block ends is written."""

  def __init__(self, workdir: str | os.PathLike, steps: int = 0):
    """Makes a profiler of `steps` steps, into `workdir/profile/STAGE-step-000012`.

    Raises:
      ValueError: if they are negative.
    """
    if steps < 0:
      raise ValueError(f'--profile={steps} must be a number of steps, such as 3, or 0 for no profile')
    self._folder = pathlib.Path(workdir) / PROFILES
    self._steps = steps
    self._wait = self._left = 0
    self._under_way: pathlib.Path | None = None

  def __exit__(self, *unused_exception):
    self._stop()

  def stage(self, total: int, done: int):
    """Begins a stage of `total` steps, or goes on with one; a stage of a single step is not profiled."""
    # The first step after the start finds what no other does: empty caches, on the device and below it.
    self._wait = min(1, total - done - 1)
    self._left = min(self._steps, total - done - self._wait) if total > 1 and exchange.is_first() else 0

  @contextlib.contextmanager
  def step(self, stage: str, step: int) -> Iterator[None]:
    """A block that is a step of the run."""
    if self._wait or not self._left:
      self._wait = max(0, self._wait - 1)
      yield
      return
    if self._under_way is None:
      self._start(self._folder / f'{stage}-step-{step:06d}')
    with jax.profiler.StepTraceAnnotation(stage, step_num=step):
      yield
    self._left -= 1
    if not self._left:
      self._stop()

  def _start(self, folder: pathlib.Path):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would record every call of every agent program
    jax.profiler.start_trace(_unfinished(folder), profiler_options=options)
    self._under_way = folder

  def _stop(self):
    """Writes the profile under way, whole or not at all."""
    folder, self._under_way = self._under_way, None
    if folder:
      shutil.rmtree(_unfinished(folder), ignore_errors=True)
      jax.profiler.stop_trace()
      shutil.rmtree(folder, ignore_errors=True)
      os.replace(_unfinished(folder), folder)


def _unfinished(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(folder.name + '.unfinished')
