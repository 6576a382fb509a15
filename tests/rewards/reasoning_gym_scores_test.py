"""reasoning-gym's scores: gold answers score 1, garbage scores low and never raises."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import pytest

from agentrl.core import types
from agentrl.data import base as data
from agentrl.data import reasoning_gym as data_gym
from agentrl.rewards import base
from agentrl.rewards import reasoning_gym


@pytest.fixture(scope='module', name='tasks')
def _tasks(tmp_path_factory):
  data_dir = str(tmp_path_factory.mktemp('data'))
  source = data.make_source('reasoning_gym', split='train', data_dir=data_dir, train_per_family=20,
                            test_per_family=2)
  return [source[i] for i in range(len(source))]


def _trajectory(task, answer, **fields):
  return types.Trajectory(task, 0, '0', 0, status=types.Status.FINISHED, answer=answer, **fields)


def test_gold_answers_score_one_in_every_family(tasks):
  assert {task.metadata['family'] for task in tasks} == set(data_gym.FAMILIES)
  reward = base.make('reasoning_gym')
  for task in tasks:
    for answer in (task.ground_truth['answer'], f" {task.ground_truth['answer']}\n"):
      parts = reward(task, _trajectory(task, answer))
      assert parts['accuracy'] == parts['success'] == parts['total'] == 1.0, task


@pytest.mark.parametrize('answer', [
    None, '', '  ', '\x00', 'I do not know', '<python>', 'nan', '1e999999', 'x' * 5_000,
    '9' * 4_500, '-' * 50, '1/0', '½', '\ud800'
])
def test_garbage_scores_low_and_never_raises(tasks, answer):
  reward = base.make('reasoning_gym')
  for task in tasks:
    parts = reward(task, _trajectory(task, answer))
    # A verifier that looks for the gold answer within the text gives a share of its length at most.
    assert parts['accuracy'] < 0.5 and parts['success'] == 0.0, (task, parts)


@hypothesis.given(answer=st.one_of(st.none(), st.text(max_size=30)), index=st.integers(0, 199))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_text_gets_a_score_between_0_and_1(tasks, answer, index):
  task = tasks[index % len(tasks)]
  assert 0.0 <= reasoning_gym.score_answer(answer, task.ground_truth).score <= 1.0


def test_a_verifier_that_raises_is_recorded(tasks):
  # Its parser takes an entry's metadata for granted; one without them makes it raise.
  entry = {'family': 'prime_factorization', 'question': '', 'answer': '2 × 3', 'metadata': {}}
  verdict = reasoning_gym.score_answer('two times three', entry)
  assert verdict.score == 0.0 and 'ValueError' in verdict.error
  task = types.Task('0', 'tools', (), entry)
  assert base.make('reasoning_gym')(task, _trajectory(task, 'two'))['verifier_errors'] == 1.0


def test_partial_credit_is_no_success(tasks):
  # spell_backward gives a share of the letters in place: one wrong letter of n is 1 - 1/n.
  task = next(t for t in tasks if t.metadata['family'] == 'spell_backward')
  gold = task.ground_truth['answer']
  parts = base.make('reasoning_gym', {'success': 1.0})(task, _trajectory(task, '#' + gold[1:]))
  assert parts['accuracy'] == pytest.approx(1 - 1 / len(gold))
  assert parts['success'] == parts['total'] == 0.0


def test_unknown_family_is_refused():
  entry = {'family': 'nope', 'question': '', 'answer': '', 'metadata': {}}
  with pytest.raises(ValueError):
    reasoning_gym.score_answer('1', entry)
