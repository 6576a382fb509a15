"""Tests of the tool environment: scripted policies, real tools, answers worked out by hand."""

from __future__ import annotations

import asyncio

import pytest

from agentrl import envs
from agentrl import tools
from agentrl.core.types import Boundary, Message, Status, Task, ToolCall
from agentrl.tokens import formats

TASK = Task(id='t0', environment='tools', messages=(Message('user', '40 + 2?'),), ground_truth='42')


@pytest.fixture(scope='module', name='executor')
def shared_executor():
  """Real tools, one pool for the module."""
  with tools.Executor([tools.make('python', workers=1), tools.make('calculator')]) as executor:
    yield executor


def make(executor, *, parallel=False, **settings):
  call_format = formats.xml_format(list(executor.tools.values()), parallel=parallel)
  return envs.make('tools', executor=executor, call_format=call_format, **settings)


def play(env, *turns, stop_reason='stop'):
  """Returns the observations of scripted turns in a new episode."""
  async def main():
    episode = await env.open(TASK, seed=0)
    observations = [await episode.step(turn, stop_reason) for turn in turns]
    await episode.close()
    return observations
  return asyncio.run(main())


def texts(observation):
  return [m.content for m in observation.messages]


def test_a_task_solved_with_a_tool(executor):
  env = make(executor)
  first, second, last = play(env, 'Let me see. <python>x=40</python>', '<python>x+2</python>',
                             ' 42 <|end|>')
  assert first.messages == (Message('tool', '(no output)', 'python'),)
  assert second.messages == (Message('tool', '42', 'python'),)
  assert (second.done, second.status, second.answer) == (False, Status.RUNNING, None)
  assert second.calls[0].arguments == {'code': 'x+2'} and second.results[0].text == '42'
  assert (last.done, last.status, last.answer) == (True, Status.FINISHED, '42')
  assert (last.messages, last.boundary, last.calls) == ((), None, ())


def test_results_bear_the_names_of_tools_and_no_others(executor):
  env = envs.make('tools', executor=executor, call_format=formats.HermesFormat(parallel=True))
  call = lambda name, **arguments: formats.HermesFormat().render(ToolCall(name, arguments))
  [seen] = play(env, call('python', code='1') + call('no_tool') + call('python', cod='1') + '<tool_call>{"na</tool_call>')
  assert [m.name for m in seen.messages] == ['python', None, 'python', None]
  assert [c.name for c in seen.calls] == ['python', 'no_tool', 'python', '']


def test_the_chat_starts_with_the_system_message_and_the_task(executor):
  async def opening(env):
    return (await env.open(TASK, seed=0)).messages

  described = asyncio.run(opening(make(executor)))
  assert [m.role for m in described] == ['system', 'user']
  assert '<python>code</python>' in described[0].content and described[1] == TASK.messages[0]
  prompted = asyncio.run(opening(make(executor, system_prompt='Hi')))
  assert prompted == (Message('system', 'Hi'), *TASK.messages)
  assert asyncio.run(opening(make(executor, system_prompt=''))) == TASK.messages


def test_stops_are_those_of_the_format(executor):
  assert make(executor).stops == ('</python>', '</calculator>')
  assert make(executor, parallel=True).stops == ()


def test_malformed_calls_are_told_and_the_episode_goes_on(executor):
  observations = play(make(executor), '<python>1+1<|end|>', '<python><calculator>1</calculator>',
                      '1</python>', '<calculator>foo</calculator>', '<python>foo</python>',
                      '2<|end|>')
  assert [texts(o) for o in observations] == [
      ['error: <python> is not closed'], ['error: <calculator> inside <python>'],
      ['error: </python> without <python>'], ["error: unknown name 'foo'; numbers only"],
      ["error: NameError: name 'foo' is not defined"], []]
  assert [o.done for o in observations] == [False] * 5 + [True]
  assert [o.results[0].error for o in observations[:5]] == ['malformed'] * 3 + ['raised'] * 2


def test_unknown_tools_are_told(executor):
  env = envs.ToolEnvironment(executor, formats.HermesFormat())
  call = '<tool_call>{"name": "%s", "arguments": {"%s": "1"}}</tool_call>'
  first, second = play(env, call % ('pyton', 'code'), call % ('python', 'cod'))
  assert texts(first) == ["error: unknown tool 'pyton', known: calculator, python"]
  assert texts(second) == ["error: missing argument 'code'"]


