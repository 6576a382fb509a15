"""The function that drives a run: stages one after the other, each step logged and saved."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import time
import uuid
from typing import Any, Callable, Iterator

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from agentrl.checkpointing.checkpoints import Checkpointer
from agentrl.core import config as configs
from agentrl.core.registry import UnknownNameError
from agentrl.metrics import memory
from agentrl.metrics.progress import Progress
from agentrl.metrics.timing import CompileCounter
from agentrl.metrics.writers import MetricsWriter
from agentrl.sharding import exchange
from agentrl.sharding import mesh as meshes
from agentrl.training import demonstrations
from agentrl.training import rejected
from agentrl.training.build import Parts, TOKENIZER_NAME, build
from agentrl.training.init_from import load_params
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState
from agentrl.training.watch import Profiler, Timelines

# Settings that may differ when a run goes on: they do not change what was done so far, or on which devices it is done.
CHANGEABLE = ('stages', 'sft.steps', 'rl.steps', 'rl.trajectories_every', 'eval.', 'checkpoint.', 'report', 'mesh.',
              'rollout.mesh', 'rollout.slots', 'rollout.seats', 'rollout.room')
MAX_REJECTED = 3
# How long a file that another process wrote may take to be seen, seconds.
_VISIBLE_SECONDS = 30


class RunError(RuntimeError):
  """A run that cannot start or go on, worded for whoever started it."""


class Interrupted(Exception):
  """The run was asked to stop, and has saved its state."""


def run(config: ConfigDict, workdir: str | os.PathLike,
        on_stage_end: Callable[[pathlib.Path], Any] | None = None, *, trace: str = '',
        profile: int = 0) -> dict[str, Any]:
  """Runs a config's stages to their end and returns the summary, also written to summary.json.

  Starting again in the same workdir goes on where the last checkpoint was made. Blocks. Where several processes are one
  run, see `agentrl.sharding.processes`, each calls it; the first one writes, all return the same.

  Args:
    config: See configs/base.py.
    workdir: The run's folder, made if missing; one that all processes see.
    on_stage_end: Called with the workdir when a stage has ended, if the config wants a report.
    trace: Steps whose rollouts are written into workdir/trace, see `agentrl.training.watch.parse_steps`.
    profile: Steps of each stage that jax profiles into workdir/profile, from the second on that is done now.
  Raises:
    RunError: if the workdir cannot be used, is in use, or belongs to another config, or a part of the run refuses
      its settings or its data.
    Interrupted: after SIGTERM or SIGINT to any of the processes, with the state saved.
  """
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    with _refusals(), exchange.together():
      timelines, profiler = Timelines(workdir, trace), Profiler(workdir, profile)
      if exchange.is_first():
        stack.enter_context(_claimed(workdir))
    stack.enter_context(profiler)
    stop = stack.enter_context(_StopSignals())
    compiles = stack.enter_context(CompileCounterContext())
    stack.enter_context(memory.economical())
    started = time.perf_counter()
    with _refusals():
      exchange.warm_up()
      _check_shared(workdir)
      checkpointer = stack.enter_context(
          Checkpointer(workdir / 'checkpoints', keep=config.checkpoint.keep))
      with exchange.together():
        if exchange.is_first():
          _check_same_config(config, workdir, bool(checkpointer.steps()))
      parts = stack.enter_context(contextlib.closing(exchange.in_turn(lambda: build(config, workdir, timelines))))
      with exchange.together():
        stages = [_make_stage(parts, text) for text in config.stages]
      loop = _Loop(parts, checkpointer, stages, stop, compiles, profiler, started, on_stage_end)
    return loop.run()


class _Loop:
  """A run, or one process's part of it: all do the same steps, the first one writes of them."""

  def __init__(self, parts: Parts, checkpointer: Checkpointer, stages: list[tuple[str, str, Any]],
               stop: _StopSignals, compiles: CompileCounter, profiler: Profiler, started: float,
               on_stage_end: Callable[[pathlib.Path], Any] | None):
    self._parts, self._checkpointer, self._stages = parts, checkpointer, stages
    self._stop, self._compiles, self._profiler = stop, compiles, profiler
    self._config = parts.config
    self._started, self._on_stage_end = started, on_stage_end
    self.state, self.host = self._restore_or_start()

  # ---- start -----------------------------------------------------------------------------------

  def _restore_or_start(self) -> tuple[LearnerState, HostState]:
    """Returns the state to go on from; between stages it is bare, see `_bare`."""
    bare = self._everywhere(_bare(self._parts.init_params()))
    found = self._checkpointer.restore({}, partial=True)
    if found is None:
      folder = self._config.checkpoint.init_from
      return (self._everywhere(_bare(load_params(folder, bare.params))) if folder else bare), HostState()
    host = HostState(**found.host)
    # `begin` tells the shape of a stage's state; its values are overwritten.
    template = self._everywhere(self._stage(host).begin(bare, HostState())) if host.stage_step else bare
    restored = self._checkpointer.restore(template)
    logging.warning('Going on from step %d in %s', restored.step, self._parts.workdir)
    return restored.arrays, HostState(**restored.host)

  def _stage(self, host: HostState) -> Any:
    return self._stages[host.stage][2]

  def _everywhere(self, state: LearnerState) -> LearnerState:
    return meshes.on_run(state, self._parts.mesh)

  # ---- stages and steps ------------------------------------------------------------------------

  def run(self) -> dict[str, Any]:
    """Runs what is left."""
    host = self.host
    self._add_seconds('setup', time.perf_counter() - self._started)
    with _Log(self._parts.workdir, host.step) if exchange.is_first() else _NoLog() as log:
      while host.stage < len(self._stages):
        kind, name, stage = self._stages[host.stage]
        log.stage(kind if kind == name else f'{kind} {name}', stage.steps, host.stage_step)
        if host.stage_step == 0:
          self.state = self._everywhere(stage.begin(self.state, host))
        if host.stage_step < stage.steps:
          self._timed('compile', stage.warm_up, self.state)
        self._profiler.stage(stage.steps, host.stage_step)
        while host.stage_step < stage.steps:
          with self._profiler.step(name, host.step):
            metrics = self._step(kind, name, stage)
          # Lines come before the state they lead to, and after the one they came from is safe: a kill leaves no hole
          # in metrics.jsonl and costs one finished step at most.
          metrics['seconds/checkpoint'] = self._timed('checkpoint', self._checkpointer.wait)
          log.step(host.step - 1, kind, host.stage_step, metrics)
          self._save_or_stop(stage)
        self._end_stage()
    self._write_summary()
    return self._summary()

  def _step(self, kind: str, name: str, stage: Any) -> dict[str, Any]:
    host = self.host
    started = time.perf_counter()
    self._compiles.mark()  # The first save compiles too, where several processes write parts of it.
    self.state, metrics = stage.step(self.state, host)
    host.step += 1
    host.stage_step += 1
    if self._compiles.count:
      logging.warning('Compiled after warm-up: %s', self._compiles.names)
      host.totals['compilations_after_warmup'] = (
          host.totals.get('compilations_after_warmup', 0) + self._compiles.count)
    if host.stage_step == stage.steps:
      host.results.setdefault(name, {}).update(stage.result(host))
    metrics['seconds'] = time.perf_counter() - started
    self._count(kind, metrics)
    return metrics

  def _save_or_stop(self, stage: Any):
    """Saves if it is time to, and ends the run if it was asked to or cannot go on."""
    host, asked = self.host, exchange.any_process(self._stop.asked)
    failed = host.rejected_in_a_row >= MAX_REJECTED
    due = host.stage_step % self._config.checkpoint.every == 0 or host.stage_step == stage.steps
    if due or asked or failed:
      self._timed('checkpoint', self._save, asked or failed)
    if failed:
      raise RunError(f'{host.rejected_in_a_row} updates in a row were not finite; their batches are in '
                     f'{self._parts.workdir / rejected.FOLDER}. Lower the learning rate, or look at the rewards.')
    if asked:
      raise Interrupted(f'stopped after step {host.step}; start again with the same workdir to go on')

  def _end_stage(self):
    host = self.host
    host.stage += 1
    host.stage_step = 0
    self.state = _bare(self.state.params)
    self._timed('checkpoint', self._save, False)
    self._write_summary()
    if self._config.report and self._on_stage_end:
      self._timed('report', self._report)

  def _report(self):
    if exchange.is_first():
      self._on_stage_end(self._parts.workdir)
    exchange.wait()

  def _save(self, wait: bool):
    self._checkpointer.save(self.host.step, self.state, self.host.to_json(), wait=wait)

  # ---- bookkeeping ------------------------------------------------------------------------------

  def _timed(self, phase: str, function: Any, *args) -> float:
    started = time.perf_counter()
    function(*args)
    seconds = time.perf_counter() - started
    self._add_seconds(phase, seconds)
    return seconds

  def _add_seconds(self, phase: str, seconds: float):
    self.host.seconds[phase] = self.host.seconds.get(phase, 0.0) + seconds

  def _count(self, kind: str, metrics: dict[str, Any]):
    self._add_seconds(kind, metrics['seconds'])
    counted = {key: metrics[key] for key in ('decoded_tokens', 'trained_tokens', 'seconds/rollout', 'seconds/update')
               if key in metrics}
    if 'seconds/rollout' in counted:
      # What is drawn beside an update takes time as well.
      drawing = sum(value for key, value in metrics.items() if key.startswith('engine_seconds/'))
      counted['seconds/rollout'] = max(counted['seconds/rollout'], drawing)
    for key, value in counted.items():
      name = f'{kind}/{key}'
      self.host.totals[name] = self.host.totals.get(name, 0) + value

  def _summary(self) -> dict[str, Any]:
    totals = self.host.totals

    def rate(tokens: str, seconds: str) -> float:
      kinds = {k.split('/')[0] for k in totals if k.endswith(tokens)}
      spent = sum(totals.get(f'{k}/{seconds}', 0.0) for k in kinds)
      return sum(totals[f'{k}/{tokens}'] for k in kinds) / spent if spent else float('nan')

    seconds = {k: round(v, 3) for k, v in self.host.seconds.items()}
    seconds['total'] = round(sum(self.host.seconds.values()), 3)
    return {
        **self.host.results, 'seconds': seconds, 'steps': self.host.step,
        'tokens_per_second': {'decode': rate('decoded_tokens', 'seconds/rollout'),
                              'update': rate('trained_tokens', 'seconds/update')},
        'compilations_after_warmup': int(totals.get('compilations_after_warmup', 0)),
        'seed': self._config.seed,
    }

  def _write_summary(self):
    if exchange.is_first():
      _replace(self._parts.workdir / 'summary.json', json.dumps(self._summary(), indent=2) + '\n')


