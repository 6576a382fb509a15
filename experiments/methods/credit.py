"""Ranks the methods' credit: do the turns that they push up deserve it?

    python experiments/methods/credit.py                          # every method that learns by reinforcement
    python experiments/methods/credit.py --methods grpo,gigpo --seeds 0

For each method a few steps of its own rollouts from the shared cold start, with its own agent, rewards and selectors,
and no update of the policy; the mean advantage of each turn's tokens is set beside what the turn was truly worth, which
the toy world knows (`agentrl.rewards.chains.turn_values`), by Spearman's rank correlation. Value heads, and models
trained beside the policy, first learn from steps of their own. A method takes seconds to half a minute of one core;
what is there already is kept. Writes credit.json and credit.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pathlib
import shutil
import statistics
import sys
from typing import Any, Mapping, Sequence

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
sys.path.insert(0, str(_ROOT))

from absl import logging  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import rich.console  # noqa: E402
from scipy import stats  # noqa: E402

from agentrl.algorithms.objective import Objective  # noqa: E402
from agentrl.core.types import TrainBatch, Trajectory  # noqa: E402
from agentrl.experience.base import REPLAYED  # noqa: E402
from agentrl.rewards import chains  # noqa: E402
from agentrl.training import build  # noqa: E402
from agentrl.training.collect import Clock, group_ids  # noqa: E402
from agentrl.training.init_from import load_params  # noqa: E402
from agentrl.training.rl import ReinforcementStage  # noqa: E402
from agentrl.training.state import HostState, LearnerState  # noqa: E402

STEPS = 3
# Steps, and passes over each, in which values and side models learn before they are asked.
WARM_UP = (6, 8)
WORLD = 'chains'


def measured(method: str, run: Any) -> bool:
  """Whether a method gives advantages to turns of the plain toy world, whose worth is known."""
  config = run.config_of(method)
  learns = any(stage.partition(':')[0] == 'rl' for stage in config.stages)
  return learns and config.rl.learning_rate > 0 and config.environment.name == WORLD


def measure(method: str, seed: int, cold_start: pathlib.Path, folder: pathlib.Path, run: Any,
            tasks: int = 4_096) -> dict[str, Any]:
  """Returns a method's correlations.

  Args:
    method: Name of a config of configs/methods.
    seed: Of the rollouts.
    cold_start: Workdir of the policy.
    folder: To work in; emptied before and removed after.
    run: The module run.py.
    tasks: Of the training data.
  """
  config = run.run_config(run.Run(method, method, seed), cold_start, tasks)
  config.rl.minibatches, (steps, config.rl.epochs) = 1, WARM_UP
  config.model.value_gradient = False  # so that the policy stays as it is
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  parts = build.build(config, folder)
  try:
    objective = build.make_objective(config)
    stage, host = ReinforcementStage(parts, 'rl'), HostState()
    policy = load_params(str(cold_start), parts.init_params())
    state = stage.begin(LearnerState(policy, {}, np.int32(0)), host)
    frozen = jax.device_get({k: v for k, v in state.params.items() if k != 'value'})
    for _ in range(steps if objective.needs_values or config.rl.side else 0):
      state, _ = stage.step(state, host)
      state = state._replace(params={**state.params, **jax.device_put(frozen)})
      host.step, host.stage_step = host.step + 1, host.stage_step + 1
    pairs = []
    for _ in range(STEPS):
      state, trajectories, batches = stage.prepare(state, host, {}, Clock({}))
      order = np.argsort(group_ids(trajectories), kind='stable')
      for batch, _ in batches:
        pairs += compare(objective, batch, [trajectories[i] for i in order], config.environment.max_turns)
      host.step, host.stage_step = host.step + 1, host.stage_step + 1
  finally:
    parts.close()
    shutil.rmtree(folder)
  return {'method': method, 'seed': seed, **correlations(pairs)}


def compare(objective: Objective, batch: TrainBatch, trajectories: Sequence[Trajectory],
            max_turns: int) -> list[tuple[int, float, float]]:
  """Returns (trajectory, advantage, worth) of every turn of this step that is in the loss."""
  advantages = turn_advantages(total_advantages(objective, batch), batch)
  found = []
  for i, t in enumerate(trajectories):
    worth = chains.turn_values(t.task, t, max_turns=max_turns)['value'] if not t.rewards.get(REPLAYED) else []
    found += [(id(t), advantages[i, k], w) for k, w in enumerate(worth) if (i, k) in advantages]
  return found


def total_advantages(objective: Objective, batch: TrainBatch) -> np.ndarray:
  """Returns [B, T]: what all channels together push each token by, weights included."""
  planes = np.asarray(jax.jit(objective.estimate)(batch).advantages)
  weights = [float(c.weight(batch.step) if callable(c.weight) else c.weight) for c in objective.channels]
  return np.tensordot(np.float32(weights), planes, 1)


def turn_advantages(plane: np.ndarray, batch: TrainBatch) -> dict[tuple[int, int], float]:
  """Returns the mean of a plane [B, T] over the tokens in the loss, by trajectory and turn."""
  sums: dict[tuple[int, int], list[float]] = {}
  mask = np.asarray(batch.loss_mask)
  for i, k, x in zip(np.asarray(batch.trajectory_ids)[mask], np.asarray(batch.turn_ids)[mask], plane[mask]):
    sums.setdefault((int(i), int(k)), []).append(float(x))
  return {key: math.fsum(values) / len(values) for key, values in sums.items()}


def correlations(pairs: Sequence[tuple[int, float, float]]) -> dict[str, float]:
  """Returns Spearman's rank correlation over all turns, and of what is left of both within a trajectory.

  Args:
    pairs: (trajectory, advantage, worth) of each turn.
  Returns:
    'turns', their number; 'all', the correlation; 'within', that of the distances from the trajectory's means, 0 where
    all turns of each trajectory have one advantage.
  """
  owners, given, worth = (np.array(x) for x in zip(*pairs))
  _, owner = np.unique(owners, return_inverse=True)
  means = [np.bincount(owner, x) / np.bincount(owner) for x in (given, worth)]
  # Rounding would rank what is equal.
  inside = [np.round(x - m[owner], 5) for x, m in zip((given, worth), means)]
  return {'turns': len(pairs), 'all': spearman(given, worth), 'within': spearman(*inside)}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the rank correlation of two lists; 0 where one of them does not vary."""
  if np.ptp(a) == 0 or np.ptp(b) == 0:
    return 0.0
  return float(stats.spearmanr(a, b).statistic)


