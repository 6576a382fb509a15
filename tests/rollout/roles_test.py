"""Tests of sessions of other roles: contexts of their own, drawn by the same policy or another, in one engine."""

from __future__ import annotations

import asyncio
import copy

import jax
import numpy as np
import pytest

from agentrl.core.types import Boundary, Status
from agentrl.rollout.engine import Job

PROMPT = list(range(20, 44))


@pytest.fixture(scope='module', name='judge')
def other_policy(tiny):
  """A policy of the same shape."""
  other = copy.copy(tiny)
  rng = np.random.default_rng(7)
  other.params = jax.tree.map(lambda x: (x * rng.uniform(0.5, 1.5, x.shape)).astype(np.float32), tiny.params)
  tiny.sampler().set_params(other.params, 'judge')
  return other


def talks_to(policy, opened, turns=2, prompt=PROMPT):
  """A program in which a session of another role answers each turn; both see the same prompt."""

  async def program(session):
    other = session.open(policy)
    opened.append(other)
    session.append(prompt)
    other.append(prompt)
    for _ in range(turns):
      turn = await session.generate(max_tokens=6)
      other.append(session.context.tokens[turn.start:turn.end])
      answer = await other.generate(max_tokens=5)
      await asyncio.sleep(0.001 * (session.trajectory.sample % 3))
      session.append(other.context.tokens[answer.start:answer.end])
    session.finish(Status.FINISHED)

  return program


def collect(tiny, programs):
  with tiny.engine() as engine:
    return engine.collect([Job(tiny.task(0), k, 'g', program) for k, program in enumerate(programs)])


def check_truth(policy, trajectories):
  for t, (log_probs, entropies) in zip(trajectories, policy.learner_scores(trajectories)):
    [s] = t.segments
    assert s.sampled.any()
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4, rtol=0)
    np.testing.assert_allclose(s.entropies[s.sampled], entropies[s.sampled], atol=1e-4, rtol=0)


@pytest.mark.parametrize('policy', ['judge', None])
def test_each_role_is_drawn_by_its_policy(tiny, judge, policy):
  # 20 sessions on 4 slots: contexts that begin alike, of two policies, leave their slots and come back.
  opened = []
  got = collect(tiny, [talks_to(policy, opened) for _ in range(10)])
  assert len(got) == len(opened) == 10 and {t.status for t in got} == {Status.FINISHED}
  others = [o.trajectory for o in opened]
  check_truth(tiny, got)
  check_truth(judge if policy else tiny, others)
  # A token of another policy has no version of the learner's.
  for trajectories, version in ((got, 0), (others, -1 if policy else 0)):
    assert {v for t in trajectories for s in t.segments for v in s.versions[s.sampled].tolist()} == {version}
  # Both hear the same, and each drew what the other did not.
  for t, other in zip(got, others):
    n = len(other.segments[0])
    np.testing.assert_array_equal(t.segments[0].tokens[:n], other.segments[0].tokens)
    assert not (t.segments[0].sampled[:n] & other.segments[0].sampled).any()
  assert len({tuple(t.segments[0].tokens.tolist()) for t in got}) == 10
  again = []
  wide = collect(tiny, [talks_to(policy, again) for _ in range(3)])
  assert [t.segments[0].tokens.tolist() for t in wide] == [t.segments[0].tokens.tolist() for t in got[:3]]


def test_what_is_opened_ends_with_the_program_and_is_not_collected(tiny):
  opened = []

  async def fails(session):
    other = session.open()
    opened.extend([other, other.open()])
    for each in opened[-2:]:
      each.append(PROMPT)
      await each.generate(max_tokens=3)
    raise RuntimeError('a mistake')

  # Far more are opened than there are slots: they are given back.
  got = collect(tiny, [fails] * 6)
  assert [t.status for t in got] == [Status.AGENT_FAILURE] * 6
  assert {o.trajectory.status for o in opened} == {Status.CUT} and len(opened) == 12
  assert all(o.seat is None and o.parked is None for o in opened)


def test_a_role_with_a_program_of_its_own_is_collected_after_who_opened_it(tiny):
  async def role(session):
    session.append(PROMPT[:5])
    await session.generate(max_tokens=4)
    session.finish(Status.FINISHED, answer='role')

  async def opens(session):
    session.append(PROMPT)
    other = session.open()
    await session.generate(max_tokens=4)
    await session.engine.adopt(other, role)
    session.finish(Status.FINISHED, answer=f'heard {other.trajectory.answer}')

  got = collect(tiny, [opens, opens])
  assert [(t.path, t.answer) for t in got] == [((), 'heard role'), ((0,), 'role')] * 2
  assert {t.group_id for t in got} == {'g'} and got[1].parent_path == ()
  # Nothing of it was drawn by who opened it.
  assert [got[1].drawn_by(turn) for turn in got[1].turns] == [(0,)]
  check_truth(tiny, got)


def test_a_policy_that_is_not_there_is_refused_with_those_that_are(tiny):
  async def program(session):
    session.append(PROMPT)
    session.open('critic')

  [got] = collect(tiny, [program])
  assert (got.status, got.boundary) == (Status.AGENT_FAILURE, Boundary.AGENT)
  assert "policy 'critic' is unknown; known: ''" in got.detail


def test_roles_count_as_descendants(tiny):
  async def program(session):
    session.append(PROMPT)
    while True:
      session.open()

  with tiny.engine(forks=5) as engine:
    [got] = engine.collect([Job(tiny.task(0), 0, 'g', program)])
  assert got.status is Status.AGENT_FAILURE and got.detail.startswith('6 forks of one sample, where 5 are allowed')
