"""Tests of packing; by its definition every token of every sequence stands once, in order."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from agentrl.core.types import Message, Segment, Task, Trajectory, Turn
from agentrl.training import packing

LENGTHS = st.lists(st.integers(1, 16), max_size=30)


def _sequences(lengths, seed=0):
  """Sequences whose tokens are all different, so that each token tells where it came from."""
  rng, made, start = np.random.default_rng(seed), [], 1
  for i, n in enumerate(lengths):
    mask = rng.random(n) < 0.5
    mask[0] = False
    log_probs = np.where(mask, -rng.exponential(size=n), np.nan).astype(np.float32)
    made.append(packing.TokenSequence(np.arange(start, start + n, dtype=np.int32), mask, log_probs,
                                      np.sort(rng.integers(0, 3, n)).astype(np.int32), i))
    start += n
  return made


def _outcome(n, weights=None):
  weights = np.ones(n, np.float32) if weights is None else np.asarray(weights, np.float32)
  return packing.Outcome(np.arange(n, dtype=np.int32), np.ones(n, np.float32), weights, weights > 0)


@hypothesis.given(LENGTHS)
def test_plan_holds_every_sequence_once_and_no_row_overflows(lengths):
  rows = packing.plan_rows(_sequences(lengths), 16).rows
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  assert all(0 < sum(lengths[i] for i in row) <= 16 for row in rows)
  # Best fit leaves at most one row half empty or emptier: two such rows would have been one.
  assert sum(sum(lengths[i] for i in row) <= 8 for row in rows) <= 1


def test_plan_refuses_a_sequence_longer_than_a_row():
  with pytest.raises(ValueError, match='sequence 1 has 17 tokens and rows only 16'):
    packing.plan_rows(_sequences([3, 17]), 16)


@hypothesis.given(LENGTHS, st.integers(0, 9), st.sampled_from([1, 2, 4]))
def test_rows_hold_the_sequences_as_they_are(lengths, seed, micro_batches):
  sequences = _sequences(lengths, seed)
  needed = len(packing.plan_rows(sequences, 16).rows)
  rows = (needed // micro_batches + 2) * micro_batches
  batch, used = packing.pack(sequences, _outcome(len(lengths)), rows=rows, row_length=16,
                             micro_batches=micro_batches)
  seen = []
  for r in range(rows):
    for segment in range(1, int(batch.segment_ids[r].max(initial=0)) + 1):
      (at,) = np.nonzero(batch.segment_ids[r] == segment)
      (index,) = set(batch.trajectory_ids[r, at])
      s = sequences[index]
      seen.append(index)
      np.testing.assert_array_equal(at, np.arange(at[0], at[0] + len(s.tokens)))
      np.testing.assert_array_equal(batch.tokens[r, at], s.tokens)
      np.testing.assert_array_equal(batch.positions[r, at], np.arange(len(s.tokens)))
      np.testing.assert_array_equal(batch.turn_ids[r, at], s.turns)
      np.testing.assert_array_equal(batch.loss_mask[r, at], s.loss_mask)
      np.testing.assert_array_equal(batch.behaviour_log_probs[r, at],
                                    np.where(s.loss_mask, s.log_probs, 0))
  assert sorted(seen) == list(range(len(lengths)))
  padded = batch.segment_ids == 0
  assert not batch.loss_mask[padded].any() and (batch.trajectory_ids[padded] == -1).all()
  assert (batch.turn_ids[padded] == -1).all() and np.isfinite(batch.behaviour_log_probs).all()
  # Micro-batch m is rows m, m + M, ...: what lies past the used ones is padding, and none of the
  # used is all padding.
  filled = [(batch.segment_ids[m::micro_batches] > 0).any() for m in range(micro_batches)]
  assert filled == [m < used and bool(lengths) for m in range(micro_batches)]


@st.composite
def _trees(draw):
  """Sequences that begin as others do, up to anywhere: within what those draw, with nothing, or with all of it."""
  rng, made = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), []
  for i in range(draw(st.integers(0, 20))):
    old = made[rng.integers(len(made))] if made and rng.random() < 0.7 else None
    shared = rng.integers(0, len(old.tokens) + 1) if old else 0
    tokens = np.concatenate([old.tokens[:shared] if old else [], rng.integers(0, 3, max(1, rng.integers(0, 20 - shared)))])
    mask = np.arange(len(tokens)) >= rng.integers(1, len(tokens) + 1)
    mask &= rng.random(len(mask)) < 0.8
    turns = np.sort(rng.integers(0, 3, len(tokens))).astype(np.int32)
    made.append(packing.TokenSequence(tokens.astype(np.int32), mask, np.zeros(len(mask), np.float32), turns, i,
                                      {'node': turns.copy(), 'node_parent': turns - 1} if draw(st.booleans()) else {}))
  return made


@hypothesis.given(_trees(), st.integers(20, 64))
def test_what_a_row_leaves_out_stands_in_the_sequence_that_it_goes_on_from(sequences, row_length):
  n = len(sequences)
  batch, _ = packing.pack(sequences, _outcome(n), rows=n + 1, row_length=row_length, share=True)
  assert packing.count_tokens(batch) == sum(len(s.tokens) for s in sequences)
  seen = []
  for row in range(n + 1):
    whole, edges = None, np.flatnonzero(np.diff(batch.segment_ids[row], prepend=0, append=0))
    for at, end in zip(edges, edges[1:]):
      got = slice(at, end)
      (i,), start = set(batch.trajectory_ids[row, got]), batch.positions[row, at]
      whole = whole if start else i
      s = sequences[i]
      seen.append(i)
      np.testing.assert_array_equal(batch.positions[row, got], np.arange(start, len(s.tokens)))
      np.testing.assert_array_equal(np.concatenate([sequences[whole].tokens[:start], batch.tokens[row, got]]), s.tokens)
      np.testing.assert_array_equal(batch.loss_mask[row, got], s.loss_mask[start:])
      np.testing.assert_array_equal(batch.turn_ids[row, got], s.turns[start:])
      # Nothing in the loss is left out, nor the token before it; where there are nodes, no turn is.
      assert not start or not s.loss_mask[:start + 1].any()
      assert not s.parts or set(s.turns[start:]) == set(s.turns)
  assert sorted(seen) == list(range(n))


def test_samples_of_a_question_have_it_once_a_row():
  rng, sequences = np.random.default_rng(0), []
  for i in range(6):
    tokens = np.concatenate([np.full(8, i % 2), rng.integers(10, 99, 4 + i // 2)]).astype(np.int32)
    sequences.append(packing.TokenSequence(tokens, np.arange(len(tokens)) >= 8, np.full(len(tokens), -1.0, np.float32),
                                           np.zeros(len(tokens), np.int32), i))
  plan = packing.plan_rows(sequences, 30, share=True)
  # 8 + 4, then 1 + 6 and 1 + 5; the longest of a question that do not go on from another.
  assert sorted(map(sorted, plan.rows)) == [[0, 2, 4], [1, 3, 5]]
  assert sorted(plan.starts) == [0, 0, 7, 7, 7, 7]
  # A row with room for two of them: the third one is in a row with its question.
  assert sorted(packing.plan_rows(sequences, 22, share=True).starts) == [0, 0, 0, 0, 7, 7]
  assert packing.plan_rows(sequences, 30).starts == [0] * 6


@pytest.mark.parametrize('plan', [
    packing.Plan([[0, 1]], [0, 1]), packing.Plan([[0, 2]], [0, 0, 2]), packing.Plan([[0, 2]], [0, 0, 3]),
    packing.Plan([[1, 0]], [0, 1])], ids=['other tokens', 'the token before', 'in the loss', 'nothing before it'])
def test_a_plan_that_leaves_out_what_is_needed_is_refused(plan):
  mask = np.array([False, False, True, True])
  sequences = [packing.TokenSequence(np.array(tokens, np.int32), mask, np.full(4, -1.0, np.float32), np.zeros(4, np.int32), i)
               for i, tokens in enumerate([[1, 2, 3, 4], [2, 2, 3, 4], [1, 2, 3, 4]])]
  with pytest.raises(ValueError, match='the plan leaves out . tokens of a sequence of trajectory'):
    packing.pack(sequences, _outcome(3), rows=1, row_length=8, plan=plan)


def test_weight_zero_takes_a_trajectory_out_of_the_loss():
  sequences = [s._replace(loss_mask=np.array([False, True, True])) for s in _sequences([3, 3])]
  sequences = [s._replace(log_probs=np.full(3, -1.0, np.float32)) for s in sequences]
  batch, _ = packing.pack(sequences, _outcome(2, [1, 0]), rows=1, row_length=8)
  np.testing.assert_array_equal(batch.loss_mask[0], [False, True, True] + [False] * 5)
  np.testing.assert_array_equal(batch.behaviour_log_probs[0], [0, -1, -1] + [0] * 5)


@pytest.mark.parametrize('rows, micro_batches, words', [
    (1, 1, '3 sequences need 2 rows of 8 tokens, more than 1'),
    (3, 2, '2 micro-batches do not divide 3 rows'),
])
def test_what_does_not_fit_is_refused(rows, micro_batches, words):
  with pytest.raises(ValueError, match=words):
    packing.pack(_sequences([5, 3, 8]), _outcome(3), rows=rows, row_length=8,
                 micro_batches=micro_batches)


def test_sequences_are_the_recorded_segments():
  first, empty, second = Segment(), Segment(), Segment()
  first.append_forced([5, 6], 0)
  first.append_sampled([7], [-0.5], [0.1], 0)
  second.append_forced([8], 1)
  second.append_sampled([9], [-0.25], [0.2], 1)
  task = Task('t', 'tools', (Message('user', '?'),), None)
  trajectories = [
      Trajectory(task, 0, 't', 0, segments=[first, empty, second]),
      Trajectory(task, 1, 't', 0, segments=[second])
  ]
  got = packing.sequences_of(trajectories)
  assert [(s.trajectory, s.tokens.tolist(), s.loss_mask.tolist()) for s in got] == [
      (0, [5, 6, 7], [False, False, True]), (0, [8, 9], [False, True]), (1, [8, 9], [False, True])]
  assert got[1].log_probs[1] == -0.25 and np.isnan(got[1].log_probs[0])


def test_sets_that_tokens_were_drawn_from_are_kept_once_and_found_by_index():
  few, many = (5).to_bytes(8, 'little'), b'\xff' * 7 + b'\x7f'
  segment = Segment()
  segment.append_forced([5, 6], 0)
  segment.append_sampled([7, 8, 9, 10], [-0.5] * 4, [0.1] * 4, 0, masks=[few, None, bytes(few), many])
  trajectory = Trajectory(Task('t', 'tools', (), None), 0, 't', 0, segments=[segment])
  outcome = packing.Outcome(np.zeros(1, np.int32), np.ones(1, np.float32), np.ones(1, np.float32), np.ones(1, bool))
  make = lambda size: packing.pack(packing.sequences_of([trajectory]), outcome, rows=1, row_length=8,
                                   masks=packing.MaskRows(70, size))[0]
  batch = make(4)
  # 70 tokens are three words; the tokenizer knew 64, and what it did not know is in no set.
  assert batch.masks.shape == (4, 3) and batch.mask_ids.tolist() == [[0, 0, 1, 0, 1, 2, 0, 0]]
  assert batch.masks.tolist()[:3] == [[0xFFFFFFFF] * 3, [5, 0, 0], [0xFFFFFFFF, 0x7FFFFFFF, 0]]
  assert make(2).masks.shape == (4, 3)  # too small: doubled
  plain = packing.pack(packing.sequences_of([trajectory]), outcome, rows=1, row_length=8)[0]
  assert plain.masks is plain.mask_ids is None


def _turns(trajectory, lengths, start=0, first=0):
  """Appends turns: one forced token and `length` sampled ones each."""
  segment = trajectory.segments[-1]
  for k, length in enumerate(lengths, first):
    segment.append_forced([90 + k], k)
    at = len(segment)
    segment.append_sampled(list(range(start, start + length)), [-1.0] * length, [0.5 + k] * length, k)
    trajectory.turns.append(Turn(k, len(trajectory.segments) - 1, at, len(segment), '', 'stop'))


def _fork(parent, index):
  """What Session.fork gives."""
  return Trajectory(parent.task, parent.sample, parent.group_id, 0, path=(*parent.path, index),
                    parent_path=parent.path, fork_point=len(parent.segments[-1]),
                    fork_points=(*parent.fork_points, (len(parent.segments), len(parent.segments[-1]))),
                    segments=[s.copy() for s in parent.segments], turns=list(parent.turns))


TASK = Task('t', 'tools', (Message('user', '?'),), None)


def test_parts_of_turns_stand_on_the_last_sampled_token():
  t = Trajectory(TASK, 0, 't', 0)
  _turns(t, [2, 0, 3])
  t.turn_rewards['progress'] = [0.25, 7.0, 0.75]
  (got,) = packing.sequences_of([t], ['progress', 'entropy'])
  # A turn without a token has nowhere to put its reward.
  assert got.parts['progress'].tolist() == [0, 0, .25, 0, 0, 0, 0, .75]
  assert got.parts['entropy'].tolist() == [0, .5, .5, 0, 0, 2.5, 2.5, 2.5]
  batch, _ = packing.pack([got], _outcome(1)._replace(parts={'best': np.float32([2])}), rows=1, row_length=10,
                          token_part_names=['progress'], step=3)
  assert batch.token_parts['progress'][0].tolist() == [0, 0, .25, 0, 0, 0, 0, .75, 0, 0]
  assert batch.parts['best'].tolist() == [2] and batch.step == 3


def test_forks_share_the_numbers_of_the_steps_they_share():
  root = Trajectory(TASK, 0, 't', 0)
  _turns(root, [2])
  twin = _fork(root, 0)
  _turns(root, [1, 1], first=1)
  _turns(twin, [1], first=1)
  child = _fork(twin, 0)
  _turns(twin, [1], first=2)
  _turns(child, [1], first=2)
  other = Trajectory(TASK, 1, 't', 0)
  _turns(other, [1])
  got = packing.sequences_of([root, twin, child, other], ['node', 'node_parent'])
  node = [[int(s.parts['node'][np.nonzero(s.turns == k)[0][0]]) for k in np.unique(s.turns)] for s in got]
  before = [[int(s.parts['node_parent'][np.nonzero(s.turns == k)[0][0]]) for k in np.unique(s.turns)] for s in got]
  assert node[0][0] == node[1][0] == node[2][0]  # the first turn is one step
  assert node[1][1] == node[2][1]  # as is the twin's second, which its child shares
  assert len({*node[0], *node[1], *node[2], *node[3]}) == 3 + 2 + 1 + 1
  for steps, parents in zip(node, before):
    assert parents == [-1, *steps[:-1]]


def test_what_a_fork_does_not_train_is_left_out_of_the_loss():
  t = Trajectory(TASK, 0, 't', 0)
  _turns(t, [2, 2])
  t.loss_from = t.turns[1].start
  (got,) = packing.sequences_of([t])
  assert got.loss_mask.tolist() == [False] * 4 + [True] * 2
