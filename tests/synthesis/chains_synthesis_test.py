"""Scripted conversations of the chain world."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from agentrl.core import types
from agentrl.data import chains as data
from agentrl.rewards import chains as rewards
from agentrl.synthesis import base
from agentrl.synthesis import chains
from agentrl.tokens import formats
from agentrl.tools import base as tools
from agentrl.tools import executor as executors

N = 400


def _traces(lookup=None, **settings):
  named = [tools.make('lookup', **(lookup or {})), tools.make('calculator'), tools.make('noise')]
  write = base.DEMONSTRATORS.get('chains')
  return write([*data.ChainSource('train', size=N)], executors.Executor(named),
               **{'seed': 0, 'call_format': formats.make('xml', named), **settings}), named


def _parts(trace, named):
  """Scores a trace as the trajectory of a policy that wrote it."""
  call_format = formats.make('xml', named)
  after = trace.messages[len(trace.task.messages):]
  turns = []
  for i, message in enumerate(after):
    if message.role == 'assistant':
      calls = call_format.parse(message.content)
      text = after[i + 1].content if calls else ''
      results = tuple(types.ToolResult((types.Part('text', text),), ok='error' not in text,
                                       error='transient' if 'busy' in text else None) for _ in calls)
      turns.append(types.Turn(len(turns), 0, 0, 0, message.content, 'stop', calls, results))
  trajectory = types.Trajectory(trace.task, 0, '0', 0, status=types.Status.FINISHED,
                                answer=after[-1].content, turns=turns)
  return {**rewards.ChainAccuracy()(trace.task, trajectory),
          **rewards.ChainCalls()(trace.task, trajectory)}


def test_the_same_seed_gives_the_same_traces():
  assert _traces()[0] == _traces()[0] != _traces(seed=1)[0]


def test_the_share_of_right_traces_is_as_asked():
  traces, named = _traces(share_right=0.6, max_calls=40)
  scripted = sum(t.strategy.startswith('right') for t in traces)
  # Binomial(400, 0.6): mean 240, standard deviation 9.8; five of them.
  assert abs(scripted - 240) < 49
  for trace in traces:
    assert _parts(trace, named)['success'] == float(trace.right)
    if trace.strategy.startswith('right'):
      assert trace.right
  wrong = [t for t in traces if not t.strategy.startswith('right')]
  assert {t.strategy.removesuffix('_careful') for t in wrong} == set(chains.WRONG_STRATEGIES)
  # Guesses among ten digits are right now and then; slips never, as relations are permutations.
  assert 0 < np.mean([t.right for t in wrong]) < 0.2
  assert not any(t.right for t in wrong if t.strategy.startswith('slip'))


def test_lean_right_traces_make_the_needed_calls_and_no_other():
  traces, named = _traces(share_right=1.0, over_call=0.0, repeat=0.0, noise=0.0, malformed=0.0)
  for trace in traces:
    parts = _parts(trace, named)
    assert parts['success'] == 1.0 and parts['avoidable_calls'] == parts['missing_calls'] == 0.0


def test_habits_waste_calls_as_often_as_asked():
  traces, named = _traces(share_right=1.0, over_call=1.0, repeat=0.0, noise=0.5, malformed=0.0)
  waste = [_parts(t, named)['avoidable_calls'] - len(t.task.ground_truth['known']) for t in traces]
  # All that can be known is asked, and besides half of the traces make one call of noise.
  assert set(waste) == {0.0, 1.0} and 0.37 < np.mean(waste) < 0.63


def test_failing_calls_are_made_again():
  traces, named = _traces(lookup={'fail_rate': 0.5}, share_right=1.0, over_call=0.0, repeat=0.0,
                          noise=0.0, malformed=0.0, max_calls=60)
  assert all(t.right for t in traces)
  texts = collections.Counter(m.content for t in traces for m in t.messages if m.role == 'tool')
  assert texts['error: busy'] > N


def test_a_trace_out_of_calls_guesses():
  traces, _ = _traces(lookup={'fail_rate': 0.9}, max_calls=3)
  assert all(sum(m.role == 'tool' for m in t.messages) <= 3 for t in traces)
  assert all(t.messages[-1].role == 'assistant' for t in traces)


def test_shares_and_tools_are_checked():
  with pytest.raises(ValueError, match='repeat'):
    _traces(repeat=1.5)
  with pytest.raises(ValueError, match='lookup'):
    chains.make_traces([], executors.Executor([tools.make('noise')]), seed=0)


def test_malformed_calls_are_mended():
  traces, named = _traces(share_right=1.0, over_call=0.0, repeat=0.0, noise=0.0, malformed=0.5,
                          max_calls=40)
  wasted = [_parts(t, named)['avoidable_calls'] for t in traces]
  lookups = sum(len(t.task.ground_truth['needed']) for t in traces)
  assert all(t.right for t in traces)
  # Binomial(n, 0.5) with n about 750: standard deviation 13.7; five of them.
  assert abs(sum(wasted) - lookups / 2) < 69
