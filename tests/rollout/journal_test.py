"""A program run again from its journal comes back to where it was, and draws on as if it had never stopped.

Expected values are those of the same program run through once; what follows a restart is exact because a draw depends
on its key, its position and its context alone.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from agentrl.core.types import Status, Task, ToolCall
from agentrl.rollout import journal as journals_lib
from agentrl.rollout.engine import Job
from agentrl.tools import base
from agentrl.tools.executor import Executor
from agentrl.tools.recording import Recording

PROMPT = list(range(20, 30))
TASK = Task('task-0', 'tools', (), None)


class Stamp(base.Tool):
  """Answers every call in its life with another number: a tool whose answers cannot be had again."""

  name, description, parameters = 'stamp', 'Gives a number.', {'type': 'object', 'properties': {}}

  def __init__(self):
    self.numbers, self.asked = itertools.count(), 0

  async def call(self, state, arguments):
    self.asked += 1
    return base.success(str(next(self.numbers)))


class Counter(base.Tool):
  """Counts a trajectory's calls."""

  name, description, parameters = 'count', 'Counts.', {'type': 'object', 'properties': {}}
  stateful = True

  async def open(self, seed):
    return itertools.count()

  async def call(self, state, arguments):
    return base.success(str(next(state)))


class World:
  """A program with tools, forks and a change of mind."""

  def __init__(self, prompt=PROMPT, stops=('e', '1'), max_tokens=10):
    self.prompt, self.stops, self.max_tokens, self.stamp = prompt, stops, max_tokens, Stamp()
    self.executor = Executor([self.stamp, Counter()])

  async def play(self, session, tools, turns):
    for _ in range(turns):
      turn = await session.generate(stops=self.stops, max_tokens=self.max_tokens)
      results = await tools.call([ToolCall('stamp', {}), ToolCall('count', {})])
      session.observe(turn, [ToolCall('stamp', {}), ToolCall('count', {})], results)
      session.append([60 + int(results[0].text) % 7, 70 + int(results[1].text)])
    session.finish(Status.FINISHED)

  async def program(self, session):
    tools = self.executor.open(0)
    session.append(self.prompt)
    mark = session.mark()
    await session.generate(max_tokens=6)
    session.rollback(mark)
    session.append([50])
    await session.generate(max_tokens=5)
    session.append([51])
    for fork in session.fork(2):
      session.engine.adopt(fork, self.branch)
    await self.play(session, tools, 3)

  async def branch(self, session):
    await self.play(session, self.executor.open(1), 1)


def collect(engine, world, journals):
  """Runs a world's program to its end; `journals` is written."""
  async def run():
    async with engine.serving(policy_version=3):
      session = engine.begin(Job(TASK, 0, 'g', world.program), journals)
      while engine.under_way():
        await engine.serve()
      return engine.take([session])

  return asyncio.run(run())


@pytest.fixture(scope='module', name='once')
def run_once(tiny):
  """A world run through: the trajectories, the journals as plain values, and how often the stamp was asked."""
  world, journals = World(), {}
  with tiny.engine() as engine:
    trajectories = collect(engine, world, journals)
  plain = {path: journals_lib.to_plain(j.draws, j.recording) for path, j in journals.items()}
  return trajectories, plain, world.stamp.asked


def check_same(trajectories, others):
  assert [t.path for t in trajectories] == [t.path for t in others]
  for a, b in zip(trajectories, others):
    for name in ('tokens', 'sampled', 'turns', 'versions'):
      np.testing.assert_array_equal(getattr(a.segments[0], name), getattr(b.segments[0], name))
    np.testing.assert_allclose(a.segments[0].log_probs, b.segments[0].log_probs, atol=1e-5)
    assert [(x.text, x.calls, [r.text for r in x.results]) for x in a.turns] == [
        (x.text, x.calls, [r.text for r in x.results]) for x in b.turns]
    assert a.status is b.status


def test_a_whole_journal_is_run_through_without_a_draw(tiny, once):
  trajectories, plain, stamps = once
  assert len(trajectories) == 3 and stamps == 5
  world = World()
  with tiny.engine() as engine:
    again = collect(engine, world, {path: journals_lib.from_plain(j) for path, j in plain.items()})
    assert engine.stats.decoded_tokens == 0
  assert world.stamp.asked == 0, 'what a tool answered is not asked for again'
  check_same(trajectories, again)
  for a, b in zip(trajectories, again):
    np.testing.assert_array_equal(a.segments[0].log_probs, b.segments[0].log_probs)


