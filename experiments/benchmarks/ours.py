r"""Measures agentrl on the workload of `rivals/common.py`, through what its training loop uses.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python experiments/benchmarks/ours.py --phase decode --threads 1

Phases: decode (prompts in, 64 sampled tokens out), update (one GRPO update), iteration (rollout, packing, update),
three_turns (turns of 64 tokens with 16-token observations), three_turns_tool (the same, tools sleep 50 ms).
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'rivals'))

import asyncio
import dataclasses
import functools
import time
from typing import NamedTuple

import common
from common import WORKLOAD as W
import jax
import numpy as np

from agentrl.algorithms.grpo import grpo
from agentrl.core.types import Status, Task
from agentrl.metrics import memory
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, num_params
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, Job
from agentrl.sampling.sampler import Sampler
from agentrl.training.optimizer import make_optimizer
from agentrl.training.packing import Outcome, pack, sequences_of
from agentrl.training.state import LearnerState
from agentrl.training.step import make_update


class Rows(NamedTuple):
  """Rows of an update: their tokens, how many, how many in a forward and backward pass, and whether samples share a prompt."""

  length: int
  count: int
  micro: int
  share: bool


# What is kept for the backward pass stays near the core. A row has a sample, or the samples of a question, which have its
# prompt once and a copy of its last token each.
WHOLE = Rows(W.prompt_length + W.new_tokens, W.batch, 4, False)
SHARED = Rows(W.prompt_length + W.group * (W.new_tokens + 1), W.prompts, 2, True)
CONTEXT = W.prompt_length + W.turns * W.new_tokens + (W.turns - 1) * W.observation_length


class Ids:
  """Stands where a tokenizer would: the workload is in ids, and no stop string is asked for."""

  def decode(self, ids) -> str:
    """Returns nothing: nobody reads the text."""
    return ''


def model() -> ModelConfig:
  """Returns the policy of the workload."""
  return ModelConfig(
      vocab_size=W.vocabulary, num_layers=W.layers, width=W.width, ff_width=W.feed_forward, num_heads=W.heads,
      num_kv_heads=W.kv_heads, head_dim=W.head_dim)


@functools.cache
def prompts() -> list[np.ndarray]:
  """Returns the prompts' ids."""
  return list(np.random.default_rng(0).integers(5, W.vocabulary, (W.prompts, W.prompt_length)))


def make_engine(context: int) -> Engine:
  """Returns an engine with a slot for each sequence and new parameters."""
  sampler = Sampler(model(), slots=W.batch, context=context, chunk=32, capacities=sorted({96, *range(128, context, 64), context}),
                    row_buckets=(W.prompts, W.batch), token_buckets=(W.observation_length, W.prompt_length))
  sampler.set_params(init_params(model(), jax.random.key(0)))
  return Engine(sampler, Ids(), limits=Limits(turn_tokens=W.new_tokens, trajectory_tokens=W.turns * W.new_tokens,
                                              context_tokens=context, turns=W.turns))


def jobs(turns: int, tool_seconds: float | None, turn_ends: list[list[float]]) -> list[Job]:
  """Returns the workload's trajectories; each appends to `turn_ends` when a turn of it ended."""
  observation = np.random.default_rng(1).integers(5, W.vocabulary, W.observation_length)

  def program(prompt):
    async def run(session):
      session.append(prompt)
      for turn in range(turns):
        if turn:
          session.append(observation)
        await session.generate()
        turn_ends[turn].append(time.perf_counter())
        if tool_seconds is not None and turn < turns - 1:
          await asyncio.sleep(tool_seconds)
      session.finish(Status.FINISHED)
    return run

  return [Job(Task(str(i), 'benchmark', (), None), k, str(i), program(prompt))
          for i, prompt in enumerate(prompts()) for k in range(W.group)]


def roll(engine: Engine, turns: int, tool_seconds: float | None = None):
  """Returns the trajectories of one rollout and the seconds of each turn, by its last sample."""
  ends: list[list[float]] = [[] for _ in range(turns)]
  start = time.perf_counter()
  trajectories = engine.collect(jobs(turns, tool_seconds, ends))
  edges = [start] + [max(e) for e in ends]
  assert all(t.num_sampled == turns * W.new_tokens for t in trajectories)
  return trajectories, np.diff(edges).tolist()


