"""Shapings of rewards against their formulas, written out again or worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards.shaping import flags, tool_use

STOP = types.Turn(0, 0, 0, 0, '', 'stop')


def _task(number=0):
  return types.Task(f'task-{number}', 'tools', (), None)


def _turn(*errors, fact='F1', tool='lookup', text=''):
  """A turn with one call for each error; None is a call that was answered."""
  calls = tuple(types.ToolCall(tool, {'fact': fact}) for _ in errors)
  results = tuple(types.ToolResult((), ok=e is None, error=e) for e in errors)
  return types.Turn(0, 0, 0, 0, text, 'stop', calls, results)


def _trajectory(*turns, task=0, group=None, answer='1', status=types.Status.FINISHED, turn_rewards=None, **rewards):
  rewards = {'accuracy': 0.0, 'format': 1.0, 'total': rewards.get('accuracy', 0.0), 'calls': 0.0, 'tokens': 0.0,
             'truncated': 0.0, **rewards}
  return types.Trajectory(_task(task), 0, group or f'task-{task}', 0, status=status, answer=answer, turns=list(turns),
                          rewards=rewards, turn_rewards=turn_rewards or {})


def _shape(name, trajectories, step=0, memory=None, **options):
  """Applies a shaping as `Reward.score` does, and returns what it says."""
  shaping = base.SHAPINGS.get(name)(**options)
  found = shaping(trajectories, types.Iteration(step, 100, {} if memory is None else memory))
  for parts in found:
    assert set(parts) == {*shaping.names, *shaping.turn_names}
  return found


def _totals(name, trajectories, **options):
  return [parts['total'] for parts in _shape(name, trajectories, **options)]


def test_the_overlong_penalty_is_that_of_its_source():
  lengths = np.random.default_rng(0).integers(0, 60, 50)
  found = _totals('overlong', [_trajectory(tokens=float(n), accuracy=1.0) for n in lengths], max_tokens=40, buffer=16,
                  factor=0.5)
  # Formula of the source, one length at a time: min(-(len - (Lmax - Lbuf)) / Lbuf * factor, 0).
  np.testing.assert_allclose(found, [1.0 + min(-(n - (40 - 16)) / 16 * 0.5, 0) for n in lengths])


def test_gates_count_only_what_is_met_before_them():
  order = ({'part': 'format', 'weight': 0.1}, {'part': 'accuracy', 'threshold': 0.5, 'weight': 1.0},
           {'part': 'step', 'weight': 0.4, 'reduce': 'mean'})
  rng = np.random.default_rng(1)
  trajectories = [_trajectory(format=float(rng.integers(2)), accuracy=float(rng.choice([0, .5, 1])),
                              turn_rewards={'step': list(rng.uniform(size=rng.integers(1, 4)))}) for _ in range(40)]
  expected = []
  for t in trajectories:
    # By definition: each reward times the indicators of all those before it.
    passed_format = t.rewards['format'] >= 1
    passed_both = passed_format and t.rewards['accuracy'] >= 0.5
    expected.append(0.1 * t.rewards['format'] + passed_format * t.rewards['accuracy']
                    + passed_both * 0.4 * np.mean(t.turn_rewards['step']))
  np.testing.assert_allclose(_totals('gate', trajectories, order=order), expected)
  assert len(set(np.round(expected, 6))) > 5


def test_one_bad_turn_fails_all_where_the_gate_takes_the_least():
  order = ({'part': 'accuracy', 'weight': 0.0}, {'part': 'ok', 'reduce': 'min'})
  made = lambda right, *ok: _trajectory(accuracy=right, turn_rewards={'ok': list(ok)})
  assert _totals('gate', [made(1., 1., 1.), made(1., 1., 0.), made(0., 1., 1.), made(1.)], order=order) == [1, 0, 0, 0]


def test_calls_are_scored_by_what_was_wrong_with_them():
  malformed = types.Turn(0, 0, 0, 0, '', 'stop', (types.ToolCall('', {}, error='no'),),
                         (types.ToolResult((), ok=False, error='malformed'),))
  turns = [_turn(None), _turn(None, tool='noise'), _turn('raised'), _turn('unknown_tool'), _turn('malformed'), malformed,
           _turn(None, 'timeout', fact='G2'), STOP]
  (parts,) = _shape('tool_use', [_trajectory(*turns)])
  assert parts['call_score'] == [4, 4, 3, 1, 2, 0, 3.5, 0]
  # lookup F1 was made in turns 0, 2, 3, 4 and G2 twice in one turn; 'noise' is another tool.
  assert (parts['tools_used'], parts['tool_turns'], parts['repeated_calls']) == (2, 7, 4)
  assert parts['calls_parse'] == 0
  assert [p['calls_parse'] for p in _shape('tool_use', [_trajectory(_turn(None)), _trajectory(STOP)])] == [1, 0]
  assert tool_use.repeats(_trajectory(*turns[:3])) == [False, False, True]


@pytest.mark.parametrize('right, form, scores, expected', [
    (1, 1, [0, 0], 8), (1, 0, [4, 4], 0), (0, 1, [4, 2, 0, 0], 3), (0, 1, [0, 3, 0], 1.5), (0, 1, [4, -1, 4], 4),
    (0, 1, [-1, 4], 0), (0, 1, [], 0)])
def test_a_wrong_answer_is_worth_its_calls(right, form, scores, expected):
  t = _trajectory(accuracy=float(right), format=float(form), turn_rewards={'call_score': scores})
  assert _totals('tool_score', [t]) == [expected]


def test_efficiency_is_one_at_the_fewest_calls_and_zero_for_wrong_answers():
  made = [_trajectory(accuracy=1.0, calls=m) for m in (2., 3., 6., 0.)] + [_trajectory(calls=2.)]
  memory = {'fewest': {'task-0': 2.0}}  # another step found that 2 suffice
  found = _shape('mult_eff', made[:3] + made[4:], memory=memory, variant='fewest', max_calls=4)
  f = lambda m: 2 * m * 2 / (m + 2)
  expected = [math.sin(f(m) * math.pi / 4) for m in (2, 3, 6, 2)]
  np.testing.assert_allclose([p['call_efficiency'] for p in found], expected)
  np.testing.assert_allclose([p['total'] for p in found], [*expected[:3], 0])
  assert expected[0] == 1.0
  # A right answer without a call moves the fewest to 0, for this task alone.
  found = _shape('mult_eff', made, memory=memory, variant='fewest', max_calls=4)
  np.testing.assert_allclose([p['total'] for p in found],
                             [*(math.cos(m * math.pi / (2 * m + 4)) for m in (2, 3, 6)), 1, 0])
  assert memory == {'fewest': {'task-0': 0.0}}
  (other,) = _shape('mult_eff', [_trajectory(task=1, accuracy=1.0, calls=3.)], memory=memory, variant='fewest', max_calls=4)
  assert other['total'] == 1.0 and memory['fewest']['task-1'] == 3


def test_the_scale_of_the_efficient_reward_has_no_effect_after_a_group_z():
  rewards = {a: np.array(_totals('mult_eff', [_trajectory(accuracy=1.0, calls=float(m)) for m in (1, 2, 4)],
                                 variant='smooth', max_calls=4, alpha=a)) for a in (1.0, 5.0)}
  z = {a: (r - r.mean()) / r.std() for a, r in rewards.items()}
  np.testing.assert_allclose(z[1.0], z[5.0])
  assert np.ptp(rewards[1.0]) > 0


@pytest.mark.parametrize('outcome, sign', [(1.0, 1), (0.0, -1)])
def test_a_judge_cannot_argue_with_the_outcome(outcome, sign):
  scores = list(np.random.default_rng(0).uniform(size=6))
  (parts,) = _shape('renorm', [_trajectory(accuracy=outcome, turn_rewards={'judge': scores})], turn_part='judge')
  np.testing.assert_allclose(parts['renormed'][:-1], [s + outcome - 1 for s in scores[:-1]])
  assert parts['renormed'][-1] == 0 and all(sign * r >= 0 for r in parts['renormed'])
  assert _shape('renorm', [_trajectory(turn_rewards={'judge': []})], turn_part='judge') == [{'renormed': []}]


def test_easy_groups_weigh_half():
  made = [_trajectory(total=r, group=g) for g, r in
          (('hard', 0.), ('hard', 1.), ('easy', 3.), ('easy', 2.), ('middle', 1.), ('middle', 2.))]
  found = _shape('difficulty_w', made)
  # Means .5, 2.5 and 1.5, so 2 - mean is clipped to 1, 0 and .5.
  assert [p['difficulty_weight'] for p in found] == [1, 1, .5, .5, .75, .75]
  assert [p['total'] for p in found] == [0, 1, 1.5, 1, .75, 1.5]
  found = _shape('difficulty_w', made, in_reward=False)
  assert [p['difficulty_weight'] for p in found] == [1, 1, .5, .5, .75, .75]
  # The factor is the group's own: a z-score does not see it, a centred reward does.
  z = lambda r: (np.array(r) - np.mean(r)) / np.std(r)
  np.testing.assert_allclose(z([3., 2.]), z([1.5, 1.]))


def test_the_bonus_for_tools_fades():
  made = [_trajectory(tool_turns=float(n), accuracy=1.0) for n in (0, 3, 20)]
  for step in (0, 7, 19, 20, 30):
    share = (1 + math.cos(math.pi * step / 20)) / 2 if step < 20 else 0
    np.testing.assert_allclose(_totals('bonus_anneal', made, step=step, steps=20),
                               [1, 1 + .3 * share, 1 + 1.0 * share], atol=1e-12)


def test_a_steerable_reward_asks_for_economy_or_exploration():
  again = [_turn(None), _turn(None), _turn(None, fact='G2'), _turn(None, tool='noise')]
  options = dict(search_tools=('lookup',), searches=4, queries=2)
  right, wrong, wasteful = _shape('steerable', [
      _trajectory(*again, accuracy=1.0), _trajectory(*again, format=0.0),
      _trajectory(*[_turn(None)] * 9, accuracy=1.0)], **options)
  # One of four calls repeats another; lookups of F1 and G2 are new, as is one call of another tool.
  assert (right['redundancy'], right['new_searches'], right['new_queries']) == (.25, 2, 1)
  assert right['total'] == pytest.approx(.1 + .75)
  assert wrong['total'] == pytest.approx(.2 * 2 / 4 + .2 * 1 / 2)
  assert wasteful['total'] == pytest.approx(.1 + .5)


@pytest.mark.parametrize('form, score, tools, expected', [
    (0, 1., 2, -1), (1, 1., 2, 1.1), (1, .4, 3, .5), (1, 1., 1, 1.), (1, 0., 2, 0.)])
def test_a_broken_format_costs(form, score, tools, expected):
  t = _trajectory(format=float(form), accuracy=score, tools_used=float(tools))
  assert _totals('format_gate', [t], bonus=.1) == [pytest.approx(expected)]
  assert base.SHAPINGS.get('format_gate')().needs == ('format', 'accuracy')


def _told(tokens, **fields):
  t = _trajectory(**fields)
  t.segments[0].append_sampled(tokens, [0.] * len(tokens), [0.] * len(tokens), 0)
  return t


def test_flags_say_what_is_wrong():
  looping, plain = [1, 2, 3] * 4, list(range(12))
  found = _shape('flags', [_told(looping), _told(plain)], n=3, times=4)
  assert [p['repetitive'] for p in found] == [1, 0]
  assert _shape('flags', [_told(looping)], n=3, times=5)[0]['repetitive'] == 0
  silent, call = types.Turn(0, 0, 0, 0, 'hm', 'stop'), _turn(None)
  assert [flags.has_void_turn(t) for t in (
      _trajectory(call, silent), _trajectory(silent, call), _trajectory(call, silent, answer=' '),
      _trajectory(call, status=types.Status.TURN_LIMIT, answer=None))] == [False, True, True, False]
  assert _shape('flags', [_trajectory(_turn(None, text='a\ufffd'))])[0]['unreadable'] == 1
  noisy = [_trajectory(_turn('transient')), _trajectory(_turn('raised')), _trajectory(*[_turn('malformed')] * 3),
           _trajectory(*[_turn('malformed')] * 2), _trajectory(status=types.Status.ENVIRONMENT_FAILURE)]
  assert [p['noisy'] for p in _shape('flags', noisy)] == [1, 0, 1, 0, 1]


def test_short_right_and_long_wrong_trajectories_have_priority():
  right = [_trajectory(accuracy=1.0, tokens=float(n), group='a') for n in (5, 1, 3)]
  wrong = [_trajectory(tokens=float(n), group='b') for n in (2, 9, 4)]
  found = _shape('priority', right + wrong, share=.5)
  # Two of three each: the shortest of the right, the longest of the wrong.
  assert [p['priority'] for p in found] == [0, 1, 1, 0, 1, 1]
  assert [p['group_z'] for p in found] == [0] * 6
  mixed = [_trajectory(accuracy=a, total=a) for a in (1., 1., 0., 0.)]
  np.testing.assert_allclose([p['group_z'] for p in _shape('priority', mixed)], [1, 1, -1, -1], rtol=1e-5)


@pytest.mark.parametrize('name, options', [
    ('overlong', dict(max_tokens=4, buffer=5)), ('gate', dict(order=())), ('gate', dict(order=({'weight': 1.},))),
    ('gate', dict(order=({'part': 'accuracy', 'reduce': 'max'},))), ('mult_eff', dict(variant='best', max_calls=4)),
    ('mult_eff', dict(variant='smooth', max_calls=0)), ('bonus_anneal', dict(steps=0)), ('flags', dict(n=0)),
    ('priority', dict(share=0.))])
def test_options_out_of_range_are_refused(name, options):
  with pytest.raises(ValueError, match='|'.join(options) + '|gate'):
    base.SHAPINGS.get(name)(**options)


@pytest.mark.parametrize('listed, missing', [
    ([{'name': 'bonus_anneal', 'steps': 9}], 'tool_turns'), ([{'name': 'tool_score'}], 'call_score'),
    ([{'name': 'format_gate', 'bonus': .1}], 'tools_used'), ([{'name': 'renorm', 'turn_part': 'true_need'}], 'true_need')])
def test_a_shaping_before_the_one_that_feeds_it_is_refused(listed, missing):
  with pytest.raises(ValueError, match=f'reads the part {missing!r}, which nothing before it gives'):
    base.make('chains', shapings=listed)
