r"""Decode steps with and without speculation, where tools' answers are quoted back.

    taskset -c 0 python experiments/benchmarks/engine_speculation.py

The policy is written down rather than trained: two layers that look for an earlier occurrence of the last token and
copy what followed it, and draw from all tokens alike where there was none. Six more layers change nothing and cost what
layers cost. A trajectory alternates free text with observations of which every token is then quoted.

Writes `results/engine-speculation-<date>.json` beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import datetime
import itertools
import json
import math
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from agentrl.core.types import Status, Task
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, num_params, param_specs
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, EngineStats, Job
from agentrl.sampling.sampler import Sampler
from agentrl.sampling.speculation import Speculation

_RESULTS = pathlib.Path(__file__).resolve().parent / 'results'
FREE, QUOTED, CYCLES, PROMPT, SLOTS = 16, 40, 3, 24, 32
SESSIONS = 3 * SLOTS  # so that a slot that is done early finds more to do
CONTEXT = PROMPT + CYCLES * (2 * (QUOTED + 2) + FREE + 2)
BEGIN, QUOTE, SEPARATORS, WORDS = 0, 1, 2, 100  # ids: first of a context, around quotes, before free text, all others
LAYERS = 8
SCORE = 80.0  # of the attention to a match


def model() -> ModelConfig:
  """Returns the benchmarks' shape; the first layer sees two tokens."""
  return ModelConfig(vocab_size=4096, num_layers=LAYERS, width=256, ff_width=768, num_heads=8, num_kv_heads=4,
                     head_dim=32, tied_embeddings=False, windows=(2, *[0] * (LAYERS - 1)), rope_theta=1e38,
                     local_rope_theta=1e4)


def copier(config: ModelConfig, sharpness: float = 0.26) -> dict:
  """Returns weights that copy.

  A token is a vector of 52 signs. Layer 0 adds the signs of the token before; layer 1 looks for the place where those
  are the present token's, and adds the signs of the token there; the head reads them. With so large a base of the
  rotary frequencies all pairs but the first two stand still, and those are not used there. A place of weight between a
  match and none, the first of the context, holds nothing to copy.

  Args:
    config: Of `model`.
    sharpness: Of the head.
  """
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: np.full(s.shape, float(s.scale is None), np.float32), param_specs(config),
                        is_leaf=lambda x: isinstance(x, ParamSpec))
  half = np.r_[2:15, 18:31]  # of a head, what does not turn
  signs = rng.choice([-1.0, 1.0], (config.vocab_size, 2 * len(half)))
  signs[BEGIN] = 0.0
  size = signs.shape[1]
  token, before, copied = (np.arange(size) + k * size for k in range(3))
  one, begin = 3 * size, 3 * size + 1
  params['embedding'][:, token], params['embedding'][:, one], params['embedding'][BEGIN, begin] = signs, 1.0, 1.0
  params['head'][:, copied] = sharpness * signs
  scale = lambda ones: math.sqrt(config.width / ones)  # of an entry of 1 after the norm
  qkv, out = params['layers']['qkv'], params['layers']['out']  # [L, D, K, H/K + 2, Dh] and [L, K, H/K, Dh, D]
  query, key, value = 0, config.group_size, config.group_size + 1
  for head in (0, 1):
    part = slice(head * len(half), (head + 1) * len(half))
    qkv[0, one, head, query, [0, 16]] = 300 * np.array([math.cos(1), -math.sin(1)])  # greatest one token back
    qkv[0, one, head, key, 0] = 1.0
    qkv[0, token[part], head, value, half] = 1 / scale(size + 1)
    out[0, head, 0, half, before[part]] = 1.0
    match = SCORE * math.sqrt(config.head_dim) / len(half) / scale(2 * size + 1)**2  # for equal signs
    qkv[1, token[part], head, query, half] = match
    qkv[1, before[part], head, key, half] = 1.0
    qkv[1, one, head, query, 15] = 0.85 * SCORE * math.sqrt(config.head_dim) / scale(2 * size + 1)
    qkv[1, begin, head, key, 15] = 1 / scale(2)
    qkv[1, token[part], head, value, half] = 1 / scale(2 * size + 1)
    out[1, head, 0, half, copied[part]] = 1.0
  return params