def decode(reps: int) -> dict:
  """Samples 64 tokens for 8 prompts of 4 samples, prefill included."""
  engine = make_engine(W.prompt_length + W.new_tokens)
  _, times = common.timed(lambda: roll(engine, 1), reps)
  return {**times, 'tokens': W.batch * W.new_tokens, 'parameters': num_params(model())}


def three_turns(reps: int) -> dict:
  """Three turns over the live cache."""
  engine = make_engine(CONTEXT)
  engine.sampler.warm_up()
  turns = []
  _, times = common.timed(lambda: turns.append(roll(engine, W.turns)[1]), reps)
  stats = dataclasses.asdict(engine.stats)
  return {**times, 'tokens': W.batch * W.turns * W.new_tokens, 'turn_seconds': np.median(turns[1:], axis=0).tolist(),
          'parameters': num_params(model()), 'engine': stats}


def three_turns_tool(reps: int) -> dict:
  """The same with a tool that sleeps between turns; in turn with one that returns at once, which tells what it adds."""
  engine = make_engine(CONTEXT)
  engine.sampler.warm_up()
  seconds: dict[float | None, list[float]] = {None: [], common.TOOL_SECONDS: []}
  for _ in range(reps + 1):
    for tool, samples in seconds.items():
      start = time.perf_counter()
      roll(engine, W.turns, tool)
      samples.append(time.perf_counter() - start)
  without, (first, *samples) = seconds[None][1:], seconds[common.TOOL_SECONDS]
  return {**common.summary(samples, first_seconds=first), 'added': [a - b for a, b in zip(samples, without)],
          'tokens': W.batch * W.turns * W.new_tokens, 'parameters': num_params(model())}


class Learner:
  """The update that a GRPO run makes."""

  def __init__(self, rows: Rows):
    optimizer = make_optimizer('adamw', 1e-5)
    params = init_params(model(), jax.random.key(0))
    self.state = LearnerState(params, optimizer.init(params), np.int32(0))
    self._rows, self._micro_batches = rows, rows.count // rows.micro
    self._update = make_update(model(), optimizer, grpo(), micro_batches=self._micro_batches)

  def step(self, sequences):
    """Packs and updates; blocks."""
    random = np.random.default_rng(0)
    outcome = Outcome(np.repeat(np.arange(W.prompts, dtype=np.int32), W.group),
                      random.standard_normal(W.batch).astype(np.float32), np.ones(W.batch, np.float32),
                      np.ones(W.batch, bool))
    batch, used = pack(sequences, outcome, rows=self._rows.count, row_length=self._rows.length,
                       micro_batches=self._micro_batches, share=self._rows.share)
    self.state, metrics = self._update(self.state, batch, np.int32(used))
    jax.block_until_ready((self.state.params, metrics))


def update(reps: int, rows: Rows = SHARED) -> dict:
  """One GRPO update on 32 sequences of 128 tokens: forward, backward, AdamW."""
  engine = make_engine(W.prompt_length + W.new_tokens)
  sequences = sequences_of(roll(engine, 1)[0])
  engine.close()
  learner = Learner(rows)
  _, times = common.timed(lambda: learner.step(sequences), reps)
  return {**times, 'tokens': W.batch * (W.prompt_length + W.new_tokens), 'parameters': num_params(model())}


def update_whole(reps: int) -> dict:
  """The same with every sequence whole, none sharing its prompt."""
  return update(reps, WHOLE)


def iteration(reps: int) -> dict:
  """Weights to the sampler, rollout, packing, update."""
  engine = make_engine(W.prompt_length + W.new_tokens)
  learner = Learner(SHARED)

  def step():
    engine.sampler.set_params(learner.state.params)
    learner.step(sequences_of(roll(engine, 1)[0]))

  _, times = common.timed(step, reps)
  return {**times, 'tokens': W.batch * (W.prompt_length + W.new_tokens), 'parameters': num_params(model())}


PHASES = {f.__name__: f for f in (decode, update, update_whole, iteration, three_turns, three_turns_tool)}

if __name__ == '__main__':
  args = common.arguments(__doc__, PHASES)
  with memory.economical():  # as the training loop does
    common.report('agentrl', args, ['agentrl', 'jax', 'optax'], PHASES[args.phase](args.reps))
  os._exit(0)
