"""Tests of the plain agent with the real environment, tools and engine, and a scripted policy.

The script is in the weights: the policy's keys and values are zero, so a token alone decides what
follows it, and its head is made of rows that send each token to the next one of the script.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from agentrl import envs, tools
from agentrl.agents.react import react
from agentrl.core.types import Boundary, Status
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, Job
from agentrl.sampling.sampler import Sampler
from agentrl.tokens import formats
from agentrl.tokens.chat import ChatTemplate


@pytest.fixture(scope='module', name='executor')
def shared_executor():
  with tools.Executor([tools.make('python', workers=1), tools.make('calculator')]) as executor:
    yield executor


class Stage:
  """Environment, template and one sampler for all scripts."""

  def __init__(self, tiny, executor, slots=2):
    self.tiny, self.tokenizer = tiny, tiny.tokenizer
    call_format = formats.xml_format(list(executor.tools.values()))
    self.environment = envs.make('tools', executor=executor, call_format=call_format,
                                 system_prompt='', max_turns=4)
    self.template = ChatTemplate(self.tokenizer, call_format.stops)
    v = self.tokenizer.vocab_size
    self.config = ModelConfig(vocab_size=v, num_layers=1, width=v, ff_width=2, num_heads=1,
                              num_kv_heads=1, head_dim=2, tied_embeddings=False)
    self.sampler = Sampler(self.config, slots=slots, context=96, capacities=(96,),
                           row_buckets=(slots,), token_buckets=(32,))

  def script(self, follows):
    """Sets weights under which token `b` follows token `a` for each (a, b), nearly surely."""
    v = self.tokenizer.vocab_size
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), param_specs(self.config),
                          is_leaf=lambda x: isinstance(x, ParamSpec))
    params['embedding'], params['final_norm'] = np.eye(v, dtype=np.float32), np.ones(v, np.float32)
    for a, b in follows:
      assert not params['head'][:, a].any(), 'a token has one successor'
      params['head'][b, a] = 2.0  # The norm makes a one-hot state sqrt(V) long: 36 nats.
    self.sampler.set_params(params)

  def run(self, task, n=1, **limits):
    limits = Limits(**{**dict(turn_tokens=32, context_tokens=96, turns=4), **limits})
    engine = Engine(self.sampler, self.tokenizer, limits=limits)
    try:
      program = react(self.environment, self.template, task)
      return engine.collect([Job(task, i, task.id, program) for i in range(n)])
    finally:
      engine.close()


@pytest.fixture(scope='module', name='stage')
def shared_stage(tiny, executor):
  return Stage(tiny, executor)


def chain(*tokens):
  return list(zip(tokens, tokens[1:]))


def test_a_call_is_run_read_and_answered(stage, tiny):
  t = stage.tokenizer
  assistant, opened, closed = map(t.id_of, ('<|assistant|>', '<calculator>', '</calculator>'))
  # "<calculator>7*6</calculator>" whenever asked: after '*' nothing but 6 and the end can come.
  star = t.encode('7*6')
  assert len(star) == 3
  stage.script(chain(assistant, opened, *star, closed))
  [got] = stage.run(tiny.task(), turns=2)
  text = t.decode(got.segments[0].tokens)
  call = '<|assistant|><calculator>7*6</calculator>'
  asked_again = f'{call}<|tool|>42<|end|>'
  assert text == f'<|user|>What is 0 + 1?<|end|>{asked_again}{asked_again}<|assistant|>'
  assert [r.text for r in got.results] == ['42', '42'] and all(r.ok for r in got.results)
  assert got.turns[0].calls[0].arguments == {'expression': '7*6'}
  # Prompt and observations, each with the marker that opens a turn, are never trained on.
  sampled = t.decode(got.segments[0].tokens[got.segments[0].sampled])
  assert sampled == 2 * '<calculator>7*6</calculator>'
  assert (got.status, got.boundary) == (Status.TURN_LIMIT, Boundary.POLICY)


def test_an_answer_finishes(stage, tiny):
  t = stage.tokenizer
  stage.script(chain(t.id_of('<|assistant|>'), *t.encode('42'), t.end_id))
  many = stage.run(tiny.task(), n=5)
  for got in many:
    assert (got.status, got.answer, got.boundary, got.detail) == (Status.FINISHED, '42', None, '')
    assert [turn.stop_reason for turn in got.turns] == ['stop']
    assert got.turns[0].text == '42<|end|>'


def test_the_environments_own_turn_limit_is_recorded_with_its_reason(stage, tiny, executor):
  t = stage.tokenizer
  stage.script(chain(t.id_of('<|assistant|>'), t.id_of('<python>'), *t.encode('1'),
                     t.id_of('</python>')))
  [got] = stage.run(tiny.task(), turns=9)
  assert (got.status, got.boundary) == (Status.TURN_LIMIT, Boundary.POLICY)
  assert got.detail == 'no answer within 4 turns' and len(got.turns) == 4
  # The same call a second and third time: once more is allowed, then it is refused.
  assert [r.error for r in got.results] == [None, None, 'repeated']
  assert not got.turns[3].results and len(got.turns[3].calls) == 1


def test_a_malformed_call_is_an_observation(stage, tiny):
  t = stage.tokenizer
  stage.script(chain(t.id_of('<|assistant|>'), t.id_of('<python>'), t.end_id))
  [got] = stage.run(tiny.task(), turns=2)
  assert [r.text for r in got.results] == ['error: <python> is not closed'] * 2
  assert [r.error for r in got.results] == ['malformed'] * 2


def test_a_turn_without_end_runs_out_of_tokens(stage, tiny):
  t = stage.tokenizer
  [letter] = t.encode('7')
  stage.script([(t.id_of('<|assistant|>'), letter), (letter, letter)])
  [got] = stage.run(tiny.task(), turn_tokens=10)
  assert (got.status, got.boundary) == (Status.LENGTH, Boundary.POLICY)
  assert got.detail == 'turn 0 ran out of tokens (length)' and got.turns[0].text == '7' * 10
  [got] = stage.run(tiny.task(), turn_tokens=90)
  assert got.detail == 'turn 0 ran out of tokens (context)'
  assert len(got.segments[0]) == 96


def test_a_prompt_without_room_is_the_environments_fault(stage, tiny):
  task = dataclasses.replace(tiny.task(), messages=tiny.task().messages * 40)
  [got] = stage.run(task)
  assert (got.status, got.boundary) == (Status.LENGTH, Boundary.ENVIRONMENT)
  assert 'of the 96 tokens' in got.detail and not got.turns


class Recording:
  """The real environment, noting which episodes were closed; one fails in its step if asked to."""

  def __init__(self, environment, fail=False):
    self.environment, self.fail, self.stops = environment, fail, environment.stops
    self.seeds, self.closed = [], 0

  async def open(self, task, seed):
    self.seeds.append(seed)
    episode, outer = await self.environment.open(task, seed), self

    class Episode:
      messages = episode.messages

      async def step(self, turn, stop_reason):
        if outer.fail:
          raise OSError('the server is gone')
        return await episode.step(turn, stop_reason)

      async def close(self):
        outer.closed += 1
        await episode.close()

    return Episode()


@pytest.mark.parametrize('fail', [False, True])
def test_episodes_are_closed_however_they_end_and_have_seeds_of_their_own(stage, tiny, fail):
  t = stage.tokenizer
  stage.script(chain(t.id_of('<|assistant|>'), *t.encode('42'), t.end_id))
  real, stage.environment = stage.environment, Recording(stage.environment, fail)
  try:
    got = stage.run(tiny.task(), n=3)
    assert stage.environment.closed == 3 and len(set(stage.environment.seeds)) == 3
  finally:
    stage.environment = real
  if fail:
    assert {x.detail for x in got} == {'OSError: the server is gone'}
    expected = (Status.ENVIRONMENT_FAILURE, Boundary.ENVIRONMENT)
    assert {(x.status, x.boundary) for x in got} == {expected}
