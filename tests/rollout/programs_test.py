"""Random agent programs come to what a slow reference comes to, whatever engine they run on; see `programs.py`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import pathlib
import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import pytest

from agentrl.rollout.engine import Engine, Job
from agentrl.rollout.stream import Order, Stream
from agentrl.sampling.constrain import Grammar
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.sampler import Sampler
from agentrl.sampling.speculation import Speculation
from agentrl.tokens.formats import HermesFormat


def _load():
  # By path: tests are no package.
  spec = importlib.util.spec_from_file_location('programs', pathlib.Path(__file__).with_name('programs.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


programs = _load()
pytestmark = pytest.mark.usefixtures('quick_compile')
GREEDY = SamplingParams(temperature=0.0)
# Of a block of 16 tokens: 2 x 24 tokens are 4 blocks a slot, 8 in all, where one context may need 6.
SETTINGS = {
    '4 slots': (dict(slots=4), {}),
    '16 slots': (dict(slots=16, capacities=(96,)), {}),
    '64 slots': (dict(slots=64, capacities=(96,)), {}),
    'more seats than slots': (dict(slots=2, seats=6, capacities=(96,), room=288), {}),
    'more seats than there is room for': (dict(slots=2, seats=6, capacities=(96,)), {}),
    'swapping at once': (dict(slots=2, capacities=(96,)), dict(patience=0.0)),
    'swapping, little host memory': (dict(slots=2, capacities=(96,)), dict(patience=0.0, parked_bytes=20_000)),
    'no host memory': (dict(slots=2, capacities=(96,)), dict(patience=0.0, parked_bytes=0)),
    'small cache': (dict(slots=4, capacities=(24,)), dict(patience=0.0)),
    'small cache, no host memory': (dict(slots=4, capacities=(24,)), dict(patience=0.0, parked_bytes=0)),
    'small cache, much patience': (dict(slots=4, capacities=(24,)), dict(patience=10.0)),
    'a cache of one context': (dict(slots=3, capacities=(32,)), dict(patience=0.0, parked_bytes=40_000)),
    'nothing shared': (dict(slots=4, share=False), {}),
    'speculation': (dict(slots=4, speculation=Speculation(3, ngram=1)), {}),
}


CONSTRAINED = {name: dict(constrained=True, capacities=(96,), **more) for name, more in {
    '4 slots': dict(slots=4), '16 slots': dict(slots=16),
    'speculation': dict(slots=4, speculation=Speculation(3, ngram=1))}.items()}
TOOLS = [
    {'name': 'a', 'parameters': {'type': 'object', 'required': ['x'], 'properties': {
        'x': {'enum': ['l', 'r', 1]}, 'y': {'type': 'boolean'}}}},
    {'name': 'b', 'parameters': {'type': 'object', 'properties': {}}},
]


class CallsOnly(HermesFormat):
  """Every turn is one call: a random policy would open one in hundreds of tokens."""

  def grammar(self, tools, ids):
    found = super().grammar(tools, ids)
    first, rest = found.turn.split('\n', 1)
    return found._replace(turn=first.replace('(TEXT? ', '').replace(')* TEXT?', '') + '\n' + rest)


def some(part):
  """A share of the examples that the profile asks for."""
  return settings(max_examples=max(1, settings.default.max_examples // part))


@pytest.fixture(scope='module', name='reference')
def slow_reference(tiny):
  return programs.Reference(tiny)


@contextlib.contextmanager
def engine_of(tiny, sampler, settings_, **more):
  sampler = sampler if isinstance(sampler, Sampler) else tiny.sampler(**sampler)
  made = Engine(sampler, tiny.tokenizer, limits=programs.LIMITS, **settings_, **more)
  try:
    yield made
  finally:
    made.close()


async def sleep(milliseconds):
  """Waits as long as it happens to take: real time, another at every call."""
  await asyncio.sleep(random.uniform(0.0, 2.0) * milliseconds / 1000)


def jobs_of(tiny, batch):
  """(task, sample, program), of each pair the same task."""
  return [(tiny.task(i // 2), i % 2, program) for i, program in enumerate(batch)]


def engine_jobs(jobs, waits=sleep):
  return [Job(task, sample, task.id, functools.partial(programs.play, program=program, sleep=waits))
          for task, sample, program in jobs]


@pytest.mark.parametrize('setting', SETTINGS)
@some(5)
@given(batch=programs.BATCHES)
def test_programs_come_to_what_the_reference_comes_to(tiny, reference, setting, batch):
  jobs = jobs_of(tiny, batch)
  with engine_of(tiny, *SETTINGS[setting]) as engine:
    got = engine.collect(engine_jobs(jobs))
  programs.check(reference, jobs, got)


@pytest.fixture(scope='module', name='greedy')
def greedy_reference(tiny):
  return programs.Reference(tiny, GREEDY)


@pytest.mark.parametrize('more', [{}, dict(speculation=Speculation(3, ngram=1))], ids=['plain', 'speculation'])
@some(5)
@given(batch=programs.BATCHES)
def test_the_most_likely_tokens(tiny, greedy, more, batch):
  jobs = jobs_of(tiny, batch)
  with engine_of(tiny, dict(slots=4, sampling=GREEDY, **more), dict(patience=0.0)) as engine:
    got = engine.collect(engine_jobs(jobs))
  programs.check(greedy, jobs, got)


@pytest.fixture(scope='module', name='caller')
def calling_policy(tiny):
  """A random policy whose tokenizer writes calls in few pieces."""
  texts = [json.dumps({'name': t['name'], 'arguments': {'x': 'l', 'y': True}}) for t in TOOLS] * 20
  return type(tiny)(('<tool_call>', '</tool_call>'), [*texts, 'some words of text'])


@pytest.fixture(scope='module', name='constrained')
def constrained_reference(caller):
  grammar = Grammar(CallsOnly(), TOOLS, caller.tokenizer, [caller.tokenizer.end_id])
  return programs.Reference(caller, grammar=grammar)


@pytest.mark.parametrize('setting', CONSTRAINED)
@some(5)
@given(batch=programs.BATCHES)
def test_constrained_programs(caller, constrained, setting, batch):
  jobs = jobs_of(caller, batch)
  with engine_of(caller, CONSTRAINED[setting], dict(patience=0.0), grammar=constrained.grammar) as engine:
    got = engine.collect(engine_jobs(jobs))
  programs.check(constrained, jobs, got)


@pytest.fixture(scope='module', name='two_policies')
def reference_of_two_policies(tiny):
  reference = programs.Reference(tiny)
  reference.set_params(jax.tree.map(lambda x: x * 1.05, tiny.params), 'other')
  return reference


@pytest.mark.parametrize('setting', ['4 slots', 'swapping at once', 'small cache'])
@some(5)
@given(batch=programs.BATCHES, place=st.integers(1, 8), asked=programs.PROMPTS, run=programs.PROGRAMS)
def test_sessions_of_another_policy(tiny, two_policies, setting, batch, place, asked, run):
  sampler, settings_ = SETTINGS[setting]
  sampler = tiny.sampler(**sampler)
  sampler.set_params(jax.tree.map(lambda x: x * 1.05, tiny.params), 'other')
  jobs = jobs_of(tiny, [programs.with_others(p, place, asked, run) for p in batch])
  with engine_of(tiny, sampler, settings_) as engine:
    got = engine.collect(engine_jobs(jobs))
  programs.check(two_policies, jobs, got)


# ---- kill and resume --------------------------------------------------------------------------------


def through_streams(tiny, setting, jobs, waits, sleep_in=lambda place: sleep):
  """Returns what a chain of streams collects, each ended in the middle and followed by one made of its snapshot.

  Also returns how many of them were ended with a group half drawn. `sleep_in` says how the stream at a place waits.
  """
  got, snapshot, stopped = [], None, 0
  for place, wait in enumerate((*waits, None)):
    by_task = {}
    for job, (task, *_) in zip(engine_jobs(jobs, sleep_in(place)), jobs):
      by_task.setdefault(task.id, []).append(job)
    with engine_of(tiny, *setting) as engine, contextlib.closing(
        Stream(engine, staleness=len(by_task), overlap=True)) as stream:
      stream.take_weights(tiny.params, 0)
      if snapshot is None:
        stream.ask([Order(group, name) for name, group in by_task.items()])
      else:
        stream.restore(snapshot, by_task.get)
      while stream.under_way:
        got += [t for group in stream.take(1) for t in group]
        if wait is not None:
          break
      if wait is not None:
        time.sleep(wait / 1000)
        snapshot = json.loads(json.dumps(stream.snapshot()))
        stopped += any(g['trajectories'] is None for g in snapshot['groups'])
  order = {task.id: i for i, (task, *_) in enumerate(jobs)}
  return sorted(got, key=lambda t: (order[t.task.id], t.sample, t.path)), stopped


# A turn that is taken back after a while is no function of what was drawn and told, so that it cannot be run again.
@pytest.mark.parametrize('setting', ['4 slots', 'small cache', 'speculation'])
@some(7)
@given(batch=programs.BATCHES, waits=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_what_is_killed_and_resumed(tiny, reference, setting, batch, waits):
  jobs = jobs_of(tiny, [programs.without(p, 'cancel') for p in batch])
  got, _ = through_streams(tiny, SETTINGS[setting], jobs, waits)
  programs.check(reference, jobs, got)


def test_a_chain_of_streams_is_interrupted_in_the_middle(tiny, reference):
  """So that the test above is about something: each but the last ends while programs wait for a later one."""
  def sleep_in(place):
    async def wait(first):
      if first > place:
        await asyncio.get_running_loop().create_future()
    return wait
  turn = lambda first: (('generate', (), 3), ('call', first))
  program = lambda first: (('append', list(range(20, 60))), *(3 * turn(0)), *turn(first), ('finish',))
  jobs = jobs_of(tiny, [program(n) for n in (0, 0, 1, 1, 2, 2, 2, 2)])
  got, stopped = through_streams(tiny, SETTINGS['4 slots'], jobs, [0, 0], sleep_in)
  assert stopped == 2
  programs.check(reference, jobs, got)