@pytest.mark.parametrize('kept, tokens', [(0, 2), (2, 3), (3, 0), (4, 1)])
def test_a_journal_cut_anywhere_leads_to_the_same_end(tiny, once, kept, tokens):
  """The root's journal ends in its turn number `kept`, of which `tokens` are drawn."""
  trajectories, plain, stamps = once
  whole = journals_lib.from_plain(plain[()])
  draw = whole.draws[kept]
  assert len(draw.tokens) > tokens
  partial = dataclasses.replace(draw, reason=None, **{
      name: getattr(draw, name)[:tokens] for name in ('tokens', 'log_probs', 'entropies', 'versions')})
  # The first two turns call nothing; after them the forks begin.
  answers = whole.recording.answers[:max(0, kept - 2)]
  journals = {(): journals_lib.Journal([*whole.draws[:kept], partial], Recording(answers))}
  world = World()
  if kept:
    journals |= {path: journals_lib.from_plain(plain[path]) for path in ((0,), (1,))}
    # What is asked again answers as it did, so that the whole can be compared.
    world.stamp.numbers = iter([int(a[0].text) for a in whole.recording.answers[len(answers):]])
  with tiny.engine() as engine:
    check_same(trajectories, collect(engine, world, journals))
  assert world.stamp.asked == stamps - len(answers) - (2 if kept else 0)
  # What was written on the way makes it whole again.
  assert [(d.context, d.tokens.tolist(), d.reason) for d in journals[()].draws] == [
      (d.context, d.tokens.tolist(), d.reason) for d in whole.draws]


def test_what_no_longer_follows_is_forgotten(tiny, once):
  trajectories, plain, _ = once
  world = World(prompt=PROMPT[::-1])
  with tiny.engine() as engine:
    again = collect(engine, world, {path: journals_lib.from_plain(j) for path, j in plain.items()})
    assert engine.stats.decoded_tokens > 0
  # All of it is drawn where it stands: the learner agrees.
  for t, (log_probs, _) in zip(again, tiny.learner_scores(again)):
    s = t.segments[0]
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4)
  assert again[0].segments[0].tokens[11:].tolist() != trajectories[0].segments[0].tokens[11:].tolist()


@pytest.mark.parametrize('change', [dict(stops=('e',)), dict(stops=()), dict(max_tokens=3), dict(max_tokens=12)])
def test_turns_asked_for_in_another_way_are_drawn_anew(tiny, once, change):
  """The two turns before the play stand as they were; of the play all is as if there had been no journal."""
  _, plain, _ = once
  with tiny.engine() as engine:
    fresh = collect(engine, World(**change), {})
    # Every draw, those that were rolled back included.
    in_all = engine.stats.decoded_tokens
    again = collect(engine, World(**change), {path: journals_lib.from_plain(j) for path, j in plain.items()})
    drawn_again = engine.stats.decoded_tokens - in_all
  check_same(fresh, again)
  known = sum(len(d.tokens) for d in journals_lib.from_plain(plain[()]).draws[:2])
  assert drawn_again == in_all - known


def test_stops_in_another_order_and_journals_without_their_terms_are_run_through(tiny, once):
  trajectories, plain, _ = once
  old = {path: journals_lib.from_plain({**j, 'draws': [{k: v for k, v in d.items() if k != 'asked'} for d in j['draws']]})
         for path, j in plain.items()}
  for world, journals in ((World(stops=['1', 'e', '1']), {p: journals_lib.from_plain(j) for p, j in plain.items()}),
                          (World(max_tokens=11), old)):
    with tiny.engine() as engine:
      check_same(trajectories, collect(engine, world, journals))
      assert engine.stats.decoded_tokens == 0


def test_the_terms_of_a_turn_tell_grammars_and_policies_apart():
  Known = collections.namedtuple('Known', 'checksum')
  asked = [(8, ('a', 'b'), None, ''), (9, ('a', 'b'), None, ''), (8, ('ab',), None, ''), (8, ('a', 'b'), Known(1), ''),
           (8, ('a', 'b'), Known(2), ''), (8, ('a', 'b'), None, 'judge')]
  assert len({journals_lib.terms(*a) for a in asked}) == len(asked)


def test_weights_that_were_taken_may_be_overwritten(tiny):
  """An update gives its weights' memory away; the sampler's are its own."""
  params = jax.tree.map(jax.numpy.array, tiny.params)
  sampler = tiny.sampler()
  with tiny.engine(sampler=sampler) as engine:
    engine.take_weights(params, version=7)
    jax.tree.map(lambda x: x.delete(), params)
    world = World()
    drawn = collect(engine, world, {})
  assert all(t.num_sampled for t in drawn)
