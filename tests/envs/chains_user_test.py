"""The chain world with a user: a talk by hand, and its branches."""

from __future__ import annotations

import asyncio
import re

import pytest

from agentrl.core import types
from agentrl.data import chains as data
from agentrl.envs import base, chains_user
from agentrl.rewards import chains as rewards
from agentrl.tokens import formats
from agentrl.tools import chains
from agentrl.tools import executor as executors


@pytest.fixture(name='world')
def _world():
  tools = [chains.Lookup()]
  executor = executors.Executor(tools)
  yield base.make('chains_user', executor=executor, call_format=formats.make('xml', tools), max_turns=8)
  executor.close()


def _task(source='train'):
  return next(t for t in (data.ChainSource(source, size=64, hops=(3, 4))[i] for i in range(64)) if '+' in t.messages[0].content)


def _chain(task):
  """The values after each step, by the facts themselves."""
  question = task.messages[-1].content
  steps, value, values = re.findall(r'[A-Z]|\+\d', question), int(question[0]), []
  for step in steps:
    value = value + int(step) if step[0] == '+' else chains.fact(f'{step}{value}', task.ground_truth['table'])
    values.append(value)
  return steps, values


def test_the_user_goes_on_from_the_answer_given(world):
  task = _task()
  steps, values = _chain(task)
  cut = max(1, len(steps) // 2)

  async def talk(first):
    episode = await world.open(task, 0)
    assert episode.messages[-1].content == f'{task.messages[-1].content[0]}{"".join(steps[:cut])}'
    second = await episode.step(str(first), 'stop')
    kept = await episode.snapshot()
    third = await episode.step(str(values[-1]), 'stop')
    again = await (await world.restore(kept)).step('0', 'stop')
    await episode.close()
    return second, third, again

  second, third, again = asyncio.run(talk(values[cut - 1]))
  assert [(m.role, m.content) for m in second.messages] == [('user', f'{values[cut - 1]}{"".join(steps[cut:])}')]
  assert not second.done and third.done and third.status == types.Status.FINISHED
  trajectory = types.Trajectory(task, 0, '0', 0, answer=third.answer)
  assert rewards.is_right(task, trajectory) and task.ground_truth['answer'] == str(values[-1])
  assert again.done and again.answer == '0'
  # The user does not know the truth.
  wrong = (values[cut - 1] + 1) % 10
  assert asyncio.run(talk(wrong))[0].messages[0].content.startswith(str(wrong))


@pytest.mark.parametrize('turn, reason, status', [
    ('no idea', 'stop', types.Status.FINISHED), ('1', 'length', types.Status.LENGTH)])
def test_what_is_no_digit_ends_the_talk(world, turn, reason, status):
  async def talk():
    episode = await world.open(_task(), 0)
    return await episode.step(turn, reason)

  seen = asyncio.run(talk())
  assert seen.done and seen.status == status
