"""Tests of agents that learn while the policy is frozen: what they show, and what they keep.

Expected values are the definitions on hand-made groups, and the tokens that real prompts hold.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from agentrl.agents.text_experience import advice
from agentrl.core.types import Iteration, ToolCall, Trajectory, Turn
from agentrl.experience import case_bank


def _bank(**options):
  return case_bank.CaseBank({}, **options)


def test_the_nearest_cases_are_those_of_largest_cosine():
  bank = _bank(size=64)
  for state in ('4FP', '9KQ+1', '4FPG'):
    bank.add(state, 'lookup', 1.0)
  own = case_bank.embed('4FP+2', 64)
  cosines = [own @ case_bank.embed(c['state'], 64) for c in bank.cases]
  want = [bank.cases[i]['state'] for i in np.argsort(-np.array(cosines))[:2]]
  assert [c['state'] for c in bank.nearest('4FP+2', 2)] == want and '9KQ+1' not in want


def test_the_classifier_learns_which_cases_are_of_use():
  bank = _bank()
  for reward in (0.0, 1.0):
    bank.add('4F', f'plan {reward}', reward)
  bad, good = bank.cases
  # A logistic regression's step is the rate times the error times the features.
  before = bank.useful('4F', good)
  features = bank._features('4F', good)
  bank.learn('4F', good, True)
  logit = 0.5 * (1 - before) * features @ features
  assert before == 0.5 and bank.useful('4F', good) == pytest.approx(1 / (1 + np.exp(-logit)))
  for _ in range(30):
    bank.learn('4F', good, True)
    bank.learn('4F', bad, False)
  assert bank.useful('4F', bad) < 0.3 < 0.7 < bank.useful('4F', good)
  assert bank.most_useful('4F', 1) == [good]


def test_a_bank_forgets_the_oldest_and_takes_no_case_twice():
  bank = _bank(capacity=2)
  for state in ('a', 'b', 'b', 'c'):
    bank.add(state, '', 0.0)
  assert [c['state'] for c in bank.cases] == ['b', 'c']


def _text(stage, trajectory):
  return stage.tokenizer.decode(trajectory.segments[0].tokens.tolist())


def test_cases_are_shown_and_kept_as_plain_data(stage):
  agent, iteration, tasks = stage.agent('case_memory'), Iteration(0, 10), [stage.task(0), stage.task(1)]
  first = stage.run(agent, tasks, 3, iteration=iteration, learn=True)
  assert not any('yes' in _text(stage, t) or ' no' in _text(stage, t).split('<|assistant|>')[0] for t in first)
  memory = json.loads(json.dumps(iteration.memory))
  assert {c['state'] for c in memory['cases']} == {t.messages[-1].content for t in tasks}
  # The same memory shows the same cases to all samples of a task, before its question.
  later = stage.run(agent, tasks, 2, iteration=Iteration(1, 10, memory))
  for t in later:
    shown = case_bank.text_of(case_bank.CaseBank(memory).most_useful(t.task.messages[-1].content, 1))
    prompt = _text(stage, t).split('<|assistant|>')[0]
    assert shown.strip() in prompt and prompt.index(shown.strip()) < prompt.rindex(t.task.messages[-1].content)
  stage.run(agent, tasks, 2, iteration=Iteration(1, 10, memory), learn=True)
  assert any(memory['weights'])


def _group(stage, name, *samples, family='2_hops'):
  """Samples are (right, calls)."""
  made, task = [], stage.task(0)
  task = type(task)(task.id, task.environment, task.messages, task.ground_truth, {'family': family})
  for right, calls in samples:
    t = Trajectory(task, 0, name, 0)
    t.turns = [Turn(k, 0, 0, 0, '', 'stop', (ToolCall(c, {}),)) for k, c in enumerate(calls)]
    t.rewards['success'] = float(right)
    made.append(t)
  return made


def test_advice_comes_from_mixed_groups_alone_and_is_merged(stage):
  agent, memory = stage.agent('text_experience'), {}
  learn = lambda *groups: agent.learn([t for g in groups for t in g], Iteration(0, 1, memory))
  learn(_group(stage, 'a', (1, ['lookup']), (1, ['noise'])), _group(stage, 'b', (0, ['noise'])))
  assert memory == {}  # all right, all wrong
  learn(_group(stage, 'c', (1, ['lookup', 'lookup', 'lookup']), (0, ['noise', 'lookup'])))
  assert memory == {'2_hops': {'do': ['lookup'] * 3, 'avoid': ['noise']}}  # ADD
  learn(_group(stage, 'd', (1, ['lookup', 'lookup']), (0, ['lookup'])))
  assert memory['2_hops']['do'] == ['lookup'] * 2 and memory['2_hops']['avoid'] == ['noise']  # UPDATE
  learn(_group(stage, 'e', (1, ['noise', 'lookup', 'lookup']), (0, [])))
  assert memory['2_hops'] == {'do': ['lookup'] * 2}  # DELETE: a success used it
  assert advice(memory['2_hops']) == 'do lookup lookup'


def test_advice_stands_in_the_prompt_of_its_family(stage):
  agent = stage.agent('text_experience')
  memory = {stage.task(0).metadata['family']: {'do': ['lookup', 'lookup']}}
  (told,) = stage.run(agent, [stage.task(0)], 1, iteration=Iteration(1, 10, memory))
  (other,) = stage.run(agent, [stage.task(0, ('F',))], 1, iteration=Iteration(1, 10, memory))
  assert 'do lookup lookup' in _text(stage, told) and 'do lookup' not in _text(stage, other)


@pytest.mark.parametrize('name, options, words', [
    ('case_memory', {'retrieval': 'best'}, 'none of parametric, cosine'), ('case_memory', {'cases': 0}, 'at least 1'),
])
def test_bad_options_are_refused(stage, name, options, words):
  with pytest.raises(ValueError, match=words):
    stage.agent(name, **options)