def as_markdown(results: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
  """Returns the table, the highest correlation first; results are keyed by run."""
  rows: dict[str, list[Mapping[str, Any]]] = {}
  for result in results.values():
    rows.setdefault(result['method'], []).append(result)
  mean = lambda name, key: statistics.fmean(r[key] for r in rows[name])
  spread = lambda name, key: statistics.stdev([r[key] for r in rows[name]]) if len(rows[name]) > 1 else 0.0
  lines = ['| method | all turns | within a trajectory | turns | seeds |', '|---|--:|--:|--:|--:|']
  for name in sorted(rows, key=lambda n: -mean(n, 'all')):
    cells = [f'{mean(name, key):.3f} ± {spread(name, key):.3f}' for key in ('all', 'within')]
    turns = sum(r['turns'] for r in rows[name])
    lines.append(f'| {titles[name]} | {cells[0]} | {cells[1]} | {turns} | {len(rows[name])} |')
  return '\n'.join(lines) + '\n'


def _run_module() -> Any:
  spec = importlib.util.spec_from_file_location('methods_run', _HERE / 'run.py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # its dataclasses look it up
  spec.loader.exec_module(module)
  return module


def main(argv: Sequence[str] | None = None) -> int:
  """Measures what is missing and writes both files; returns the exit code."""
  run = _run_module()
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--methods', default='', help='comma-separated; all by default')
  parser.add_argument('--seeds', default='0,1,2', help='comma-separated')
  parser.add_argument('--runs', type=pathlib.Path, default=_ROOT / 'runs' / 'methods', help='where runs work')
  parser.add_argument('--out', type=pathlib.Path, default=_HERE, help='folder of credit.json and credit.md')
  options = parser.parse_args(argv)
  logging.set_verbosity(logging.ERROR)
  jax.config.update('jax_compilation_cache_dir', str(options.runs / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  console, path = rich.console.Console(), options.out / 'credit.json'
  names = [m for m in options.methods.split(',') if m] or [m for m in run.known_methods() if measured(m, run)]
  results = json.loads(path.read_text()) if path.exists() else {}
  run.make_cold_start(options.runs / run.COLD_START, console, run.known_keys(_HERE / 'results'))
  for seed in map(int, options.seeds.split(',')):
    for method in names:
      key = f'{method}_seed{seed}'
      if key in results:
        continue
      results[key] = measure(method, seed, options.runs / run.COLD_START, options.runs / 'credit', run)
      path.write_text(json.dumps(results, indent=1, sort_keys=True) + '\n')
      found = results[key]
      console.print(f"{key}: {found['all']:.3f}, within a trajectory {found['within']:.3f}", highlight=False)
      jax.clear_caches()
  titles = {r['method']: run.description(r['method'])['title'] for r in results.values()}
  (options.out / 'credit.md').write_text(as_markdown(results, titles))
  return 0


if __name__ == '__main__':
  sys.exit(main())
