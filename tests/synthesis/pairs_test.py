"""Tests of who finds pairs; by hand on small groups, and by each rule's definition."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.core.types import Iteration, Message, Task, Trajectory, Turn
from agentrl.synthesis import pairs
from agentrl.synthesis.ranked_pairs import RankedPairs
from agentrl.synthesis.step_pairs import StepPairs
from agentrl.synthesis.tool_light import ToolLight

TASK = Task('t', 'tools', (Message('user', '?'),), None)
FIRST = Iteration(0, 2)
SECOND = Iteration(1, 2)


def _rng():
  return np.random.default_rng(0)


def _trajectory(turns, group='g', path=(), entropy=0.5, **rewards):
  """Turns are lists of sampled tokens; an observation of one token, 90 + k, stands before turn k."""
  t = Trajectory(TASK, 0, group, 0, path=path)
  for k, tokens in enumerate(turns):
    t.segments[0].append_forced([90 + k], k)
    at = len(t.segments[0])
    t.segments[0].append_sampled(tokens, [-1.0] * len(tokens), [entropy] * len(tokens), k)
    t.turns.append(Turn(k, 0, at, at + len(tokens), '', 'stop'))
  t.rewards = {'success': 0.0, 'calls': float(len(turns) - 1), **rewards}
  return t


def _turn(excerpt):
  return excerpt.trajectory.segments[0].tokens[excerpt.start:excerpt.stop].tolist()


def test_ranked_pairs_match_the_ends_of_the_ranking():
  group = [_trajectory([[k]], score=s) for k, s in enumerate([0.2, 1.0, 0.0, 0.6, 0.6])]
  found = RankedPairs({'score': 2.0, 'calls': 1.0}, min_gap=0.5)(group, _rng(), FIRST)
  # 1.0 against 0.0; then 0.6 against 0.2: 2 * 0.4 is far enough apart. The middle one is left over.
  assert [(p.chosen.trajectory.rewards['score'], p.rejected.trajectory.rewards['score']) for p in found] == [
      (1.0, 0.0), (0.6, 0.2)]
  assert len(RankedPairs({'score': 1.0}, per_group=1)(group, _rng(), FIRST)) == 1
  assert not RankedPairs()(group, _rng(), FIRST)  # all equal


def test_ranked_pairs_stay_within_a_group_and_pass_over_edited_contexts():
  good, bad = _trajectory([[1]], success=1.0), _trajectory([[2]])
  edited = _trajectory([[3]])
  edited.segments.append(edited.segments[0].copy())
  others = [_trajectory([[4]], group='h'), _trajectory([], group='g')]
  (pair,) = RankedPairs()([others[0], good, edited, bad, others[1]], _rng(), FIRST)
  assert (pair.chosen.trajectory, pair.rejected.trajectory) == (good, bad)


def test_steps_on_a_success_path_beat_their_failed_siblings():
  # The tree: 1 -> 2 (right), 1 -> 3 (wrong), 4 -> 2 (wrong).
  group = [_trajectory([[1], [2]], success=1.0), _trajectory([[1], [3]]), _trajectory([[4], [2]])]
  found = StepPairs()(group, _rng(), FIRST)
  assert sorted((_turn(p.chosen), _turn(p.rejected)) for p in found) == [([1], [4]), ([2], [3])]
  for pair in found:
    # Both follow the same context, and nothing after the turn is kept.
    contexts = [e.trajectory.segments[0].tokens[:e.start].tolist() for e in (pair.chosen, pair.rejected)]
    assert contexts[0] == contexts[1]
  # A sibling through which something succeeded has not failed.
  group.append(_trajectory([[4], [5]], success=1.0))
  assert sorted(_turn(p.chosen) for p in StepPairs()(group, _rng(), FIRST)) == [[2], [5]]
  assert len(StepPairs(per_group=1)(group, _rng(), FIRST)) == 1


def test_steps_by_value_compare_means_of_enough_visits():
  # After [1]: 2 of 3 succeed; after [4]: 0 of 2; [6] was seen once.
  group = [_trajectory([[1], [k]], success=s) for k, s in ((2, 1.0), (3, 1.0), (5, 0.0))]
  group += [_trajectory([[4], [k]]) for k in (2, 3)] + [_trajectory([[6]])]
  made = StepPairs(rule='value', min_visits=2)
  assert [(_turn(p.chosen), _turn(p.rejected)) for p in made(group, _rng(), FIRST)] == [([1], [4])]
  assert not StepPairs(rule='value', min_visits=2, min_gap=0.7)(group, _rng(), FIRST)


def test_tool_light_first_prefers_few_calls_then_long_answers_to_hard_questions():
  branched = [_trajectory([[1], [2]], success=1.0, entropy=0.9), _trajectory([[1], [3]], success=1.0, entropy=0.1),
              _trajectory([[1], [2], [3]], success=1.0), _trajectory([[7]], path=(0,)),
              _trajectory([[1], [2], [3], [4]]), _trajectory([[1], [4], [3]])]
  (pair,) = ToolLight(hard_below=1.0)(branched, _rng(), FIRST)
  assert pair.chosen.trajectory is branched[1] and pair.rejected.trajectory is branched[4]
  # Without branches: the shortest right one against the longest wrong one.
  plain = [_trajectory([[1, 2, 3]], success=1.0), _trajectory([[1, 2]], success=1.0), _trajectory([[1]]),
           _trajectory([[1, 2, 4, 5]]), _trajectory([[4, 5, 6]])]
  (pair,) = ToolLight(hard_below=1.0)(plain, _rng(), FIRST)
  assert pair.chosen.trajectory is plain[1] and pair.rejected.trajectory is plain[3]
  # Later the longest right one against the shortest wrong one, where fewer than half are right.
  (pair,) = ToolLight()(plain, _rng(), SECOND)
  assert pair.chosen.trajectory is plain[0] and pair.rejected.trajectory is plain[2]
  easy = [_trajectory([[1]], success=1.0), _trajectory([[2]], success=1.0), _trajectory([[3, 4]])]
  assert not ToolLight()(easy, _rng(), SECOND)


def test_tool_light_keeps_hard_and_easy_questions_two_to_one():
  hard = [t for g in range(4) for t in (_trajectory([[1]], f'hard{g}', success=1.0), _trajectory([[1, 2]], f'hard{g}'),
                                        _trajectory([[1, 3]], f'hard{g}'))]
  easy = [t for g in range(5) for t in (_trajectory([[1]], f'easy{g}', success=1.0), _trajectory([[1, 2]], f'easy{g}'))]
  found = ToolLight()(hard + easy, _rng(), FIRST)
  names = [p.chosen.trajectory.group_id[:4] for p in found]
  assert names == ['hard'] * 4 + ['easy'] * 2
  assert len(ToolLight(hard_to_easy=0)(hard + easy, _rng(), FIRST)) == 9


@pytest.mark.parametrize('name, options, words', [
    ('ranked_pairs', {'per_group': 0}, 'at least 1'), ('ranked_pairs', {'weights': {'calls': float('nan')}}, 'finite'),
    ('step_pairs', {'rule': 'best'}, 'none of path, value'), ('step_pairs', {'min_visits': 0}, 'at least 1'),
    ('tool_light', {'hard_below': 2.0}, r'must lie in \[0, 1\]'),
])
def test_bad_options_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    pairs.MINERS.get(name)(**options)
