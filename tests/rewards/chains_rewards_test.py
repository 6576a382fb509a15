"""What a trajectory of the chain world is worth, and each of its turns."""

from __future__ import annotations

import pytest

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards import chains

# 4 -F-> 7 -P-> 2 -G-> 5; the facts are made up: rewards read the ground truth alone.
TASK = types.Task('0', 'chains', (), {
    'answer': '5', 'table': 0, 'needed': ['F4', 'G2'], 'known': ['P7']})


def _turn(name, fact, text, error=None):
  call = types.ToolCall(name, {'fact': fact})
  result = types.ToolResult((types.Part('text', text),), ok=error is None, error=error)
  return types.Turn(0, 0, 0, 0, '', 'stop', (call,), (result,))


FIRST, SECOND = _turn('lookup', 'F4', '7'), _turn('lookup', 'G2', '5')
KNOWN, NOISE = _turn('lookup', 'P7', '2'), _turn('noise', 'F4', '7')
FAILED = _turn('lookup', 'F4', 'error: busy', 'transient')
WRONG = _turn('lookup', 'F5', '1')
MALFORMED = _turn('lookup', '4F', 'error: no fact', 'no_such_fact')
AMBIGUOUS = _turn('lookup', 'F4', '3/7')
ANSWER = types.Turn(0, 0, 0, 0, '', 'stop')


def _trajectory(*turns, answer='5', status=types.Status.FINISHED):
  return types.Trajectory(TASK, 0, '0', 0, status=status, answer=answer, turns=list(turns))


@pytest.mark.parametrize('answer, right', [('5', 1.0), (' 5\n', 1.0), ('6', 0.0), ('', 0.0),
                                           (None, 0.0), ('5.0', 0.0)])
def test_the_answer_is_right_or_wrong(answer, right):
  parts = base.make('chains')(TASK, _trajectory(ANSWER, answer=answer))
  assert parts['success'] == parts['accuracy'] == parts['total'] == right


@pytest.mark.parametrize('turns, avoidable, missing', [
    ((FIRST, SECOND), 0, 0),
    ((FIRST, KNOWN, SECOND), 1, 0),
    ((FIRST, FIRST, SECOND), 1, 0),
    ((FAILED, FIRST, SECOND), 0, 0),
    ((AMBIGUOUS, FIRST, SECOND), 0, 0),
    ((AMBIGUOUS, AMBIGUOUS, SECOND), 1, 1),
    ((NOISE, WRONG, MALFORMED), 3, 2),
    ((), 0, 2)])
def test_calls_are_counted_by_what_they_told(turns, avoidable, missing):
  parts = chains.ChainCalls()(TASK, _trajectory(*turns, ANSWER))
  assert parts == {'needed_calls': 2.0, 'avoidable_calls': avoidable, 'missing_calls': missing}


def test_values_of_turns_by_hand():
  # skill 0.5: V(start) = 0.5^3; each found fact doubles it; a right answer takes 0.5 to 1.
  found = chains.turn_values(TASK, _trajectory(FIRST, KNOWN, FAILED, SECOND, ANSWER), skill=0.5)
  assert found == {'value': [0.125, 0.0, 0.0, 0.25, 0.5], 'needed': [1.0, 0.0, 0.0, 1.0, 1.0]}
  # A wrong answer loses what was won.
  found = chains.turn_values(TASK, _trajectory(FIRST, ANSWER, answer='9'), skill=0.5)
  assert found == {'value': [0.125, -0.25], 'needed': [1.0, 1.0]}


def test_a_wasted_turn_costs_where_turns_are_short():
  # Three turns are needed and three there are: after a wasted one nothing can succeed any more.
  found = chains.turn_values(TASK, _trajectory(NOISE, FIRST, ANSWER, answer='9'), skill=0.5,
                             max_turns=3)
  assert found['value'] == [-0.125, 0.0, 0.0]


def test_a_narrowed_fact_is_new_and_still_missing():
  found = chains.turn_values(TASK, _trajectory(AMBIGUOUS, FIRST, ANSWER, answer='9'), skill=0.5)
  assert found == {'value': [0.0, 0.125, -0.25], 'needed': [1.0, 1.0, 1.0]}


@pytest.mark.parametrize('turns', [
    (), (ANSWER,), (FIRST, ANSWER), (NOISE, FAILED, FIRST, SECOND, ANSWER)])
@pytest.mark.parametrize('answer', ['5', '0'])
def test_values_add_up_to_the_outcome(turns, answer):
  # By the definition: a telescoping sum from V(start) = skill^3 to the outcome.
  values = chains.turn_values(TASK, _trajectory(*turns, answer=answer), skill=0.7)['value']
  if turns:
    assert sum(values) == pytest.approx((answer == '5') - 0.7**3)
  assert len(values) == len(turns)


def test_the_shaping_writes_a_number_a_turn():
  reward = base.make('chains', shapings=[{'name': 'true_values', 'skill': 0.5}])
  trajectory = _trajectory(FIRST, SECOND, ANSWER)
  reward.score([trajectory], types.Iteration(0, 1))
  assert trajectory.turn_rewards == {'true_value': [0.125, 0.25, 0.5], 'true_need': [1.0] * 3}


@pytest.mark.parametrize('skill', [0.0, 1.0])
def test_a_skill_out_of_range_is_refused(skill):
  with pytest.raises(ValueError, match='skill'):
    chains.turn_values(TASK, _trajectory(ANSWER), skill=skill)
