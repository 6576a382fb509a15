"""Trains with and without staleness from one cold start, and keeps a JSON a run.

    taskset -c 1 python experiments/async/run.py                     # what is missing
    taskset -c 1 python experiments/async/run.py --table             # the table of README.md

A run of 30 steps takes about a minute of one core. Ctrl-C ends it after the step in progress; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
import time
from typing import Any

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / 'experiments' / 'methods')]

from absl import logging  # noqa: E402
import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
import rich.console  # noqa: E402
import run as methods  # noqa: E402

from agentrl.core import config as config_lib  # noqa: E402
from agentrl.metrics import writers  # noqa: E402
from agentrl.rollout.summary import wilson_interval  # noqa: E402
from agentrl.training import loop  # noqa: E402

# What differs from configs/asynchronous.py.
SETTINGS: dict[str, dict[str, Any]] = {
    'turns': {'staleness': 0, 'overlap': False, 'recompute_behaviour': False, 'algorithm': 'grpo',
              'options': ConfigDict()},
    'carried': {'overlap': False},
    'overlapped': {},
    'uncorrected': {'recompute_behaviour': False, 'algorithm': 'grpo', 'options': ConfigDict()},
}
CURVE = ('success', 'reward', 'entropy', 'staleness/mean', 'staleness/max', 'staleness/share', 'carried_groups',
         'policy/mismatch_weight_share', 'policy/ratio', 'behaviour_kl', 'log_prob_gap_max', 'seconds/rollout',
         'seconds/update', 'seconds')


def config_of(setting: str, seed: int, cold_start: pathlib.Path, tasks: int, steps: int) -> ConfigDict:
  """Returns the config of a run."""
  config = config_lib.load(_ROOT / 'configs' / 'asynchronous.py', None, _ROOT / 'configs' / 'base.py')
  with config.rl.unlocked():
    for key, value in SETTINGS[setting].items():
      config.rl[key] = value
  config.seed = seed
  config.data.options.size = tasks
  config.rl.steps = steps
  config.checkpoint.init_from = str(cold_start)
  config.stages = ('rl', 'eval:final')
  return config


def execute(setting: str, seed: int, config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path):
  """Does a run and writes its JSON."""
  started = time.perf_counter()
  loop.run(config, workdir)
  summary = json.loads((workdir / 'summary.json').read_text())
  lines = [m for m in writers.read_metrics(workdir) if m['stage'] == 'rl']
  found = {'setting': setting, 'seed': seed, 'steps': len(lines),
           'final': {k: summary['final'][k] for k in ('success', 'success_ci95', 'calls_per_task', 'entropy')},
           'samples': config.eval.tasks * config.eval.samples,
           'curve': [{k: line[k] for k in CURVE if k in line} for line in lines],
           'wall_seconds': round(time.perf_counter() - started, 1), 'jax': jax.__version__}
  out.write_text(json.dumps(found, indent=1) + '\n')
  shutil.rmtree(workdir)


def table(out: pathlib.Path) -> str:
  """Returns the results as the table of README.md."""
  rows = ['| setting | success by seed | pooled, 95 % | mean lag | largest lag | tokens not of their step | weights at the cap |',
          '|---|---|---|--:|--:|--:|--:|']
  for setting in SETTINGS:
    runs = [json.loads(p.read_text()) for p in sorted(out.glob(f'{setting}_seed*.json'))]
    if not runs:
      continue
    n = sum(r['samples'] for r in runs)
    right = sum(r['final']['success'] * r['samples'] for r in runs)
    low, high = wilson_interval(right, n)
    lines = [line for r in runs for line in r['curve']]
    mean = lambda key: sum(line.get(key, 0.0) for line in lines) / len(lines)
    by_seed = ', '.join(f"{r['final']['success']:.3f}" for r in runs)
    rows.append(f'| {setting} | {by_seed} | {right / n:.3f} '
                f'({low:.3f} to {high:.3f}) | {mean("staleness/mean"):.2f} | '
                f'{max(line.get("staleness/max", 0.0) for line in lines):.0f} | {mean("staleness/share"):.2f} | '
                f'{mean("policy/mismatch_weight_share"):.4f} |')
  return '\n'.join(rows)


def main():
  """Runs what is missing."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seeds', default='0,1,2', help='comma-separated')
  parser.add_argument('--settings', default=','.join(SETTINGS), help='comma-separated')
  parser.add_argument('--steps', type=int, default=60, help='of a run')
  parser.add_argument('--tasks', type=int, default=4_096, help='training tasks of a run')
  parser.add_argument('--runs', type=pathlib.Path, default=_ROOT / 'runs' / 'methods', help='where the cold start is')
  parser.add_argument('--out', type=pathlib.Path, default=_HERE / 'results', help='where results are kept, in a folder of the steps')
  parser.add_argument('--table', action='store_true', help='print the table and end')
  options = parser.parse_args()
  results = options.out / str(options.steps)
  if options.table:
    print(table(results))
    return
  logging.set_verbosity(logging.ERROR)
  jax.config.update('jax_compilation_cache_dir', str(options.runs / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  cold_start, console = options.runs / methods.COLD_START, rich.console.Console()
  methods.make_cold_start(cold_start, console, methods.known_keys(_ROOT / 'experiments' / 'methods' / 'results'))
  results.mkdir(parents=True, exist_ok=True)
  for seed in map(int, options.seeds.split(',')):
    for setting in options.settings.split(','):
      out = results / f'{setting}_seed{seed}.json'
      if not out.exists():
        config = config_of(setting, seed, cold_start, options.tasks, options.steps)
        execute(setting, seed, config, options.runs / f'async_{setting}_{options.steps}_seed{seed}', out)
        console.print(f'{out.stem}: success {json.loads(out.read_text())["final"]["success"]:.3f}')


if __name__ == '__main__':
  main()