class _Log(contextlib.ExitStack):
  """What a run says of its steps: metrics on disk, and progress for whoever watches."""

  def __init__(self, workdir: pathlib.Path, start_step: int):
    super().__init__()
    self._writer = self.enter_context(MetricsWriter(workdir, start_step=start_step))
    self._progress = self.enter_context(Progress())

  def stage(self, name: str, total: int, done: int):
    """Begins a stage."""
    self._progress.stage(name, total=total, start=done)

  def step(self, step: int, kind: str, done: int, metrics: dict[str, Any]):
    """Notes a step, the `done`th of its stage."""
    self._writer.write(step, kind, metrics)
    self._progress.update(done, metrics)


class _NoLog(contextlib.nullcontext):
  """The same, of a process that says nothing."""

  def __enter__(self) -> _NoLog:
    return self

  def stage(self, *unused_stage):
    """Says nothing."""

  def step(self, *unused_step):
    """Says nothing."""


def _bare(params: Any) -> LearnerState:
  """Returns the state between stages: the policy alone, whatever stage comes next."""
  return LearnerState(params, {}, np.int32(0))


def _make_stage(parts: Parts, text: str) -> tuple[str, str, Any]:
  kind, _, name = text.partition(':')
  STAGES.names()
  return kind, name or kind, STAGES.get(kind)(parts, name or kind)


