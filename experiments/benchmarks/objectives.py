r"""Times an update of every method against GRPO's, on one batch.

    python experiments/benchmarks/objectives.py --cache /path/of/compiled/programs
    python experiments/benchmarks/objectives.py --cache /path/of/compiled/programs --rounds 5 --write

The first command compiles, the second measures: rounds in which every method makes one update after the other, and for
each the median over rounds of its time against that of GRPO's two, before and after it. Aim: the costliest within 1.15 of
GRPO. An update is forward and backward pass, objective or loss of pairs, and optimiser; passes that score the reference,
the values or the behaviour anew, and what is trained beside the policy, are not part of it. Updates that are equal are
timed once; critics of a log have none of the policy and are left out.

The policy is that of configs/toy.py, the batch 512 short trajectories in rows of 160 tokens: fewer tokens a trajectory
than the toy world has, so that what costs by the trajectory shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from agentrl import algorithms
from agentrl.algorithms import preference
from agentrl.algorithms.examples import example_batch
from agentrl.core import config as configs
from agentrl.core.types import TrainBatch
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, num_params
from agentrl.training import build
from agentrl.training.optimizer import make_optimizer
from agentrl.training.preference import PairBatch, make_pair_update
from agentrl.training.state import LearnerState
from agentrl.training.step import make_update

ROOT = pathlib.Path(__file__).parents[2]
BASELINE = 'grpo'
AIM = 1.15
ROWS, MICRO_ROWS = 48, 16
# Between two measurements of the baseline, so that a drift of the machine is seen by both.
BLOCK = 4


class Prepared(NamedTuple):
  """An update that is ready to run: `update(state, *arguments) -> (state, metrics)`."""

  update: Any
  state: LearnerState
  arguments: tuple[Any, ...]
  model: ModelConfig


def distinct(only: tuple[str, ...] = ()) -> dict[str, ConfigDict]:
  """Returns the configs whose updates differ, by name; GRPO's first.

  Those of one kind of update with the same policy and options of the loss are there once.

  Args:
    only: Configs to look at besides GRPO's; () for all.
  """
  found, seen = {}, set()
  paths = sorted((ROOT / 'configs' / 'methods').glob('*.py'), key=lambda p: (p.stem != BASELINE, p.stem))
  for path in paths:
    if only and path.stem not in (BASELINE, *only):
      continue
    c = configs.load(path)
    kinds = {stage.partition(':')[0] for stage in c.stages} & set(UPDATES)
    if not kinds:
      continue
    [kind] = kinds
    settings = {'rl': [c.rl.algorithm, c.rl.options.to_dict()], 'preference': [
        c.preference.loss, c.preference.options.to_dict(), len(c.preference.heads)]}[kind]
    key = json.dumps([kind, settings, c.model.to_dict()], sort_keys=True)
    if key not in seen:
      seen.add(key)
      found[path.stem] = c
  return found


def compiled(config: ConfigDict) -> Prepared:
  """Returns a config's update, ready to run."""
  [kind] = {stage.partition(':')[0] for stage in config.stages} & set(UPDATES)
  toy = configs.load(ROOT / 'configs' / 'toy.py')
  model = build.new_model_config(config, toy.tokenizer.vocab_size)
  optimizer = make_optimizer(toy.rl.optimizer, toy.rl.learning_rate)
  update, state, arguments = UPDATES[kind](config, model, optimizer)
  used = np.int32(ROWS // MICRO_ROWS)
  return Prepared(update.lower(state, *arguments, used).compile(), state, (*arguments, used), model)


def _batch(reads: tuple[str, ...] = ()) -> TrainBatch:
  length = configs.load(ROOT / 'configs' / 'toy.py').train.row_length
  return example_batch(groups=64, group_size=8, length=length, min_rows=ROWS, reads=reads, spare=0)[0]


def _of_objective(config, model, optimizer):
  objective = algorithms.make(config.rl.algorithm, **config.rl.options.to_dict())
  params = init_params(model, jax.random.key(0))
  state = LearnerState(params, optimizer.init(params), np.int32(0))
  update = make_update(model, optimizer, objective, micro_batches=ROWS // MICRO_ROWS)
  return update, state, (_batch(objective.reads),)


def _of_pairs(config, model, optimizer):
  """Each pair is two trajectories next to each other; with several heads they take turns."""
  c, count = config.preference, len(config.preference.heads)
  loss = preference.make(c.loss, **c.options.to_dict())
  params = init_params(model, jax.random.key(0))
  side = {'heads': jnp.stack([params['head']] * count)} if count else {}
  trained = {'heads': side['heads'], 'policy': {k: v for k, v in params.items() if k != 'head'}} if count else params
  state = LearnerState(params, optimizer.init(trained), np.int32(0), None, side)
  batch = _batch()._replace(advantages=np.zeros((1, ROWS, 1), np.float32), returns=np.zeros((ROWS, 1), np.float32))
  pairs = len(batch.weights) // 2
  found = PairBatch(np.ones(pairs, np.float32), np.arange(pairs, dtype=np.int32) % max(1, count))
  update = make_pair_update(model, optimizer, loss, micro_batches=ROWS // MICRO_ROWS,
                            mix=np.full(count, 1 / count, np.float32) if count else None)
  return update, state, (batch, found)


# By the stage that makes them.
UPDATES = {'rl': _of_objective, 'preference': _of_pairs}


def timed(made: Prepared) -> tuple[float, LearnerState]:
  """Returns the seconds of one update, and the state after it."""
  start = time.perf_counter()
  state, metrics = made.update(made.state, *made.arguments)
  jax.block_until_ready((state, metrics))
  return time.perf_counter() - start, state


def measure(rounds: int, only: tuple[str, ...]) -> dict[str, object]:
  """Returns seconds and ratios by objective."""
  made = {name: compiled(config) for name, config in distinct(only).items()}
  made = {name: one._replace(state=timed(one)[1]) for name, one in made.items()}
  samples: dict[str, list[float]] = {name: [] for name in made}
  ratios: dict[str, list[float]] = {name: [] for name in made}

  def run(name):
    seconds, state = timed(made[name])
    made[name] = made[name]._replace(state=state)
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
  batch, *_ = made[BASELINE].arguments
  return {'parameters': num_params(made[BASELINE].model), 'tokens': int((batch.segment_ids > 0).sum()),
          'rounds': rounds, 'aim': AIM,
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