def test_parallel_calls_give_one_message_each_in_order(executor):
  env = make(executor, parallel=True, max_calls=3)
  (observation,) = play(env, '<calculator>1</calculator><python>while True: pass</python>'
                             '<calculator>3</calculator><calculator>4</calculator>')
  assert texts(observation) == ['1', 'error: TimeoutError: time limit exceeded', '3',
                                'error: at most 3 calls a turn']
  assert len(observation.calls) == len(observation.results) == 4


REFUSED = 'error: repeated call, not run'


@pytest.mark.parametrize('max_repeats, expected', [
    (0, ['1', REFUSED, REFUSED, '9', '2']),
    (1, ['1', '2', REFUSED, '9', '3']),
    (None, ['1', '2', '3', '9', '4']),
])
def test_equal_calls_in_a_row_are_refused_beyond_the_limit(executor, max_repeats, expected):
  """The code counts how often it really ran; another call in between starts the row anew."""
  code = '<python>try:\n  x += 1\nexcept NameError:\n  x = 1\nx</python>'
  observations = play(make(executor, max_repeats=max_repeats), code, code, code,
                      '<calculator>9</calculator>', code)
  assert [texts(o)[0] for o in observations] == expected


def test_repeats_within_one_turn_count_too(executor):
  (observation,) = play(make(executor, parallel=True), '<calculator>1</calculator>' * 3)
  assert [r.error for r in observation.results] == [None, None, 'repeated']


def test_the_turn_limit_ends_without_running_the_calls(executor):
  executor.take_stats()
  first, last = play(make(executor, max_turns=2), *['<calculator>1</calculator>'] * 2)
  assert not first.done
  assert (last.done, last.status, last.boundary) == (True, Status.TURN_LIMIT, Boundary.POLICY)
  assert (len(last.calls), last.results, last.answer) == (1, (), None)
  assert executor.take_stats()['calculator'].calls == 1


def test_an_answer_in_the_last_turn_counts(executor):
  (last,) = play(make(executor, max_turns=1), '42<|end|>')
  assert (last.status, last.answer) == (Status.FINISHED, '42')


@pytest.mark.parametrize('stop_reason', ['length', 'context'])
def test_a_turn_cut_short_is_no_answer(executor, stop_reason):
  (last,) = play(make(executor), '42', stop_reason=stop_reason)
  assert (last.done, last.status, last.answer) == (True, Status.LENGTH, None)
  assert last.boundary == Boundary.POLICY and stop_reason in last.detail


def test_a_finished_episode_takes_no_more_turns(executor):
  with pytest.raises(RuntimeError, match="'t0' is over"):
    play(make(executor), '42', '43')


def test_disabled_tools_leave_the_rest_of_the_episode_alone():
  with tools.Executor([tools.make('calculator')], disabled=True) as executor:
    first, last = play(make(executor), '<calculator>40+2</calculator>', '42')
  assert texts(first) == ['error: tool disabled'] and last.answer == '42'


def test_forks_go_on_from_the_snapshot_alone(executor):
  async def main():
    env = make(executor, max_turns=3)
    episode = await env.open(TASK, seed=0)
    await episode.step('<python>x = 1</python>', 'stop')
    snapshot = await episode.snapshot()
    forks = [await env.restore(snapshot) for _ in range(2)]
    got = []
    for n, one in zip((10, 100), forks):
      got.append(texts(await one.step(f'<python>x += {n}; x</python>', 'stop')))
    # The original has made one turn of three, so a second runs and a third with a call is too many.
    got.append(texts(await episode.step('<python>x</python>', 'stop')))
    last = await episode.step('<python>x</python>', 'stop')
    return got, last, forks[0].messages == episode.messages

  got, last, same = asyncio.run(main())
  assert got == [['11'], ['101'], ['1']]
  assert last.status == Status.TURN_LIMIT and same


def test_settings_that_make_no_sense_are_refused(executor):
  with pytest.raises(ValueError, match='max_turns=0'):
    make(executor, max_turns=0)
  with pytest.raises(LookupError, match="did you mean 'tools'"):
    envs.make('tool')