class Ids:
  """Stands where a tokenizer would: the workload is in ids, and no stop string is asked for."""

  def decode(self, ids) -> str:
    """Returns nothing: nobody reads the text."""
    return ''


def jobs() -> list[Job]:
  """Returns the trajectories to collect."""

  def program(number):
    async def run(session):
      # No word twice: the policy remembers one token, and would not know which place to go on from.
      deck = iter(np.random.default_rng(number).permutation(np.arange(WORDS, 4096)).tolist())
      words = lambda n: list(itertools.islice(deck, n))
      session.append([BEGIN, *words(PROMPT - 1)])
      for cycle in range(CYCLES):
        session.append([SEPARATORS + 2 * cycle])
        await session.generate(max_tokens=FREE)
        mark = SEPARATORS + 2 * cycle + 1
        session.append([mark, *words(QUOTED), QUOTE, mark])
        await session.generate(max_tokens=QUOTED)
      session.finish(Status.FINISHED)
    return run

  return [Job(Task(str(i), 'benchmark', (), None), 0, str(i), program(i)) for i in range(SESSIONS)]


def measure(engine: Engine, reps: int) -> tuple[dict, list]:
  """Returns what `reps` collections took, and the trajectories of the last one."""
  seconds = []
  for _ in range(reps + 1):
    engine.stats, start = EngineStats(), time.perf_counter()
    trajectories = engine.collect(jobs())
    seconds.append(time.perf_counter() - start)
  stats = engine.stats
  sampled = sum(t.num_sampled for t in trajectories)
  return {'steps': stats.steps, 'tokens': sampled, 'decode_seconds': stats.decode_seconds,
          'seconds': statistics.median(seconds[1:]), 'samples': [round(s, 3) for s in seconds[1:]]}, trajectories


def quoted_share(trajectories) -> float:
  """Returns the share of turns' tokens after an observation that are the observation's."""
  right = total = 0
  for t in trajectories:
    tokens = t.segments[0].tokens
    for turn in t.turns[1::2]:
      total += turn.end - turn.start
      shown = tokens[turn.start - 2 - QUOTED:turn.start - 2]
      right += int((tokens[turn.start:turn.end] == shown[:turn.end - turn.start]).sum())
  return right / total


def main():
  """Measures without speculation, then with more and more tokens proposed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--reps', type=int, default=3)
  parser.add_argument('--tokens', default='1,3,7', help='proposed a step, one run each')
  parser.add_argument('--chunk', type=int, default=16)
  args = parser.parse_args()
  config, params, runs = model(), copier(model()), {}
  plain = None
  for tokens in (0, *map(int, args.tokens.split(','))):
    speculation = Speculation(tokens, ngram=2) if tokens else None
    sampler = Sampler(config, slots=SLOTS, context=CONTEXT, chunk=args.chunk, capacities=(CONTEXT,), row_buckets=(SLOTS,),
                      token_buckets=(QUOTED + 2,), speculation=speculation)
    sampler.set_params(params)
    engine = Engine(sampler, Ids(), limits=Limits(turn_tokens=QUOTED, trajectory_tokens=CONTEXT, context_tokens=CONTEXT))
    found, trajectories = measure(engine, args.reps)
    engine.close()
    plain = plain or (found, trajectories)
    same = [np.array_equal(a.segments[0].tokens, b.segments[0].tokens) for a, b in zip(plain[1], trajectories)]
    runs[tokens] = {**found, 'fewer_steps': plain[0]['steps'] / found['steps'],
                    'faster': plain[0]['seconds'] / found['seconds'], 'identical_trajectories': sum(same)}
    print(json.dumps({'proposed': tokens, **runs[tokens]}), flush=True)
  record = {'policy': f'copies by construction, {num_params(config)} parameters', 'slots': SLOTS, 'sessions': SESSIONS,
            'free_tokens': FREE * CYCLES, 'quoted_tokens': QUOTED * CYCLES, 'chunk': args.chunk,
            'quoted_share': quoted_share(plain[1]), 'by_proposed_tokens': runs, 'jax': jax.__version__,
            'processor': platform.processor() or platform.machine(), 'load': os.getloadavg()}
  date = datetime.datetime.now().strftime('%Y-%m-%dT%H%M%S')
  (_RESULTS / f'engine-speculation-{date}.json').write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  main()
