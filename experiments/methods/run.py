"""Trains every config of configs/methods from one cold start, seed by seed, and keeps a JSON a run.

    taskset -c 0 python experiments/methods/run.py                       # everything that is missing
    taskset -c 0 python experiments/methods/run.py --methods grpo,dapo --seeds 0
    python experiments/methods/table.py                                  # the table and the figure

A run takes about half a minute of one core. Ctrl-C ends it after the step in progress, and the same
command goes on; several shells may run it at once, each takes what is left. A run whose config has
changed since is made again. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any, Iterator, Sequence

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
sys.path.insert(0, str(_ROOT))

from absl import logging  # noqa: E402
import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
import numpy as np  # noqa: E402
import rich.console  # noqa: E402

from agentrl.core import config as config_lib  # noqa: E402
from agentrl.metrics import writers  # noqa: E402
from agentrl.rollout import store  # noqa: E402
from agentrl.training import loop  # noqa: E402

_CONFIGS = _ROOT / 'configs' / 'methods'
COLD_START = 'cold_start'
KEYS = 'keys.txt'
# What a task is like, what it can be solved with and what was shown before: a method and what it is
# compared with share it.
WORLD = ('data', 'tools', 'environment', 'sft')
_OF_COLD_START = (*WORLD, 'seed', 'tokenizer', 'model', 'reward', 'rollout', 'train', 'eval', 'checkpoint', 'report')
# Of the demonstrations of a method that has its own: steps, on top of the shared cold start's.
_OWN_SFT_STEPS = 6
# Of the curve: what training is judged by besides where it ends.
CURVE = ('success', 'reward', 'calls_per_task', 'failed_call_rate', 'response_tokens', 'entropy',
         'grad_norm', 'log_prob_gap_max', 'signal_groups')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    method: Name of a config of configs/methods, or 'cold_start' for no training at all.
    world: Name of the method whose world it is run in; its own by default.
    seed: Of sampling and of the order of the tasks.
  """

  method: str
  world: str
  seed: int

  @property
  def name(self) -> str:
    """Of its files."""
    where = '' if self.world == self.method else f'@{self.world}'
    return f'{self.method}{where}_seed{self.seed}'


def known_methods() -> list[str]:
  """Returns the names of the configs."""
  return sorted(p.stem for p in _CONFIGS.glob('*.py') if p.name != '__init__.py')