class CompileCounterContext(contextlib.AbstractContextManager):
  """A `CompileCounter` that stops listening when its block ends."""

  def __enter__(self) -> CompileCounter:
    self._counter = CompileCounter()
    return self._counter

  def __exit__(self, *unused_exception):
    self._counter.close()


class _StopSignals(contextlib.AbstractContextManager):
  """Turns SIGTERM and the first SIGINT into a request to stop after the step in progress."""

  def __init__(self):
    self.asked = False

  def __enter__(self) -> _StopSignals:
    self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *unused_exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, unused_frame):
    if self.asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.asked = True
    logging.warning('Stopping after the step in progress; once more Ctrl-C stops at once')


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
  """Words what the parts of a run refuse at its start; past it, the same errors are mistakes of this package."""
  try:
    yield
  except (ValueError, UnknownNameError, OSError) as error:
    raise RunError(str(error)) from error


@contextlib.contextmanager
def _claimed(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the workdir and keeps other processes from running in it."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / '.lock', 'w', encoding='utf-8')
  except OSError as error:
    raise RunError(f'the workdir {workdir} cannot be written: {error}. Pass another --workdir or mend its '
                   'permissions.') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise RunError(f'another process is running in {workdir}; wait for it, stop it, or pass another '
                     '--workdir') from error
    yield


def _check_shared(workdir: pathlib.Path):
  """Refuses a workdir that is not the same folder for all processes."""
  mark = workdir / '.processes'
  with exchange.together():
    if exchange.is_first() and exchange.count() > 1:
      mark.write_text(uuid.uuid4().hex)
  written = exchange.gather(mark.read_bytes() if exchange.is_first() and exchange.count() > 1 else b'')[0]
  with exchange.together():
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while written and not (mark.exists() and mark.read_bytes() == written):
      if time.monotonic() > deadline:
        raise ValueError(f'the workdir {workdir} is not the one that process 0 has: it must lie on a file system that '
                         'all processes share')
      time.sleep(0.1)


def _check_same_config(config: ConfigDict, workdir: pathlib.Path, begun: bool):
  """Writes the config, or refuses one that is not the one the workdir was begun with.

  Before the first checkpoint any config is taken, so that a setting that was refused can be mended; what was made
  from the old one is made again.
  """
  path = workdir / 'config.json'
  if path.exists():
    changed = {k: v for k, v in configs.diff(configs.from_json(path.read_text()), config).items()
               if not k.startswith(CHANGEABLE)}
    if changed and begun:
      listed = '; '.join(f'{k}: {old!r} -> {new!r}' for k, (old, new) in changed.items())
      raise RunError(f'{workdir} was started with another config ({listed}). Use the same one to go on, or '
                     'another --workdir.')
    if changed:
      for name in (TOKENIZER_NAME, demonstrations.FILE_NAME):
        (workdir / name).unlink(missing_ok=True)
  _replace(path, configs.to_json(config) + '\n')


def _replace(path: pathlib.Path, text: str):
  """Writes a file that is never seen unfinished."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
