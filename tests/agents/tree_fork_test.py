"""Tests of the thinned tree: its size, its shape, and what its steps can reach."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from agentrl.agents.tree_fork import keep_forks
from agentrl.core.types import Iteration, Status, Task, ToolCall, ToolResult, Trajectory, Turn
from agentrl.rewards import base as rewards


@pytest.mark.parametrize('forks', [1, 2, 5])
def test_a_group_ends_with_exactly_its_size_and_every_row_finished_by_itself(stage, forks):
  """Identity 17."""
  agent, tasks = stage.agent('tree_fork', forks=forks), [stage.task(i) for i in range(3)]
  got = stage.run(agent, tasks, 6)
  for task in tasks:
    rows = [t for t in got if t.group_id == task.id]
    assert len(rows) == 6 and len({(t.sample, t.path) for t in rows}) == 6
    assert not any(t.status in (Status.CUT, Status.AGENT_FAILURE, Status.RUNNING) for t in rows)
  forked = [t for t in got if t.path]
  assert bool(forked) == (forks > 1)
  by_step = collections.defaultdict(set)
  for t in got:
    for turn in t.turns:
      step = (t.group_id, t.sample, t.drawn_by(turn), turn.index)
      by_step[step].add(tuple(t.segments[0].tokens[:turn.end]))
  # Who shares a step shares everything up to it.
  assert all(len(contexts) == 1 for contexts in by_step.values())
  shared = collections.Counter((t.group_id, t.sample, t.drawn_by(turn), turn.index) for t in got for turn in t.turns)
  assert (max(shared.values()) > 1) == (forks > 1)


def test_forks_are_kept_by_their_draws_alone():
  rng = np.random.default_rng(0)
  for _ in range(50):
    draws = rng.random((rng.integers(1, 6), rng.integers(1, 4)))
    keep = int(rng.integers(1, draws.size + 1))
    kept = keep_forks(draws, keep)
    assert sum(kept) == keep
    limit = np.sort(draws.ravel())[keep - 1]
    assert kept == [int((row <= limit).sum()) for row in draws]


def test_a_number_of_forks_below_one_is_refused(stage):
  with pytest.raises(ValueError, match='forks=0'):
    stage.agent('tree_fork', forks=0)


def _turn(index, *ok):
  calls = tuple(ToolCall('lookup', {}) for _ in ok)
  return Turn(index, 0, 4 * index + 2, 4 * index + 4, '', 'stop', calls, tuple(ToolResult((), ok=o) for o in ok))


def test_a_step_is_worth_what_can_be_reached_from_it():
  """By hand: a root with two branches off its first step, one of which forks again."""
  task = Task('t', 'chains', (), None)
  make = lambda path, points, turns, accuracy: Trajectory(
      task, 0, 't', 0, path=path, fork_points=points, turns=turns, rewards={'accuracy': accuracy})
  first, second = _turn(0, True, False), _turn(1, True)
  root = make((), (), [first, _turn(1), _turn(2)], 0.0)
  branch = make((0,), ((1, 5),), [first, second], 0.0)
  leaf = make((0, 0), ((1, 5), (1, 9)), [first, second, _turn(2)], 1.0)
  other = Trajectory(task, 1, 't', 0, turns=[_turn(0)], rewards={'accuracy': 0.0})
  group, now = [root, branch, leaf, other], Iteration(0, 1)
  got = rewards.SHAPINGS.get('descendants')()(group, now)
  assert [g['reachable'] for g in got] == [[1, 0, 0], [1, 1], [1, 1, 1], [0]]
  assert [g['call_quality'] for g in got] == [[.5, 0, 0], [.5, 1], [.5, 1, 0], [0]]
  mean = rewards.SHAPINGS.get('descendants')(reach='mean')(group, now)
  assert mean[2]['reachable'] == pytest.approx([1 / 3, 1 / 2, 1])
  with pytest.raises(ValueError, match="reach='best'"):
    rewards.SHAPINGS.get('descendants')(reach='best')