def description(method: str) -> dict[str, Any]:
  """Returns the METHOD record of a config: title, source, claim, ..."""
  spec = importlib.util.spec_from_file_location(f'method_{method}', _CONFIGS / f'{method}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return dict(module.METHOD)


def config_of(method: str) -> ConfigDict:
  """Returns the config of a method as it stands; the shared toy config for 'cold_start'."""
  path = _ROOT / 'configs' / 'toy.py' if method == COLD_START else _CONFIGS / f'{method}.py'
  return config_lib.load(path, None, _ROOT / 'configs' / 'base.py')


def world_of(config: ConfigDict) -> str:
  """Returns a hash of a config's world; worlds are the same where it is."""
  text = json.dumps([config[section].to_dict() for section in WORLD], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan(methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
  """Returns the runs that methods and what they are compared with take: seed by seed, each once.

  What a method is compared with is run in the method's world: where the claim's baseline has another
  one of its own, there is a further run of it.
  """
  pairs = dict.fromkeys([(COLD_START, COLD_START)] + [(m, m) for m in methods])
  for method in methods:
    claim = description(method)['claim']
    if claim is not None:
      than = claim['than']
      same = world_of(config_of(than)) == world_of(config_of(method))
      pairs[than, than if same else method] = None
  return [Run(method, world, seed) for seed in seeds for method, world in pairs]


def run_config(run: Run, cold_start: pathlib.Path, tasks: int) -> ConfigDict:
  """Returns the config of a run: the method's, from the cold start's policy on.

  Where the method's world has demonstrations of its own, the policy first learns from some of them.

  Args:
    run: Which.
    cold_start: Workdir of the cold start.
    tasks: Training tasks; the cold start needs more of them than reinforcement.
  """
  config = config_of(run.method)
  if run.world != run.method:
    world = config_of(run.world)
    for section in WORLD:
      config[section] = world[section]
  config.seed = run.seed
  config.data.options.size = tasks
  config.checkpoint.init_from = str(cold_start)
  shown = [] if config.sft.to_dict() == config_of(COLD_START).sft.to_dict() else ['sft']
  config.sft.steps = _OWN_SFT_STEPS if shown else config.sft.steps
  training = [s for s in config.stages if s.partition(':')[0] not in ('sft', 'eval')]
  config.stages = tuple(shown + ([] if run.method == COLD_START else training) + ['eval:final'])
  return config


def cold_start_config() -> ConfigDict:
  """Returns the config of the cold start; what it does not depend on is as in base.py."""
  config, base = config_of(COLD_START), config_lib.load(_ROOT / 'configs' / 'base.py')
  for section in base:
    if section not in _OF_COLD_START:
      config[section] = base[section]
  config.stages = ('sft', 'eval:cold_start')
  return config


def make_cold_start(workdir: pathlib.Path, console: rich.console.Console, keys: frozenset[str]):
  """Trains the policy that all methods start from, unless it is there; one process at a time."""
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(workdir.parent / '.cold_start.lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    config = cold_start_config()
    if not is_cold_start(workdir, config, keys):
      shutil.rmtree(workdir, ignore_errors=True)
      console.print(f'Cold start, once for all methods, in {workdir}')
      loop.run(config, workdir)


def is_cold_start(workdir: pathlib.Path, config: ConfigDict, keys: frozenset[str]) -> bool:
  """Whether a finished cold start is there whose config differs in no setting that counts; see `counted`."""
  summary = workdir / 'summary.json'
  return (summary.exists() and COLD_START in json.loads(summary.read_text())
          and counted(json.loads((workdir / 'config.json').read_text()), keys) == counted(config.to_dict(), keys))


def counted(settings: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
  """Returns the settings that decide an outcome, as 'section.key' -> value.

  Args:
    settings: Of a config.
    keys: Those that count whatever their value. One that was added to base.py later counts where it
      is not at its default: until then it changes nothing.
  """
  base = _flat(config_lib.load(_ROOT / 'configs' / 'base.py').to_dict())
  return {k: v for k, v in _flat(settings).items()
          if k != 'checkpoint.init_from' and (k in keys or k not in base or v != base[k])}


def fingerprint(config: ConfigDict, cold_start: pathlib.Path, keys: frozenset[str]) -> str:
  """Returns a hash of what decides a run's outcome: its config and the policy it starts from; see `counted`."""
  started_from = json.loads((cold_start / 'config.json').read_text())
  texts = [counted(settings, keys) for settings in (config.to_dict(), started_from)]
  return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def known_keys(out: pathlib.Path) -> frozenset[str]:
  """Returns the keys of base.py when the first result of a folder was made."""
  path = out / KEYS
  if not path.exists():
    base = _flat(config_lib.load(_ROOT / 'configs' / 'base.py').to_dict())
    path.write_text('\n'.join(sorted(base)) + '\n')
  return frozenset(path.read_text().split())


def _flat(settings: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns nested settings as 'section.key' -> value, as JSON has them."""
  flat = {}
  for key, value in settings.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def results_of(run: Run, workdir: pathlib.Path, config: ConfigDict) -> dict[str, Any]:
  """Returns what is kept of a finished run: final figures, curve, seconds."""
  summary = json.loads((workdir / 'summary.json').read_text())
  lines = [m for m in writers.read_metrics(workdir) if m['stage'] != 'eval']
  last = max((workdir / 'trajectories').glob(f'*{store.SUFFIX}'))
  trajectories = store.read(last).trajectories
  parts = {name: float(np.mean([t.rewards[name] for t in trajectories]))
           for name in trajectories[0].rewards if name != 'total'}
  final = {**parts, **{k: v for k, v in summary['final'].items() if isinstance(v, float)}}
  seconds = summary['seconds']
  trained = [k for k in seconds if k in {s.partition(':')[0] for s in config.stages} - {'sft', 'eval'}]
  final['seconds'] = sum(seconds[k] for k in trained)
  curve = [{k: line[k] for k in (*CURVE, 'seconds') if k in line} for line in lines]
  phases = {k.removeprefix('seconds/'): sum(line.get(k, 0.0) for line in lines)
            for k in sorted({k for line in lines for k in line if k.startswith('seconds/')})}
  return {'method': run.method, 'world': run.world, 'world_hash': world_of(config), 'seed': run.seed,
          'final': final, 'curve': curve,
          'by_family': summary['final']['by_family'], 'seconds': seconds, 'seconds_by_phase': phases,
          'log_prob_gap_max': max((line.get('log_prob_gap_max', 0.0) for line in lines), default=0.0),
          'compilations_after_warmup': summary['compilations_after_warmup']}


def execute(run: Run, out: pathlib.Path, runs: pathlib.Path, config: ConfigDict, mark: str) -> dict[str, Any]:
  """Does a run and writes its JSON; what was left of an earlier attempt is removed first."""
  workdir = runs / run.name
  shutil.rmtree(workdir, ignore_errors=True)
  started = time.perf_counter()
  loop.run(config, workdir)
  found = results_of(run, workdir, config)
  found |= {'fingerprint': mark, 'wall_seconds': round(time.perf_counter() - started, 1), 'jax': jax.__version__}
  temporary = out / f'{run.name}.tmp'
  temporary.write_text(json.dumps(found, indent=1) + '\n')
  os.replace(temporary, out / f'{run.name}.json')
  shutil.rmtree(workdir)
  return found


def is_done(out: pathlib.Path, run: Run, mark: str) -> bool:
  """Whether there is a result of this run as it is configured now."""
  path = out / f'{run.name}.json'
  return path.exists() and json.loads(path.read_text())['fingerprint'] == mark


@contextlib.contextmanager
def claimed(runs: pathlib.Path, run: Run) -> Iterator[bool]:
  """Yields whether this process may do the run; another one that does it keeps it until it ends."""
  folder = runs / 'locks'
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / run.name, 'w', encoding='utf-8') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
      return
    yield True


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--methods', default='', help='comma-separated; all by default')
  parser.add_argument('--seeds', default='0,1,2', help='comma-separated')
  parser.add_argument('--tasks', type=int, default=4_096, help='training tasks of a run')
  parser.add_argument('--runs', type=pathlib.Path, default=_ROOT / 'runs' / 'methods', help='where runs work')
  parser.add_argument('--out', type=pathlib.Path, default=_HERE / 'results', help='where results are kept')
  options = parser.parse_args(argv)
  options.methods = [m for m in options.methods.split(',') if m] or known_methods()
  options.seeds = [int(s) for s in options.seeds.split(',')]
  unknown = sorted(set(options.methods) - set(known_methods()))
  if unknown:
    parser.error(f'unknown method {unknown[0]!r}; there are {", ".join(known_methods())}')
  return options


def main(argv: Sequence[str] | None = None) -> int:
  """Runs what is missing; returns the exit code."""
  options = _options(argv)
  logging.set_verbosity(logging.ERROR)
  # Programs that runs share are compiled once for all of them.
  jax.config.update('jax_compilation_cache_dir', str(options.runs / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  console = rich.console.Console()
  options.out.mkdir(parents=True, exist_ok=True)
  cold_start = options.runs / COLD_START
  failed, made, left = [], 0, []
  try:
    keys, marks = known_keys(options.out), {}
    make_cold_start(cold_start, console, keys)
    for run in plan(options.methods, options.seeds):
      config = run_config(run, cold_start, options.tasks)
      marks[run] = config, fingerprint(config, cold_start, keys)
      if not is_done(options.out, run, marks[run][1]):
        left.append(run)
    console.print(f'{len(left)} of {len(marks)} runs to do')
    started = time.perf_counter()
    for i, run in enumerate(left):
      config, mark = marks[run]
      with claimed(options.runs, run) as ours:
        if not ours or is_done(options.out, run, mark):
          continue
        pace = (time.perf_counter() - started) / made if made else 0.0
        console.rule(f'{i + 1}/{len(left)}  {run.name}'
                     + (f'  about {pace * (len(left) - i) / 60:.0f} min left' if made else ''))
        try:
          found = execute(run, options.out, options.runs, config, mark)
        except loop.Interrupted:
          raise
        except Exception as error:  # pylint: disable=broad-except  # the boundary to a method: the others go on
          failed.append(run.name)
          console.print(f'[red]{run.name} failed:[/red] {type(error).__name__}: {error}', highlight=False)
        else:
          made += 1
          final = found['final']
          console.print(f"{run.name}: success {final['success']:.3f}, calls {final['calls_per_task']:.2f}, "
                        f"avoidable {final['avoidable_calls']:.2f}, {found['wall_seconds']:.0f} s", highlight=False)
        jax.clear_caches()
        gc.collect()
  except (loop.Interrupted, KeyboardInterrupt):
    console.print(f'Stopped; {made} runs made. The same command goes on.')
    return 0
  console.print(f'{made} runs made' + (f'; failed: {", ".join(failed)}' if failed else ''))
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
