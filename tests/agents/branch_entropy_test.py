"""Tests of branching by entropy: the rules by their definitions, the groups by what they add up to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agentrl.agents import rounds
from agentrl.agents.branch_entropy import branches, branches_balanced, monitored_rows
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Status
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, Job
from agentrl.sampling.sampler import Sampler

GRID = (np.arange(20_000) + 0.5) / 20_000


@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.8])
def test_without_weight_the_probability_is_the_threshold(threshold):
  """Identity 17."""
  share = np.mean([branches(u, 3.0, weight=0.0, threshold=threshold) for u in GRID])
  assert share == pytest.approx(threshold, abs=1e-4)
  share = np.mean([branches_balanced(u, 3.0, 0, weight=0.0, threshold=threshold) for u in GRID])
  assert share == pytest.approx(1 - threshold, abs=1e-4)


@pytest.mark.parametrize('rise, expected', [(0.5, 0.6), (-0.5, 0.4), (9.0, 1.0), (-9.0, 0.0)])
def test_a_rise_of_entropy_adds_its_share(rise, expected):
  # P(clip(U - w d) <= 1/2) = 1/2 + w d, and P(clip(U + w d) >= 1/2) is the same.
  for rule in (branches, lambda u, d: branches_balanced(u, d, 0)):
    assert np.mean([rule(u, rise) for u in GRID]) == pytest.approx(expected, abs=1e-4)


def test_each_branch_makes_the_next_less_likely_and_twenty_make_it_impossible():
  share = [np.mean([branches_balanced(u, 0.0, b) for u in GRID]) for b in (0, 5, 10, 20, 50)]
  # U (1 - b/20) >= 1/2.
  np.testing.assert_allclose(share, [0.5, 1 - 0.5 / 0.75, 0, 0, 0], atol=1e-4)


@pytest.mark.parametrize('size', [1, 2, 7, 16])
def test_monitoring_gives_one_to_all_rows(size):
  gaps = np.linspace(-50, 50, 101)
  rows = [monitored_rows(size, g, 0.0) for g in gaps]
  assert rows == sorted(rows) and (rows[0], rows[-1]) == (1, size)
  expected = [min(int(size / (1 + math.exp(-g / 2))) + 1, size) for g in gaps]
  assert rows == expected


@pytest.mark.parametrize('options', [{}, dict(initial=1, most=3), dict(initial=9), dict(weight=0.0, threshold=1.0),
                                     dict(weight=0.0, threshold=0.0), dict(balanced=True),
                                     dict(balanced=True, initial=2), dict(balanced=True, threshold=0.0)])
def test_a_group_ends_with_exactly_its_size_whatever_branches(stage, options):
  """Identity 17: rows add up, and no branch is made that there is no row for."""
  size = 6
  agent = stage.agent('branch_entropy', **options)
  tasks = [stage.task(i) for i in range(3)]
  got = stage.run(agent, tasks, size)
  for task in tasks:
    rows = [t for t in got if t.group_id == task.id]
    assert len(rows) == size == agent.max_trajectories(size)
    assert len({(t.sample, t.path) for t in rows}) == size
    assert all(t.status is not Status.RUNNING and t.status is not Status.AGENT_FAILURE for t in rows)
    grown = [t for t in rows if t.fork_point]
    if options.get('threshold') == 0.0 and not options.get('balanced'):
      assert not grown  # nothing branches: all but the first are fresh
    begun = size - len(grown)
    assert begun >= min(size, options.get('initial') or 1)
    for t in grown:
      # After a tool's answer, with all turns of before and none of its own.
      shared = sum(turn.end <= t.fork_point for turn in t.turns)
      assert shared >= 1 and t.turns[shared - 1].results
      parent = next((x for x in rows if (x.sample, x.path) == (t.sample, t.parent_path)), None)
      assert parent is not None
      np.testing.assert_array_equal(t.segments[0].tokens[:t.fork_point], parent.segments[0].tokens[:t.fork_point])


def test_where_everything_branches_the_budget_is_spent_in_branches(stage):
  # A policy that always asks: no row ends before the turn limit.
  stage.script({'<|assistant|>': {'<lookup>': 1.0}, '<lookup>': {'F': 0.5, 'G': 0.5},
                'F': {d: 0.1 for d in '0123456789'}, 'G': {d: 0.1 for d in '0123456789'},
                **{d: {'</lookup>': 1.0} for d in '0123456789'}})
  agent = stage.agent('branch_entropy', initial=2, weight=0.0, threshold=1.0)
  got = stage.run(agent, [stage.task()], 8)
  # Round 1: two rows, two branches; round 2: four rows, four branches.
  assert sorted(len([s for s in t.fork_points]) for t in got) == [0, 0, 1, 1, 1, 1, 2, 2]
  assert len({tuple(t.segments[0].tokens) for t in got}) == 8


def test_groups_do_not_depend_on_slots(stage):
  agent = stage.agent('branch_entropy')
  tasks = [stage.task(i) for i in range(3)]
  many = stage.run(agent, tasks, 5)
  few = Sampler(stage.config, slots=3, context=128, capacities=(128,), chunk=2, row_buckets=(3,), token_buckets=(8,))
  few.set_params(stage.params)
  again = stage.run(agent, tasks, 5, sampler=few)
  assert [(t.task.id, t.sample, t.path) for t in many] == [(t.task.id, t.sample, t.path) for t in again]
  for a, b in zip(many, again):
    np.testing.assert_array_equal(a.segments[0].tokens, b.segments[0].tokens)


def test_where_the_environment_fails_the_rows_still_add_up(stage):
  class Failing:
    """The real environment, which fails at every second snapshot and every third opening."""

    def __init__(self, environment):
      self._real, self.stops, self._opened, self._taken = environment, environment.stops, 0, 0

    async def open(self, task, seed):
      self._opened += 1
      if self._opened % 3 == 1:
        raise OSError('no room')
      return self._wrap(await self._real.open(task, seed))

    async def restore(self, snapshot):
      return self._wrap(await self._real.restore(snapshot))

    def _wrap(self, episode):
      take, outer = episode.snapshot, self

      async def snapshot():
        outer._taken += 1
        if outer._taken % 2:
          raise OSError('the disk is full')
        return await take()

      episode.snapshot = snapshot
      return episode

  real, stage.environment = stage.environment, Failing(stage.environment)
  try:
    got = stage.run(stage.agent('branch_entropy', weight=0.0, threshold=1.0), [stage.task()], 8)
  finally:
    stage.environment = real
  assert len(got) == 8
  failed = [t for t in got if t.status is Status.ENVIRONMENT_FAILURE]
  assert {t.detail for t in failed} == {'OSError: no room', 'OSError: the disk is full'} and len(failed) < 8


def test_decisions_have_draws_of_their_own(stage):
  seen = []

  class Noting:
    def decide(self, rows, free):
      seen.extend((rounds.uniform(row), row.trajectory.path, row.num_turns) for row in rows)
      return [0] * len(rows)

    def fresh(self, ended, free):
      return 1

  task = stage.task()
  engine = Engine(stage.sampler, stage.tokenizer, limits=Limits(turn_tokens=12, context_tokens=128, turns=6))
  group = rounds.Rounds(Player(stage.environment, stage.template, task), Noting(), 4, 2)
  got = engine.collect([Job(task, k, task.id, group.root) for k in range(2)])
  engine.close()
  assert len(got) == 4 and len(seen) > 3
  assert len({u for u, _, _ in seen}) == len(seen) and all(0 <= u < 1 for u, _, _ in seen)


@pytest.mark.parametrize('bad', [dict(initial=0), dict(most=0), dict(tokens=0), dict(threshold=1.5), dict(penalty=-1)])
def test_numbers_out_of_range_are_refused(stage, bad):
  [(name, value)] = bad.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    stage.agent('branch_entropy', **bad)


def test_a_group_of_one_is_one_row(stage):
  agent = stage.agent('branch_entropy')
  assert len(stage.run(agent, [stage.task()], 1, iteration=Iteration(3, 9))) == 1
