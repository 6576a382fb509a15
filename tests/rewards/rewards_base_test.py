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


class _Best:
  """Gives every trajectory what the best of its group has in 'calls', and its turns their index."""

  needs, names, turn_names = ('calls',), ('best', 'total'), ('index',)

  def __call__(self, trajectories, iteration):
    iteration.memory['seen'] = iteration.memory.get('seen', 0) + len(trajectories)
    best = {}
    for t in trajectories:
      best[t.group_id] = max(best.get(t.group_id, 0.0), t.rewards['calls'])
    return [{'best': best[t.group_id], 'total': t.rewards['total'] + best[t.group_id],
             'index': [turn.index for turn in t.turns]} for t in trajectories]


def test_weights_and_the_numbers_of_shapings_may_depend_on_the_step():
  # The bonus fades by its own option 'most', and a failed call costs more at every step.
  shapings = [{'name': 'tool_use'}, {'name': 'bonus_anneal', 'steps': 99, 'most': lambda step: 0.1 * step}]
  reward = base.make('chains', {'failed_calls': lambda step: -1.0 * step}, shapings)
  task = types.Task('0', 'chains', (), {'answer': '4', 'needed': []})
  found = []
  for step in range(3):
    t = _trajectory(failed=2)
    t.task, t.turns = task, [types.Turn(k, 0, 0, 0, '', 'stop', calls=(types.ToolCall('lookup', {}),),
                                        results=(types.ToolResult((), ok=False),)) for k in range(2)]
    reward.score([t], types.Iteration(step, 99))
    found.append(t.rewards['total'] - t.rewards['tool_bonus'])
    assert t.rewards['tool_bonus'] <= 0.1 * step and (t.rewards['tool_bonus'] > 0) == (step > 0)
  assert found == [0.0, -2.0, -4.0]


def _pair():
  trajectories = [_trajectory(calls=1), _trajectory(calls=3), _trajectory(calls=2)]
  trajectories[2].group_id = 'another'
  return trajectories


def test_shapings_see_whole_groups_and_keep_a_memory_of_their_own():
  reward = base.Reward([base.Calls()], {'calls': 0.5}, {'best': _Best()})
  trajectories, memory = _pair(), {}
  for step in range(2):
    reward.score(trajectories, types.Iteration(step, 9, memory))
  # By hand: half the calls, and the most calls of the group.
  assert [t.rewards['total'] for t in trajectories] == [0.5 + 3, 1.5 + 3, 1 + 2]
  assert [t.rewards['best'] for t in trajectories] == [3, 3, 2]
  assert [t.turn_rewards for t in trajectories] == [{'index': [0.0]}] * 3
  assert memory == {'best': {'seen': 6}}
  assert reward.names == {'calls', 'failed_calls', 'best', 'total'} and reward.turn_names == {'index'}


def test_a_shaping_of_a_part_that_nothing_gives_is_refused():
  with pytest.raises(ValueError, match="'best' reads the part 'calls', which nothing before it gives"):
    base.Reward([base.Format()], {}, {'best': _Best()})


@pytest.mark.parametrize('returned, message', [
    ({'index': [1.0, 2.0]}, '2 numbers .index. for 1 turns'),
    ({'other': 1.0}, "returned the part 'other', which it does not name")])
def test_a_shaping_that_returns_something_else_is_refused(returned, message):
  class Wrong(_Best):
    def __call__(self, trajectories, iteration):
      return [returned for _ in trajectories]

  with pytest.raises(ValueError, match=message):
    base.Reward([base.Calls()], {}, {'wrong': Wrong()}).score(_pair(), types.Iteration(0, 1))


@pytest.mark.parametrize('arguments, message', [
    (('reasoning_gim',), "did you mean 'reasoning_gym'"),
    (('reasoning_gym', {'acuracy': 1.0}), 'acuracy'),
    (('reasoning_gym', {}, [{'weight': 1}]), "reward.shapings: .* needs a name"),
])
def test_a_reward_is_found_by_its_name_and_refuses_what_it_does_not_know(arguments, message):
  assert 'accuracy' in base.make('reasoning_gym').names
  with pytest.raises((ValueError, LookupError), match=message):
    base.make(*arguments)


def test_a_task_that_cannot_be_scored_is_refused():
  with pytest.raises(ValueError, match="the answer of test task '0' cannot be scored"):
    base.make('reasoning_gym').check(TASK, 'test')
