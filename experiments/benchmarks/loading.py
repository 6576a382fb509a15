r"""Times loading a synthetic checkpoint of 1.1 GB against reading its file.

    python experiments/benchmarks/loading.py --write

Each round reads the file into memory of its own, then loads it: in the checkpoint's dtype, and cast to float32. The
figure is the median over rounds of reading time over loading time. Aim: at least 0.5 in the checkpoint's dtype, and
nothing compiled after the first load, neither by loading nor by a program that was compiled for new parameters. The file
is in the page cache, so that a disk, if there is one, hides nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.metrics.timing import CompileCounter
from agentrl.models import pretrained
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params

AIM = 0.5
# Qwen3's shape with few layers: square and oblong matrices, a large embedding and head.
SHAPE = dict(vocab_size=32_768, num_layers=12, width=1_536, ff_width=6_144, num_heads=16, num_kv_heads=8, head_dim=128,
             qk_norm=True, tied_embeddings=False, rope_theta=1e6, param_dtype='bfloat16')


def make(folder: pathlib.Path):
  """Writes the checkpoint, with random weights."""
  config = ModelConfig(**SHAPE)
  params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
  pretrained.save_pretrained(folder, params, config, architecture='Qwen3ForCausalLM')


def read(path: pathlib.Path) -> np.ndarray:
  """Returns a file's bytes, in memory that was not used before."""
  out = np.empty(path.stat().st_size, np.uint8)
  with open(path, 'rb') as file:
    file.readinto(out)
  return out


def timed(function, *args) -> tuple[float, object]:
  """Returns seconds and result of a call."""
  start = time.perf_counter()
  out = jax.block_until_ready(function(*args))
  return time.perf_counter() - start, out


def measure(folder: pathlib.Path, rounds: int) -> dict[str, object]:
  """Returns seconds, ratios and compilations."""
  path, config = folder / pretrained.WEIGHTS, ModelConfig(**SHAPE)
  total = jax.jit(lambda params: sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(params)))
  total(jax.device_put(jax.jit(lambda: init_params(config, jax.random.key(1)))(), jax.devices()[0]))
  out: dict[str, object] = {'bytes': path.stat().st_size, 'rounds': rounds, 'aim': AIM}
  for dtype in ('bfloat16', 'float32'):
    load = lambda dtype=dtype: pretrained.from_pretrained(folder, param_dtype=dtype)[1]
    read(path)
    load()
    samples: dict[str, list[float]] = {'read': [], 'load': []}
    with contextlib.closing(CompileCounter()) as compiles:
      for _ in range(rounds):
        samples['read'].append(timed(read, path)[0])
        seconds, params = timed(load)
        samples['load'].append(seconds)
        if dtype == SHAPE['param_dtype']:
          total(params)
        del params
      compiled = compiles.names
    ratio = statistics.median(a / b for a, b in zip(samples['read'], samples['load']))
    out[dtype] = {'ratio': ratio, 'compiled': compiled, 'seconds': samples}
  return out


def main():
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--write', action='store_true', help='write the result to results/')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    make(pathlib.Path(folder))
    found = measure(pathlib.Path(folder), arguments.rounds)
  now = datetime.datetime.now()
  result = {'date': now.isoformat(timespec='seconds'), 'processor': platform.processor() or platform.machine(),
            'cores': len(os.sched_getaffinity(0)), 'jax': jax.__version__, 'load': os.getloadavg(), **found}
  text = json.dumps(result, indent=1)
  if arguments.write:
    path = pathlib.Path(__file__).parent / 'results' / f'loading-{now.strftime("%Y-%m-%dT%H%M%S")}.json'
    path.write_text(text + '\n')
  sys.stdout.write(text + '\n')
  own = found[SHAPE['param_dtype']]
  sys.exit(0 if own['ratio'] >= AIM and not own['compiled'] else 1)


if __name__ == '__main__':
  main()
