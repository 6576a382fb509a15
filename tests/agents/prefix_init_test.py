"""Tests of rollouts that begin within a solution, and of what is imitated."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.agents.prefix_init import is_spoiled
from agentrl.core.types import Iteration, Status, Task, Trajectory, Turn
from agentrl.experience import base as experience
from agentrl.tools import base as tools_base


def scored(task, sample, success, turns=()):
  t = Trajectory(task, sample, task.id, 0, status=Status.FINISHED, rewards={'success': success})
  for k, tokens in enumerate(turns):
    t.segments[0].append_forced([1, 2], k)
    start = len(t.segments[0])
    t.segments[0].append_sampled(tokens, [-1.0] * len(tokens), [1.0] * len(tokens), k)
    t.turns.append(Turn(k, 0, start, len(t.segments[0]), '', 'stop'))
  return t


def test_the_starting_point_is_the_last_turn_and_moves_back_with_success(stage):
  agent, task, memory = stage.agent('prefix_init', advance=0.5), stage.task(), {}
  now = lambda step: Iteration(step, 9, memory)
  agent.learn([scored(task, 0, 0.0), scored(task, 1, 0.0)], now(0))
  assert memory == {}
  long, short = [[5], [6, 7], [8], [9]], [[5], [6, 7], [8]]
  agent.learn([scored(task, 0, 1.0, long), scored(task, 1, 1.0, short)], now(1))
  assert memory == {task.id: {'turns': short, 'start': 2}}
  starts = []
  for shares in ([0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]):
    agent.learn([scored(task, k, float(s), long) for k, s in enumerate(shares)], now(2))
    starts.append(memory[task.id]['start'])
  assert starts == [2, 1, 1, 0, 0] and memory[task.id]['turns'] == short


def test_the_latest_questions_are_kept(stage):
  agent, memory = stage.agent('prefix_init', size=2), {}
  for i in range(4):
    agent.learn([scored(stage.task(i), 0, 1.0, [[5], [6]])], Iteration(i, 9, memory))
  assert list(memory) == ['chain-2', 'chain-3']


def test_the_prefix_is_shown_replayed_and_not_trained_on(stage):
  # Solve the task with the policy that knows, then take its first turn away from it.
  task = stage.task(4, steps=('F', 'G'))
  answer, (first, second) = task.ground_truth['answer'], task.ground_truth['needed']
  words = [stage.tokenizer.encode(f'<lookup>{fact}</lookup>', allow_markers=True) for fact in (first, second)]
  memory = {task.id: {'turns': [*words, [1]], 'start': 2}}
  stage.script({'<|assistant|>': {answer: 1.0}, answer: {'<|end|>': 1.0}})
  got = stage.run(stage.agent('prefix_init'), [task], 2, iteration=Iteration(3, 9, memory))
  for t in got:
    values = [task.ground_truth['needed'][1][1], answer]
    text = stage.tokenizer.decode(t.segments[0].tokens.tolist())
    shown = ''.join(f'<lookup>{fact}</lookup><|tool|>{value}<|end|><|assistant|>'
                    for fact, value in zip((first, second), values))
    assert text == f'<|user|>{task.messages[0].content}<|end|><|assistant|>{shown}{answer}<|end|>'
    sampled = t.segments[0].tokens[t.segments[0].sampled].tolist()
    assert stage.tokenizer.decode(sampled) == f'{answer}<|end|>'
    assert t.status is Status.FINISHED and t.answer == answer and len(t.turns) == 1


def test_several_starting_points_are_several_groups(stage):
  task = stage.task(4, steps=('F', 'G'))
  answer, needed = task.ground_truth['answer'], task.ground_truth['needed']
  words = [stage.tokenizer.encode(f'<lookup>{fact}</lookup>', allow_markers=True) for fact in needed]
  memory = {task.id: {'turns': [*words, [1]], 'start': 2}}
  stage.script({'<|assistant|>': {answer: 1.0}, answer: {'<|end|>': 1.0}})
  got = stage.run(stage.agent('prefix_init', starts='parallel'), [task], 6, iteration=Iteration(3, 9, memory))
  calls = {t.sample: stage.tokenizer.decode(t.segments[0].tokens.tolist()).count('<lookup>') for t in got}
  assert calls == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
  assert [t.group_id for t in got] == [f'{task.id}/from_{calls[t.sample]}' for t in got]
  # Without a solution they are one plain group.
  assert {t.group_id for t in stage.run(stage.agent('prefix_init', starts='parallel'), [task], 2)} == {task.id}


def test_what_the_environment_spoiled_is_sampled_anew_from_the_same_point(stage, chain_executor):
  task = stage.task(4, steps=('F', 'G'))
  first = stage.tokenizer.encode(f"<lookup>{task.ground_truth['needed'][0]}</lookup>", allow_markers=True)
  memory = {task.id: {'turns': [first, [1]], 'start': 1}}
  tool, real, made = chain_executor.tools['lookup'], chain_executor.tools['lookup'].call, []

  async def busy_at_first(state, arguments):
    made.append(arguments)
    # The replayed call succeeds, what is asked after it fails the first four times.
    if arguments['fact'] != task.ground_truth['needed'][0] and sum(a == arguments for a in made) < 5:
      return tools_base.failure('transient', 'busy')
    return await real(state, arguments)

  stage.script({'<|assistant|>': {'<lookup>': 1.0}, '<lookup>': {'G': 1.0}, 'G': {'1': 1.0}, '1': {'</lookup>': 1.0}})
  tool.call = busy_at_first
  runs = {}
  try:
    for retries in (0, 1, 9):
      made.clear()
      runs[retries] = stage.run(stage.agent('prefix_init', retries=retries), [task], 1, turns=2,
                                iteration=Iteration(3, 9, memory))
  finally:
    del tool.call
  for retries, [t] in runs.items():
    assert is_spoiled(t) == (retries < 9)
    assert stage.tokenizer.decode(t.segments[0].tokens.tolist()).count(task.ground_truth['needed'][0]) == 1
    assert t.group_id == task.id and not t.segments[0].sampled[:8].any()


def test_a_prefix_that_ends_the_episode_is_the_environments_fault(stage):
  task = stage.task()
  memory = {task.id: {'turns': [stage.tokenizer.encode('7<|end|>', allow_markers=True), [1]], 'start': 1}}
  [t] = stage.run(stage.agent('prefix_init'), [task], 1, iteration=Iteration(3, 9, memory))
  assert (t.status, t.detail) == (Status.ENVIRONMENT_FAILURE, 'a stored prefix ended the episode')


def test_what_it_learns_from_real_rollouts_leads_on(stage):
  task = stage.task(4, steps=('F',))
  fact, answer = task.ground_truth['needed'][0], task.ground_truth['answer']
  ask = stage.tokenizer.encode(f'<lookup>{fact}</lookup>', allow_markers=True)
  tokens = [stage.tokenizer.decode([i]) for i in ask]
  follows = {a: {b: 1.0} for a, b in zip(tokens, tokens[1:])}
  digit = tokens[-2]
  follows['<|assistant|>'] = {'<lookup>': .5, answer: .5}
  follows.setdefault(answer, {})
  follows[answer]['<|end|>'] = 1.0 if answer != digit else .5
  if answer == digit:
    follows[answer]['</lookup>'] = .5
  stage.script(follows)
  agent, memory = stage.agent('prefix_init'), {}
  for step in range(4):
    got = stage.run(agent, [task], 8, iteration=Iteration(step, 9, memory), learn=True, seed=step)
  assert memory[task.id]['turns'][-1] == stage.tokenizer.encode(f'{answer}<|end|>', allow_markers=True)
  assert all(t.status is not Status.AGENT_FAILURE for t in got)


def test_successes_come_back_one_step_later_one_a_question():
  memory, rng = experience.make('successes', dict(size=2, most=3)), np.random.default_rng(0)
  tasks = [Task(f't{i}', 'chains', (), None) for i in range(3)]
  exchange = lambda *given: memory.exchange([scored(tasks[i], 0, s) for i, s in given], rng, Iteration(0, 1))
  assert len(exchange((0, 1.0), (1, 0.0))) == 2
  out = exchange((0, 1.0), (2, 1.0))
  assert [(t.task.id, t.rewards.get('replayed', 0.0)) for t in out] == [('t0', 0), ('t2', 0), ('t0', 1)]
  assert [t.task.id for t in memory.trajectories] == ['t0', 't2'] and memory.max_replayed(9) == 3
  exchange((1, 1.0))
  assert [t.task.id for t in memory.trajectories] == ['t2', 't1']
  with pytest.raises(ValueError, match='size=0'):
    experience.make('successes', dict(size=0))


@pytest.mark.parametrize('bad', [dict(advance=0.0), dict(advance=1.1), dict(size=0), dict(retries=-1)])
def test_numbers_out_of_range_are_refused(stage, bad):
  [(name, value)] = bad.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    stage.agent('prefix_init', **bad)
