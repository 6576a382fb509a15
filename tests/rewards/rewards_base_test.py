"""Reward parts and their weighted sum."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agentrl.core import types
from agentrl.rewards import base

TASK = types.Task('0', 'tools', (), None)


def _trajectory(status=types.Status.FINISHED, answer='4', failed=0, calls=0):
  results = tuple(types.ToolResult((), ok=i >= failed) for i in range(calls))
  turn = types.Turn(0, 0, 0, 0, '', 'stop', results=results)
  return types.Trajectory(TASK, 0, '0', 0, status=status, answer=answer, turns=[turn])


def test_total_is_the_weighted_sum():
  # By hand: 2 * 1 (finished) + 0.5 * 3 calls - 0.25 * 2 failed calls = 3.
  weights = {'format': 2.0, 'calls': 0.5, 'failed_calls': -0.25}
  reward = base.Reward([base.Format(), base.Calls()], weights)
  assert reward(TASK, _trajectory(calls=3, failed=2)) == {
      'format': 1.0, 'calls': 3.0, 'failed_calls': 2.0, 'total': 3.0}


def test_parts_without_a_weight_are_recorded_and_count_nothing():
  assert base.Reward([base.Calls()], {})(TASK, _trajectory(calls=1)) == {
      'calls': 1.0, 'failed_calls': 0.0, 'total': 0.0}


@pytest.mark.parametrize('status, answer, expected', [
    (types.Status.FINISHED, '4', 1.0), (types.Status.FINISHED, ' ', 0.0),
    (types.Status.FINISHED, None, 0.0), (types.Status.LENGTH, '4', 0.0)])
def test_format_asks_for_a_finished_answer(status, answer, expected):
  assert base.Format()(TASK, _trajectory(status, answer)) == {'format': expected}


@pytest.mark.parametrize('components, weights, message', [
    ([base.Format()], {'formt': 1.0}, 'formt'),
    ([base.Format(), base.Format()], {}, 'differ'),
    ([base.Format(('total',))], {}, 'total'),
    ([base.Format()], {'format': float('nan')}, 'finite')])
def test_wrong_settings_are_refused(components, weights, message):
  with pytest.raises(ValueError, match=message):
    base.Reward(components, weights)


def test_a_component_that_returns_other_parts_is_refused():
  with pytest.raises(ValueError, match='elsewhere'):
    base.Reward([base.Format(('elsewhere',))], {})(TASK, _trajectory())


def test_rewards_need_no_jax():
  code = ('import sys\nfrom agentrl.rewards import base, reasoning_gym\n'
          'sys.exit("jax" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
