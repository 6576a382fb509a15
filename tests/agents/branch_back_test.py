"""Tests of branching after the fact, on the real chain world with a policy that babbles.

Expected values are the definition's: a branch holds its sample's tokens up to a turn of it, and which turn follows from the
recorded entropies.
"""

from __future__ import annotations

import numpy as np
import pytest


def _first_entropies(t, tokens):
  return [float(np.mean(t.segments[0].entropies[turn.start:turn.end][:tokens])) for turn in t.turns]


@pytest.mark.parametrize('choose', ['entropy', 'random'])
def test_branches_leave_their_sample_where_it_was_least_certain(stage, choose):
  agent = stage.agent('branch_back', samples=1, steps=2, branches=2, choose=choose, tokens=2)
  got = stage.run(agent, [stage.task(0), stage.task(1), stage.task(2)], 7)
  groups = {g: [t for t in got if t.group_id == g] for g in {t.group_id for t in got}}
  places = set()
  for group in groups.values():
    root, plain = next(t for t in group if t.sample == 0 and not t.path), [t for t in group if t.sample > 0]
    branches = [t for t in group if t.path]
    assert len(plain) == 2 and len(branches) == 2 * min(2, len(root.turns)) and len(group) <= 7
    starts = {turn.start: k for k, turn in enumerate(root.turns)}
    left = sorted(starts[t.loss_from] for t in branches)
    places.update(left)
    for t in branches:
      np.testing.assert_array_equal(t.segments[0].tokens[:t.loss_from], root.segments[0].tokens[:t.loss_from])
    if choose == 'entropy':
      entropies = _first_entropies(root, 2)
      assert sorted(set(left)) == sorted(np.argsort(-np.array(entropies), kind='stable')[:2].tolist())
  assert max(places) > 0  # not only from the prompt


def test_branches_differ_from_what_was_drawn_there(stage):
  agent = stage.agent('branch_back', steps=1, branches=3, choose='random')
  got = stage.run(agent, [stage.task(k) for k in range(6)], 4)
  again = stage.run(agent, [stage.task(k) for k in range(6)], 4)
  assert [t.segments[0].tokens.tolist() for t in got] == [t.segments[0].tokens.tolist() for t in again]
  assert len({t.segments[0].tokens.tobytes() for t in got}) > 12  # of 24; short ones may coincide
  assert not any(t.boundary and t.boundary.value == 'agent' for t in got)


@pytest.mark.parametrize('options, words', [({'choose': 'best'}, 'none of entropy, random'), ({'steps': 0}, 'at least 1')])
def test_bad_options_are_refused(stage, options, words):
  with pytest.raises(ValueError, match=words):
    stage.agent('branch_back', **options)


def test_a_group_too_small_for_the_branches_is_refused(stage):
  with pytest.raises(ValueError, match='3 x 3 branches each are 10 trajectories'):
    stage.agent('branch_back').max_trajectories(8)
