"""A stage for agents: the real chain world, tools and engine, and a policy whose script is in its weights.

Its keys and values are zero, so that a token alone decides what may follow it: the head's rows are
the log-probabilities that a test gives. Nothing else is made up.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from agentrl import tools
from agentrl.agents import base as agents
from agentrl.core.types import Iteration, Message, Task
from agentrl.data.chains import solve
from agentrl.envs.chains import ChainEnvironment
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.rewards import base as rewards
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, Job
from agentrl.sampling.sampler import Sampler
from agentrl.tokens import formats
from agentrl.tokens.chat import ChatTemplate
from agentrl.tokens.tokenizer import train_tokenizer

CONTEXT = 128
SLOTS = 8
DIGITS = '0123456789'
# Asks, at times without closing the call, answers, at times with a call's end that was not opened:
# everything that can go wrong does.
BABBLE = {
    '<|assistant|>': {'<lookup>': 0.7, **{d: 0.03 for d in DIGITS}},
    '<lookup>': {'F': 0.6, 'G': 0.4},
    'F': {d: 0.1 for d in DIGITS}, 'G': {d: 0.1 for d in DIGITS},
    **{d: {'</lookup>': 0.7, '<|end|>': 0.3} for d in DIGITS},
}


class Stage:
  """Environment, template and one sampler for all scripts."""

  def __init__(self, executor):
    call_format = formats.make('xml', list(executor.tools.values()))
    self.tokenizer = train_tokenizer(['4FG+3 lookup noise 0123456789 FGHKPQ busy no fact'] * 9,
                                     markers=call_format.markers, vocab_size=320, digit_group=1)
    self.environment = ChainEnvironment(executor, call_format, system_prompt='', max_turns=6)
    self.template = ChatTemplate(self.tokenizer, call_format.stops)
    v = self.tokenizer.vocab_size
    self.config = ModelConfig(vocab_size=v, num_layers=1, width=v, ff_width=2, num_heads=1, num_kv_heads=1,
                              head_dim=2, tied_embeddings=False)
    self.sampler = Sampler(self.config, slots=SLOTS, context=CONTEXT, capacities=(CONTEXT,), chunk=4,
                           row_buckets=(SLOTS,), token_buckets=(16,))

  def piece(self, text):
    """Returns the id of a text that is one piece."""
    [found] = self.tokenizer.encode(text, allow_markers=True)
    return found

  def script(self, follows=None):
    """Sets weights under which each token is followed by others with the given probabilities."""
    v = self.tokenizer.vocab_size
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), param_specs(self.config),
                          is_leaf=lambda x: isinstance(x, ParamSpec))
    params['embedding'], params['final_norm'] = np.eye(v, dtype=np.float32), np.ones(v, np.float32)
    for a, successors in (follows or BABBLE).items():
      for b, probability in successors.items():
        # The norm makes a one-hot state sqrt(V) long: what is not listed is 36 nats away.
        params['head'][self.piece(b), self.piece(a)] = 2.0 + math.log(probability) / math.sqrt(v)
    self.params = params
    self.sampler.set_params(params)

  def task(self, number=0, steps=('F', 'G')):
    """Returns a task: a chain from digit `number` % 10."""
    truth = solve(number % 10, list(steps), table=number)
    return Task(f'chain-{number}', 'chains', (Message('user', f'{number % 10}{"".join(steps)}'),), truth,
                {'family': f'{len(steps)}_hops'})

  def agent(self, name, **options):
    """Returns an agent of this stage."""
    return agents.make(name, self.environment, self.template, options)

  def run(self, agent, tasks, n, *, iteration=None, seed=0, learn=False, sampler=None, **limits):
    """Returns the trajectories of a group for each task."""
    iteration = iteration or Iteration(0, 10)
    limits = Limits(**{**dict(turn_tokens=12, trajectory_tokens=96, context_tokens=CONTEXT, turns=6), **limits})
    engine = Engine(sampler or self.sampler, self.tokenizer, limits=limits, seed=seed)
    try:
      jobs = [Job(task, k, task.id, program) for task in tasks
              for k, program in enumerate(agent.programs(task, n, iteration))]
      got = engine.collect(jobs)
    finally:
      engine.close()
    if learn:
      rewards.make('chains').score(got, Iteration(iteration.step, iteration.steps))
      agent.learn(got, iteration)
    return got


@pytest.fixture(scope='session', name='chain_executor')
def shared_executor():
  with tools.Executor([tools.make('lookup'), tools.make('noise')]) as executor:
    yield executor


@pytest.fixture(scope='session', name='_stage')
def one_stage(chain_executor):
  return Stage(chain_executor)


@pytest.fixture(name='stage')
def scripted_stage(_stage):
  """The stage, its policy babbling."""
  _stage.script()
  return _stage
