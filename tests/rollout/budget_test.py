"""Tests of what trajectories may use, each alone and all together."""

from __future__ import annotations

import asyncio

import pytest

from agentrl.core.types import Boundary, Status, ToolCall, ToolResult
from agentrl.rollout.budget import Budget, Limits
from agentrl.rollout.engine import Job

PROMPT = list(range(20, 40))
CALLS = 2  # of a turn


async def endless(session):
  session.append(PROMPT)
  while True:
    turn = await session.generate(max_tokens=3)
    await asyncio.sleep(0.02)
    session.observe(turn, (ToolCall('f', {}),) * CALLS, (ToolResult(()),) * CALLS)
    session.append([5])


def collect(tiny, count, budget=Budget(), **limits):
  with tiny.engine(**limits) as engine:
    return engine.collect([Job(tiny.task(i), 0, f'g{i}', endless) for i in range(count)], budget=budget)


@pytest.mark.parametrize('budget, why', [
    ({'tokens': 40}, 'the 40 tokens for all trajectories were used'),
    ({'turns': 5}, 'the 5 turns for all trajectories were used'),
    ({'calls': 6}, 'the 6 calls for all trajectories were used'),
    ({'seconds': 0.1}, 'the 0.1 s for all trajectories were over'),
])
def test_what_is_under_way_when_the_budget_of_all_is_spent_is_cut(tiny, budget, why):
  got = collect(tiny, 2, Budget(**budget), turns=1_000, context_tokens=96)
  if 'seconds' in budget:  # a slow machine may not come as far as that, a fast one to the end of the context
    assert all(t.detail == f'cut: {why}' or t.status is Status.LENGTH for t in got)
    return
  assert {(t.status, t.boundary, t.detail) for t in got} == {(Status.CUT, Boundary.ENGINE, f'cut: {why}')}
  # Passed by less than what each does at a time.
  if 'calls' in budget:
    assert 6 <= sum(len(t.results) for t in got) <= 6 + CALLS
  if 'turns' in budget:
    assert 4 <= sum(len(t.turns) for t in got) <= 6
  if 'tokens' in budget:
    assert 40 - 2 * 3 <= sum(t.num_sampled for t in got) < 40 + 2 * 3


def test_a_budget_that_is_not_spent_changes_nothing(tiny):
  free, bound = (collect(tiny, 2, budget, turns=4) for budget in (Budget(), Budget(9_999, 9_999, 9_999, 999.0)))
  assert [t.segments[0].tokens.tolist() for t in free] == [t.segments[0].tokens.tolist() for t in bound]
  assert {t.status for t in bound} == {Status.TURN_LIMIT}


def test_a_trajectory_ends_where_its_calls_are_used_up(tiny):
  [got] = collect(tiny, 1, calls=3 * CALLS - 1)
  assert (got.status, got.boundary, got.detail) == (Status.CALL_LIMIT, Boundary.POLICY, 'no call left of 5')
  assert len(got.turns) == 3


@pytest.mark.parametrize('name', ['tokens', 'turns', 'calls', 'seconds'])
def test_a_negative_budget_is_refused(name):
  with pytest.raises(ValueError, match=f'{name}=-1'):
    Budget(**{name: -1})
  if name != 'tokens':
    with pytest.raises(ValueError, match=f'{name}=-1'):
      Limits(**{name: -1})
