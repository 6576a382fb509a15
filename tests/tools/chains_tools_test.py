"""The chain world's facts and tools."""

from __future__ import annotations

import asyncio

import pytest

from agentrl.core import types
from agentrl.tools import base
from agentrl.tools import chains
from agentrl.tools import executor as executor_lib


def _ask(tool, names, seed=chains.session_seed(7, 3)):
  async def run():
    session = executor_lib.Executor([tool]).open(seed)
    return [(await session.call([types.ToolCall(tool.name, {'fact': name})]))[0] for name in names]
  return asyncio.run(run())


@pytest.mark.parametrize('relation', chains.PRIVATE + chains.PUBLIC)
def test_relations_are_permutations_and_only_private_ones_depend_on_the_task(relation):
  tables = [[chains.fact(f'{relation}{d}', table) for d in range(10)] for table in range(20)]
  assert all(sorted(table) == list(range(10)) for table in tables)
  # 20 draws of 10! permutations: two equal ones have a chance of 5e-5.
  assert len({tuple(table) for table in tables}) == (20 if relation in chains.PRIVATE else 1)


@pytest.mark.parametrize('name', ['4F', 'F', 'F42', 'X1', '', 'F\u0663'])
def test_what_is_no_fact_fails(name):
  with pytest.raises(ValueError, match='no fact'):
    chains.fact(name, 0)
  (result,) = _ask(chains.Lookup(), [name])
  assert (result.ok, result.error) == (False, 'no_such_fact')


def test_lookup_says_the_fact_of_the_sessions_table():
  names = [f'{r}{d}' for r in chains.PRIVATE + chains.PUBLIC for d in range(10)]
  assert [r.text for r in _ask(chains.Lookup(), names)] == [str(chains.fact(n, 7)) for n in names]


def test_calls_fail_at_the_rate_and_the_episode_decides_which():
  tool = chains.Lookup(fail_rate=0.3)
  results = _ask(tool, ['F1'] * 1_000)
  failed = sum(not r.ok for r in results)
  # Binomial(1000, 0.3): mean 300, standard deviation 14.5; five of them.
  assert abs(failed - 300) < 73
  assert {r.error for r in results if not r.ok} == {'transient'}
  assert {r.text for r in results if r.ok} == {str(chains.fact('F1', 7))}
  assert [r.ok for r in results] == [r.ok for r in _ask(tool, ['F1'] * 1_000)]
  assert [r.ok for r in results] != [
      r.ok for r in _ask(tool, ['F1'] * 1_000, chains.session_seed(7, 4))]


def test_an_ambiguous_fact_names_two_and_then_the_right_one():
  tool = chains.Lookup(ambiguous_rate=1.0)
  for digit in range(10):
    first, second = _ask(tool, [f'G{digit}'] * 2)
    right = chains.fact(f'G{digit}', 7)
    pair = [int(d) for d in first.text.split(chains.OR)]
    assert len(set(pair)) == 2 and right in pair and second.text == str(right)
  assert chains.OR not in _ask(tool, ['P1'])[0].text


def test_noise_answers_digits_that_tell_nothing():
  texts = [r.text for r in _ask(chains.Noise(), ['F1'] * 500)]
  assert set(texts) == set('0123456789')
  # Binomial(500, 0.1): mean 50, standard deviation 6.7; five of them.
  assert abs(texts.count(str(chains.fact('F1', 7))) - 50) < 34


@pytest.mark.parametrize('tool', [chains.Lookup(0.5, 0.5), chains.Noise()])
def test_a_snapshot_goes_on_alike_many_times(tool):
  calls = [types.ToolCall(tool.name, {'fact': f'F{i % 10}'}) for i in range(30)]

  async def run():
    executor = executor_lib.Executor([tool])
    session = executor.open(chains.session_seed(1, 2))
    for call in calls[:10]:
      await session.call([call])
    snapshot = await session.snapshot()
    texts = []
    for branch in (session, executor.restore(snapshot), executor.restore(snapshot)):
      texts.append([(await branch.call([call]))[0].text for call in calls[10:]])
    return texts

  first, second, third = asyncio.run(run())
  assert first == second == third


@pytest.mark.parametrize('settings', [
    dict(fail_rate=1.0), dict(fail_rate=-0.1), dict(ambiguous_rate=1.1)])
def test_rates_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match='rate'):
    base.make('lookup', **settings)


@pytest.mark.parametrize('key', [(-1, 0), (1 << 31, 0), (0, -1), (0, 1 << 32)])
def test_session_seeds_are_checked(key):
  with pytest.raises(ValueError, match='range'):
    chains.session_seed(*key)
