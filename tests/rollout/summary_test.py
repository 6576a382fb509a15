"""Tests of a batch's plain numbers, counted by hand on three trajectories."""

from __future__ import annotations

import math

import pytest

from agentrl.core.types import Part, Status, Task, ToolResult, Trajectory, Turn
from agentrl.rollout.summary import summarize, wilson_interval


def trajectory(entropies, results, status, rewards):
  t = Trajectory(Task('t', 'tools', (), 1), sample=0, group_id='t', seed=0, status=status,
                 rewards=rewards)
  t.segments[0].append_forced([1, 2, 3], 0)
  t.segments[0].append_sampled([4] * len(entropies), [-1.0] * len(entropies), entropies, 0)
  t.turns.append(Turn(0, 0, 3, 3 + len(entropies), '', 'stop', results=tuple(results)))
  return t


def test_summary_by_hand():
  good, bad = ToolResult((Part('text', '1'),)), ToolResult((), ok=False, error='timeout')
  batch = [
      trajectory([1.0, 2.0], [good, bad], Status.FINISHED, {'total': 1.0, 'success': 1.0}),
      trajectory([6.0], [good], Status.FINISHED, {'total': 0.5, 'success': 0.0}),
      trajectory([3.0], [], Status.LENGTH, {'total': 0.0, 'success': 0.0}),
  ]
  batch[0].turns.append(Turn(1, 0, 5, 5, '', 'stop'))
  got = summarize(batch)
  assert got.pop('reward_std') == pytest.approx(math.sqrt((0.25 + 0 + 0.25) / 3))
  # Entropy over the four sampled tokens, not over trajectories, and prompts do not count.
  assert got == pytest.approx({
      'success': 1 / 3, 'reward': 0.5, 'entropy': 12 / 4, 'calls_per_task': 1.0,
      'failed_call_rate': 1 / 3, 'response_tokens': 4 / 3, 'turns': 4 / 3,
      'status/finished': 2 / 3, 'status/length': 1 / 3})


def test_an_unscored_trajectory_makes_the_reward_nan_rather_than_zero():
  got = summarize([trajectory([1.0], [], Status.FINISHED, {})])
  assert math.isnan(got['reward']) and got['failed_call_rate'] == 0.0


def test_an_empty_batch():
  got = summarize([])
  assert math.isnan(got['reward']) and got['success'] == 0.0 and got['entropy'] == 0.0


@pytest.mark.parametrize('successes, n', [(0, 10), (3, 10), (10, 10), (461, 512)])
def test_wilson_interval_solves_its_equation(successes, n):
  """Its ends are where |p - share| = z sqrt(p (1 - p) / n)."""
  z = 1.959964
  low, high = wilson_interval(successes, n)
  assert 0 <= low <= successes / n <= high + 1e-12 and high <= 1
  for p in (low, high):
    if 1e-9 < p < 1 - 1e-9:
      assert abs(p - successes / n) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_wilson_interval_of_nothing_is_everything():
  assert wilson_interval(0, 0) == (0.0, 1.0)
