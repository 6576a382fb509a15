"""Shapings that judge turns, calls or agreement, on trajectories of the chain world small enough for counting by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards.shaping import match_turn

TASK = types.Task('0', 'chains', (), {'answer': '5', 'table': 0, 'needed': ['F4', 'G2'], 'known': []})
FINISHED = types.Status.FINISHED


def _turn(fact, text='7', error=None, name='lookup'):
  call = types.ToolCall(name, {'fact': fact})
  result = types.ToolResult((types.Part('text', text),), ok=error is None, error=error)
  return types.Turn(0, 0, 0, 0, '', 'stop', (call,), (result,))


FIRST, SECOND, WRONG = _turn('F4'), _turn('G2', '5'), _turn('F5', '1')
BUSY, NOISE = _turn('F4', 'busy', 'transient'), _turn('F4', name='noise')
MALFORMED = _turn('4F', 'no fact', 'no_such_fact')
ANSWER = types.Turn(0, 0, 0, 0, '', 'stop')


def _scored(shaping, *trajectories, **options):
  reward = base.make('chains', shapings=[{'name': shaping, **options}])
  reward.score(trajectories, types.Iteration(0, 1))
  return trajectories


def _trajectory(*turns, answer='5', status=FINISHED, group='0'):
  return types.Trajectory(TASK, 0, group, 0, status=status, answer=answer, turns=list(turns))


def test_thrift_of_a_right_answer():
  # 1 / (T + 1): three calls 1/4, none 1, and a wrong answer 0 however thrifty.
  got = _scored('tool_reward', _trajectory(FIRST, BUSY, SECOND, ANSWER), _trajectory(ANSWER),
                _trajectory(ANSWER, answer='6'))
  assert [t.rewards['tool_reward'] for t in got] == [.25, 1.0, 0.0]


def test_actions_count_facts_found_once():
  got = _scored('action_reward', _trajectory(FIRST, SECOND, ANSWER), _trajectory(FIRST, FIRST, NOISE),
                _trajectory(WRONG, BUSY, MALFORMED, ANSWER))
  assert [t.rewards['action'] for t in got] == [2.0, 1.0, 0.0]


def test_labels_of_turns():
  # Good: told a needed fact for the first time, or answered right. A turn of no use is bad.
  good, wrong = _scored('step_label', _trajectory(FIRST, FIRST, NOISE, SECOND, ANSWER),
                        _trajectory(FIRST, ANSWER, answer='9'), size=.5)
  assert good.turn_rewards['step_label'] == [.5, -.5, -.5, .5, .5]
  assert wrong.turn_rewards['step_label'] == [.5, -.5]
  with pytest.raises(ValueError, match='size'):
    base.make('chains', shapings=[{'name': 'step_label', 'size': 0.0}])


def test_an_outcome_is_allocated_to_the_turns_that_speak_for_it():
  good, wrong = _scored('step_label', _trajectory(FIRST, NOISE, SECOND, ANSWER),
                        _trajectory(FIRST, ANSWER, answer='9'), scheme='allocation', minor=.5)
  # Three good turns and one of no use; then one good and one bad turn of a failure.
  np.testing.assert_allclose(good.turn_rewards['step_label'], np.array([1, .5, 1, 1]) / 3.5)
  np.testing.assert_allclose(wrong.turn_rewards['step_label'], -np.array([.5, 1]) / 1.5)
  for options, words in (({'scheme': 'even'}, "scheme='even'"), ({'minor': 0.0}, 'minor=0.0')):
    with pytest.raises(ValueError, match=words):
      base.make('chains', shapings=[{'name': 'step_label', **options}])


def test_the_majority_of_each_group_is_its_label():
  answers = ['4', ' 4', '7', None], ['1', '2'], [None, '']
  got = _scored('majority_vote', *(_trajectory(ANSWER, answer=a, group=str(g))
                                   for g, group in enumerate(answers) for a in group))
  # '4' has 2 of 4; of one vote each the first counts; nobody voted.
  assert [t.rewards['consensus'] for t in got] == [.5] * 4 + [.5] * 2 + [0.0] * 2
  assert [t.rewards['agrees'] for t in got] == [1, 1, 0, 0, 1, 0, 0, 0]
  assert [t.rewards['total'] for t in got] == [t.rewards['agrees'] for t in got]
  # What the right answer is plays no part: all here are judged without it.
  assert sum(t.rewards['accuracy'] for t in got) == 0


def test_a_checklist_by_its_items():
  good, bad, early = _scored(
      'checklist', _trajectory(FIRST, BUSY, SECOND, ANSWER),
      _trajectory(FIRST, FIRST, MALFORMED, status=types.Status.TURN_LIMIT, answer=None),
      _trajectory(ANSWER))
  # Of a call: no failure but a passing one; not made before; something new. Of the answer: given; nothing missing.
  np.testing.assert_allclose(good.turn_rewards['checklist'], [1, 1 / 3, 1, 1])
  np.testing.assert_allclose(bad.turn_rewards['checklist'], [1, 1 / 3, 1 / 3])
  assert early.turn_rewards['checklist'] == [.5]
  # Asking again after a passing failure is not a repeat.
  again, = _scored('checklist', _trajectory(BUSY, FIRST))
  assert again.turn_rewards['checklist'][1] == 1


@pytest.mark.parametrize('call, score', [
    (types.ToolCall('lookup', {'fact': 'F4'}), 1.0),
    (types.ToolCall('noise', {'fact': 'F4'}), 2 / 3),
    (types.ToolCall('lookup', {'fact': 'F5'}), 2 / 3),
    (types.ToolCall('lookup', {'fact': 'F4', 'x': 1}), (1 + .5 + 1) / 3),
    (types.ToolCall('lookup', {}), 1 / 3),
    (types.ToolCall('', {}), 0.0)])
def test_similarity_by_its_formula(call, score):
  np.testing.assert_allclose(match_turn.similarity(call, types.ToolCall('lookup', {'fact': 'F4'})), score)


def test_hungarian_and_greedy_differ_where_the_best_pair_spoils_the_rest():
  # Greedy takes 0.9 and leaves 0.1: 1.0. The best assignment is 0.8 + 0.8.
  scores = np.array([[.9, .8], [.8, .1]])
  assert match_turn.assign_greedy(scores) == [(0, 0), (1, 1)]
  assert match_turn.assign_hungarian(scores) == [(0, 1), (1, 0)]


@pytest.mark.parametrize('seed', range(4))
def test_the_hungarian_assignment_is_the_best_of_all(seed):
  scores = np.random.default_rng(seed).random((4, 3))
  best = max(sum(scores[rows[j], j] for j in range(3)) for rows in itertools.permutations(range(4), 3))
  np.testing.assert_allclose(sum(scores[p] for p in match_turn.assign_hungarian(scores)), best)
  greedy = match_turn.assign_greedy(scores)
  assert len({i for i, _ in greedy}) == len({j for _, j in greedy}) == 3


def test_turns_are_worth_their_calls_and_the_last_its_answer():
  got, none = _scored('match_turn', _trajectory(FIRST, NOISE, SECOND, ANSWER, answer='it is 5'), _trajectory(),
                      unmatched=-.5)
  # noise('F4') finds its own fact taken and G2 taken too; F1 of 'it is 5' against '5' is 2 * 1 / (3 + 1).
  np.testing.assert_allclose(got.turn_rewards['match'], [1, -.5, 1, .5])
  assert got.rewards['match_sum'] == pytest.approx(2.0)
  assert none.turn_rewards['match'] == [] and none.rewards['match_sum'] == 0


def test_true_calls_may_be_spelled_out():
  truth = {'answer': '1', 'calls': [{'name': 'add', 'arguments': {'a': 1}}]}
  assert match_turn.true_calls(types.Task('0', 'tools', (), truth)) == [types.ToolCall('add', {'a': 1})]
  with pytest.raises(ValueError, match='assignment'):
    match_turn.MatchTurn(assignment='best')
