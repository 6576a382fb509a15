"""The chain world played by one who knows the solution: proves the tasks without a model."""

from __future__ import annotations

import asyncio

import pytest

from agentrl.core import types
from agentrl.data import chains as data
from agentrl.envs import base as envs
from agentrl.envs import chains as chains_env
from agentrl.rewards import base as rewards_base
from agentrl.rewards import chains as rewards
from agentrl.tokens import formats
from agentrl.tools import base as tools
from agentrl.tools import executor as executors


def _environment(max_turns=8, **lookup):
  named = [tools.make('lookup', **lookup), tools.make('calculator'), tools.make('noise')]
  return envs.make('chains', executor=executors.Executor(named),
                   call_format=formats.make('xml', named), max_turns=max_turns)


def _play(environment, task, seed=0, leave_out=None):
  """Returns the gold trajectory, without tokens, optionally never asking for one fact."""
  async def run():
    trajectory = types.Trajectory(task, 0, task.id, seed)
    truth = task.ground_truth
    needed = tuple(name for name in truth['needed'] if name != leave_out)
    progress = rewards.Progress(needed)
    episode = await environment.open(task, seed)
    while True:
      gold = chains_env.gold_turn(truth, progress)
      text = gold if isinstance(gold, str) else environment.call_format.render(gold)
      step = await episode.step(text, 'stop')
      turn = types.Turn(len(trajectory.turns), 0, 0, 0, text, 'stop', step.calls, step.results)
      trajectory.turns.append(turn)
      progress = progress.after(step.calls, step.results)
      if step.done:
        trajectory.status, trajectory.answer = step.status, step.answer
        await episode.close()
        return trajectory
  return asyncio.run(run())


def test_gold_scores_full_marks_with_exactly_the_needed_calls():
  environment = _environment()
  reward = rewards_base.make('chains')
  for task in data.ChainSource('train', size=100, hops=(1, 5)):
    parts = reward(task, _play(environment, task))
    assert parts['success'] == parts['total'] == 1.0
    assert parts['calls'] == parts['needed_calls'] == len(task.ground_truth['needed'])
    assert parts['avoidable_calls'] == parts['missing_calls'] == parts['failed_calls'] == 0.0


def test_no_needed_call_can_be_left_out():
  # The value of a fact that was not looked up is one of ten, whatever else is known: with another
  # table in which it differs, question, calls and results are the same and the answer is not.
  for task in data.ChainSource('train', size=50):
    truth = task.ground_truth
    for name in truth['needed'][-1:]:
      answers = {data.solve(int(task.messages[0].content[0]), _steps(task), table)['answer']
                 for table in range(200)}
      assert len(answers) == 10, name


def _steps(task):
  text = task.messages[0].content[1:]
  sums = text.split('+')
  return list(sums[0]) + [f'+{s}' for s in sums[1:]]


def test_gold_gets_there_through_failing_calls():
  environment = _environment(max_turns=60, fail_rate=0.5)
  reward = rewards_base.make('chains')
  failed = 0.0
  for seed, task in enumerate(data.ChainSource('train', size=50)):
    parts = reward(task, _play(environment, task, seed))
    assert parts['success'] == 1.0 and parts['avoidable_calls'] == 0.0
    assert parts['calls'] - parts['failed_calls'] == parts['needed_calls']
    failed += parts['failed_calls']
  assert failed > 50  # about one failure a needed call, of which there are about 100


def test_gold_asks_twice_for_what_is_ambiguous():
  environment = _environment(ambiguous_rate=1.0)
  reward = rewards_base.make('chains')
  for task in data.ChainSource('train', size=30, hops=(2, 3)):
    trajectory = _play(environment, task)
    parts = reward(task, trajectory)
    assert parts['success'] == 1.0 and parts['avoidable_calls'] == 0.0
    assert parts['calls'] == 2 * parts['needed_calls']


def test_a_restored_episode_goes_on_alone():
  environment = _environment(fail_rate=0.3)
  task = next(t for t in data.ChainSource('train', size=100) if len(t.ground_truth['needed']) == 3)
  call = environment.call_format.render(types.ToolCall('lookup', {'fact': 'F1'}))

  async def run():
    episode = await environment.open(task, 5)
    await episode.step(call, 'stop')
    snapshot = await episode.snapshot()
    texts = []
    for branch in (await environment.restore(snapshot), episode, await environment.restore(snapshot)):
      steps = [await branch.step(call, 'stop') for _ in range(4)]
      texts.append([step.results[0].text for step in steps])
      done = await branch.step(task.ground_truth['answer'], 'stop')
      assert done.answer == task.ground_truth['answer']
    return texts

  first, second, third = asyncio.run(run())
  assert first == second == third


@pytest.mark.parametrize('seed', [0, 2**32 - 1])
def test_the_seed_of_an_episode_changes_no_fact(seed):
  environment = _environment()
  task = data.ChainSource('train', size=1)[0]
  texts = [r.text for r in _play(environment, task, seed).results]
  assert texts == [r.text for r in _play(environment, task, 1).results]
