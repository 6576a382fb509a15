"""Tests of competing instructions: draws, credit, replacement, and that a group has one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agentrl.agents.instruction_population import draw_probabilities
from agentrl.core.types import Iteration, Trajectory


def test_the_draw_is_a_softmax():
  got = draw_probabilities([0.0, 0.2, 1e3], 0.2)
  expected = np.exp([0.0 / 0.2 - 5e3, 0.2 / 0.2 - 5e3, 0.0])
  np.testing.assert_allclose(got, expected / expected.sum())


def test_a_group_has_one_instruction_and_shows_it(stage):
  agent, memory = stage.agent('instruction_population', instructions=('', 'lookup', 'noise')), {}
  tasks = [stage.task(i) for i in range(12)]
  got = stage.run(agent, tasks, 2, iteration=Iteration(0, 9, memory))
  shown = {}
  for t in got:
    text = stage.tokenizer.decode(t.segments[0].tokens.tolist())
    head = text.partition('<|user|>')[0]
    shown.setdefault(t.task.id, set()).add(head)
    drawn = memory['drawn'][t.task.id]
    assert head == (f'<|system|>{drawn}<|end|>' if drawn else '')
  assert all(len(heads) == 1 for heads in shown.values())
  assert len({next(iter(h)) for h in shown.values()}) == 3
  json.dumps(memory)


def _scored(stage, agent, memory, step, values):
  """A step in which each instruction earns what `values` say."""
  now = Iteration(step, 99, memory)
  tasks = [stage.task(100 * step + i) for i in range(20)]
  for task in tasks:
    agent.programs(task, 1, now)
  got = [Trajectory(task, 0, task.id, 0, rewards={'total': values[memory['drawn'][task.id]]}) for task in tasks]
  agent.learn(got, now)


def test_the_weakest_makes_way_for_the_next_proposal(stage):
  agent = stage.agent('instruction_population', instructions=('a', 'b'), proposals=('c', 'd'), every=2, temperature=1.0)
  memory, values = {}, {'a': 0.5, 'b': 0.1, 'c': 0.9, 'd': 0.3}
  seen = []
  for step in range(8):
    _scored(stage, agent, memory, step, values)
    seen.append([i['text'] for i in memory['population']])
  assert seen[0] == ['a', 'b'] and seen[1] == ['a', 'c'] and seen[3] == ['c', 'd']
  # No proposal is left, and two stay.
  assert seen[5] == seen[7] == ['c', 'd']
  [c] = [i for i in memory['population'] if i['text'] == 'c']
  assert c['sum'] / c['count'] == pytest.approx(0.9) and memory['drawn'] == {}


def test_what_earns_more_is_drawn_more(stage):
  agent = stage.agent('instruction_population', instructions=('a', 'b'), every=99, temperature=0.2)
  memory = {}
  for step in range(10):
    _scored(stage, agent, memory, step, {'a': 1.0, 'b': 0.0})
  counts = {i['text']: i['count'] for i in memory['population']}
  # exp(5) times as likely once both are known.
  assert counts['a'] > 5 * counts['b'] > 0


@pytest.mark.parametrize('bad, words', [
    (dict(instructions=()), 'one instruction'), (dict(instructions=('a',), proposals=('a',)), 'must differ'),
    (dict(instructions=('a',), temperature=0.0), 'temperature=0.0'), (dict(instructions=('a',), every=0), 'every=0')])
def test_what_makes_no_sense_is_refused(stage, bad, words):
  with pytest.raises(ValueError, match=words):
    stage.agent('instruction_population', **bad)
