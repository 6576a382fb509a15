r"""Times an update of every method's objective against GRPO's, on one batch.

    python experiments/benchmarks/objectives.py --cache /path/of/compiled/programs
    python experiments/benchmarks/objectives.py --cache /path/of/compiled/programs --rounds 5 --write

The first command compiles, the second measures: rounds in which every objective makes one update after the other, and
for each objective the median over rounds of its time against that of GRPO's two, before and after it. Aim: the costliest within 1.15 of
GRPO. An update is forward and backward pass, objective and optimiser; passes that score the reference, the values or
the behaviour anew are not part of it. Objectives that are equal are timed once.

The policy is that of configs/toy.py, the batch 512 short trajectories in rows of 160 tokens: fewer tokens a trajectory
than the toy world has, so that what costs by the trajectory shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np

from agentrl import algorithms
from agentrl.algorithms.examples import example_batch
from agentrl.core import config as configs
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, num_params
from agentrl.training.optimizer import make_optimizer
from agentrl.training.state import LearnerState
from agentrl.training.step import make_update

ROOT = pathlib.Path(__file__).parents[2]
BASELINE = 'grpo'
AIM = 1.15
ROWS, MICRO_ROWS = 48, 16
# Between two measurements of the baseline, so that a drift of the machine is seen by both.
BLOCK = 4


def objectives(only: tuple[str, ...] = ()) -> dict[str, object]:
  """Returns the objectives of the configs by name, each once; GRPO's first.

  Args:
    only: Configs to look at besides GRPO's; () for all.
  """
  found, seen = {}, set()
  paths = sorted((ROOT / 'configs' / 'methods').glob('*.py'), key=lambda p: (p.stem != BASELINE, p.stem))
  for path in paths:
    if only and path.stem not in (BASELINE, *only):
      continue
    c = configs.load(path)
    options = c.rl.options.to_dict()
    key = json.dumps([c.rl.algorithm, options], sort_keys=True)
    if key not in seen and any(stage.partition(':')[0] == 'rl' for stage in c.stages):
      seen.add(key)
      found[path.stem] = algorithms.make(c.rl.algorithm, **options)
  return found


def compiled(objective: object) -> tuple[object, LearnerState, object, ModelConfig]:
  """Returns an update that is ready to run, its first state, its batch and the policy."""
  c = configs.load(ROOT / 'configs' / 'toy.py')
  fields = {f.name for f in dataclasses.fields(ModelConfig)}
  settings = {name: value for name, value in c.model.to_dict().items() if name in fields}
  model = ModelConfig(vocab_size=c.tokenizer.vocab_size, value_head=objective.needs_values, **settings)
  optimizer = make_optimizer(c.rl.optimizer, c.rl.learning_rate)
  params = init_params(model, jax.random.key(0))
  state = LearnerState(params, optimizer.init(params), np.int32(0))
  batch, _ = example_batch(groups=64, group_size=8, length=c.train.row_length, min_rows=ROWS, reads=objective.reads)
  update = make_update(model, optimizer, objective, micro_batches=ROWS // MICRO_ROWS)
  return update.lower(state, batch, np.int32(ROWS // MICRO_ROWS)).compile(), state, batch, model


def timed(update, state, batch) -> tuple[float, LearnerState]:
  """Returns the seconds of one update, and the state after it."""
  start = time.perf_counter()
  state, metrics = update(state, batch, np.int32(ROWS // MICRO_ROWS))
  jax.block_until_ready((state, metrics))
  return time.perf_counter() - start, state


def measure(rounds: int, only: tuple[str, ...]) -> dict[str, object]:
  """Returns seconds and ratios by objective."""
  made = {name: compiled(objective) for name, objective in objectives(only).items()}
  states = {name: timed(update, state, batch)[1] for name, (update, state, batch, _) in made.items()}
  samples: dict[str, list[float]] = {name: [] for name in made}
  ratios: dict[str, list[float]] = {name: [] for name in made}

  def run(name):
    update, _, batch, _ = made[name]
    seconds, states[name] = timed(update, states[name], batch)
    samples[name].append(seconds)
    return seconds

  others = [name for name in made if name != BASELINE]
  for _ in range(rounds):
    before = run(BASELINE)
    for i in range(0, len(others), BLOCK):
      block = {name: run(name) for name in others[i:i + BLOCK]}
      after = run(BASELINE)
      for name, seconds in block.items():
        ratios[name].append(2 * seconds / (before + after))
      before = after
  table = {name: {'seconds': statistics.median(samples[name]), 'ratio': statistics.median(ratios[name] or [1.0])}
           for name in made}
  _, _, batch, model = made[BASELINE]
  return {'parameters': num_params(model), 'tokens': int((batch.segment_ids > 0).sum()), 'rounds': rounds, 'aim': AIM,
          'costliest': max(table, key=lambda n: table[n]['ratio']), 'objectives': table}


def main():
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--cache', help='folder in which compiled programs are kept')
  parser.add_argument('--only', default='', help='configs, separated by commas')
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--write', action='store_true', help='write the result to results/')
  arguments = parser.parse_args()
  if arguments.cache:
    jax.config.update('jax_compilation_cache_dir', arguments.cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  found = measure(arguments.rounds, tuple(filter(None, arguments.only.split(','))))
  now = datetime.datetime.now()
  result = {'date': now.isoformat(timespec='seconds'), 'processor': platform.processor() or platform.machine(),
            'cores': len(os.sched_getaffinity(0)), 'jax': jax.__version__, **found}
  text = json.dumps(result, indent=1)
  if arguments.write:
    path = pathlib.Path(__file__).parent / 'results' / f'objectives-{now.strftime("%Y-%m-%dT%H%M%S")}.json'
    path.write_text(text + '\n')
  sys.stdout.write(text + '\n')


if __name__ == '__main__':
  main()
