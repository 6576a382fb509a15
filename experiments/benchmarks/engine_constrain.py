r"""Calls under a grammar: how many are invalid, and what the masks cost.

    taskset -c 0 python experiments/benchmarks/engine_constrain.py

Validity: a policy with random weights writes calls for 20 tools with nested schemas; every turn is one call, as a random
policy would open one in thousands of tokens. A call counts as invalid if the format's parser or the executor's check of
arguments finds anything wrong with it; one that the turn's budget cut is counted apart.

Cost: decoding 64 tokens in each of 32 slots, 8 layers x 256, vocabulary 4,096, all slots within a call all the time,
against the same policy without a grammar, in turns. Seconds are given by the clock and of the processor, which on a busy
machine is the one to read.

Writes `results/engine-constrain-<date>.json` beside this file.
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import collections
import datetime
import json
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from agentrl.core.types import Status, Task
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, EngineStats, Job
from agentrl.sampling.constrain import Grammar
from agentrl.sampling.sampler import Sampler
from agentrl.tokens.formats import HermesFormat
from agentrl.tokens.tokenizer import train_tokenizer
from agentrl.tools import schema as schemas

_RESULTS = pathlib.Path(__file__).resolve().parent / 'results'
FORMAT = HermesFormat()
VOCABULARY, SLOTS, NEW_TOKENS = 4096, 32, 64


class CallsOnly(HermesFormat):
  """Every turn is one call."""

  def grammar(self, tools, ids):
    """See CallFormat."""
    found = super().grammar(tools, ids)
    first, rest = found.turn.split('\n', 1)
    return found._replace(turn=first.replace('(TEXT? ', '').replace(')* TEXT?', '') + '\n' + rest)


def random_schema(rng: np.random.Generator, depth: int) -> dict:
  """Returns a JSON schema; nested ones hold objects and arrays."""
  kinds = ['string', 'integer', 'number', 'boolean', 'enum', 'either'] + ['object', 'array'] * (2 if depth else 0)
  kind = kinds[rng.integers(len(kinds))]
  if kind == 'enum':
    return {'enum': [['fast', 'slow'], [1, 2.5, None, True, 'x'], ['north', 'south', 'east', 'west']][rng.integers(3)]}
  if kind == 'either':
    return {'anyOf': [{'type': 'integer'}, {'type': 'null'}]}
  if kind == 'array':
    return {'type': 'array', 'items': random_schema(rng, depth - 1), 'maxItems': 4}
  return random_object(rng, depth - 1) if kind == 'object' else {'type': kind}


def random_object(rng: np.random.Generator, depth: int) -> dict:
  """Returns the schema of an object, some of whose properties are optional."""
  names = rng.choice(['query', 'limit', 'where', 'order', 'unit', 'tags', 'from', 'to'], rng.integers(1, 5), replace=False)
  required = [str(n) for n in names if rng.random() < 0.5]
  return {'type': 'object', 'properties': {str(n): random_schema(rng, depth) for n in names}, 'required': required}


def tools_of(count: int) -> list[dict]:
  """Returns tools whose schemas are nested three deep."""
  rng = np.random.default_rng(0)
  return [{'name': f'tool_{i}', 'parameters': random_object(rng, 3)} for i in range(count)]


def make_tokenizer():
  """Returns a tokenizer of JSON and words."""
  rng = np.random.default_rng(1)
  letters = np.array(list('abcdefghijklmnopqrstuvwxyz'))
  words = [''.join(rng.choice(letters, rng.integers(2, 8))) for _ in range(3000)]
  texts = [json.dumps({'name': f'tool_{i % 20}', 'arguments': {'query': ' '.join(rng.choice(words, 4)), 'limit': i,
                                                               'where': {'tags': ['fast', None], 'unit': 1.5}}})
           for i in range(3000)]
  return train_tokenizer([*texts, *words], markers=FORMAT.markers, vocab_size=VOCABULARY)


def model(layers: int, width: int) -> ModelConfig:
  """Returns a policy's shape."""
  return ModelConfig(vocab_size=VOCABULARY, num_layers=layers, width=width, ff_width=3 * width, num_heads=width // 32,
                     num_kv_heads=width // 64, head_dim=32)


def make_engine(config: ModelConfig, tokenizer, grammar: Grammar | None, turn_tokens: int) -> Engine:
  """Returns an engine of new parameters."""
  context = turn_tokens + 32
  sampler = Sampler(config, slots=SLOTS, context=context, chunk=16, capacities=(context,), row_buckets=(SLOTS,),
                    token_buckets=(16,), constrained=grammar is not None)
  sampler.set_params(init_params(config, jax.random.key(0)))
  return Engine(sampler, tokenizer, grammar=grammar, limits=Limits(
      turn_tokens=turn_tokens, trajectory_tokens=turn_tokens, context_tokens=context))


def jobs(count: int) -> list[Job]:
  """Returns trajectories of one turn."""

  async def program(session):
    session.append(np.random.default_rng(session.trajectory.sample).integers(400, 4000, 16))
    await session.generate(stops=FORMAT.stops)
    session.finish(Status.FINISHED)

  return [Job(Task('t', 'benchmark', (), None), k, 'g', program) for k in range(count)]


def validity(samples: int, turn_tokens: int, tokenizer) -> dict:
  """Returns how many calls came of random turns, and what was wrong with them."""
  tools = tools_of(20)
  parameters = {t['name']: t['parameters'] for t in tools}
  engine = make_engine(model(2, 64), tokenizer, Grammar(CallsOnly(), tools, tokenizer, [tokenizer.end_id]), turn_tokens)
  count, wrong, by_tool, masks = collections.Counter(), [], collections.Counter(), set()
  start = time.perf_counter()
  for t in engine.collect(jobs(samples)):
    [turn] = t.turns
    masks |= set(t.segments[0].masks)
    count[turn.stop_reason] += 1
    if turn.stop_reason != 'stop':
      continue
    calls = FORMAT.parse(turn.text)
    problems = [c.error or schemas.problem(c.arguments, parameters[c.name]) for c in calls]
    by_tool.update(c.name for c in calls)
    if len(calls) != 1 or any(problems):
      wrong.append((turn.text, problems))
  engine.close()
  return {'samples': samples, 'turn_tokens': turn_tokens, 'valid': count['stop'] - len(wrong), 'invalid': len(wrong),
          'examples': wrong[:3], 'cut_by_the_budget': count['length'], 'tools_called': len(by_tool),
          'distinct_masks': len(masks - {None}), 'seconds': time.perf_counter() - start}


def cost(reps: int, tokenizer) -> dict:
  """Returns seconds of decoding with and without masks, a pair a repetition."""
  longest = {'type': 'object', 'properties': {'query': {'type': 'string', 'minLength': 2000}}, 'required': ['query']}
  tools = [*tools_of(19), {'name': 'search', 'parameters': longest}]
  # A tool whose argument does not end within the turn, so that all slots are in a call all the time.
  grammar = Grammar(CallsOnly(), tools[-1:], tokenizer, [tokenizer.end_id])
  engines = {name: make_engine(model(8, 256), tokenizer, g, NEW_TOKENS) for name, g in (('free', None), ('masked', grammar))}
  wall, cpu = collections.defaultdict(list), collections.defaultdict(list)
  for rep in range(reps + 1):
    for name, engine in engines.items():
      engine.stats, began, used = EngineStats(), time.perf_counter(), time.process_time()
      trajectories = engine.collect(jobs(SLOTS))
      if rep:
        wall[name].append(time.perf_counter() - began)
        cpu[name].append(time.process_time() - used)
      assert all(t.num_sampled == NEW_TOKENS for t in trajectories)
  for engine in engines.values():
    engine.close()
  share = lambda seconds: statistics.median(m / f - 1 for m, f in zip(seconds['masked'], seconds['free']))
  return {'slots': SLOTS, 'tokens': NEW_TOKENS, 'seconds': wall, 'processor_seconds': cpu, 'added_by_the_clock': share(wall),
          'added_of_the_processor': share(cpu)}


def main():
  """Runs both."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--samples', type=int, default=10_000)
  parser.add_argument('--turn-tokens', type=int, default=256)
  parser.add_argument('--reps', type=int, default=9)
  args = parser.parse_args()
  tokenizer = make_tokenizer()
  record = {'cost': cost(args.reps, tokenizer), 'validity': validity(args.samples, args.turn_tokens, tokenizer),
            'pieces': tokenizer.vocab_size, 'jax': jax.__version__, 'processor': platform.processor() or platform.machine(),
            'load': os.getloadavg()}
  print(json.dumps({**record['cost'], **record['validity']}, indent=1))
  date = datetime.datetime.now().strftime('%Y-%m-%dT%H%M%S')
  (_RESULTS / f'engine-constrain-{date}.json').write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  main()
