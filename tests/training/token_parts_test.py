"""What the objective may read of each token, from a record written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.algorithms import objective
from agentrl.algorithms.examples import example_batch
from agentrl.core.types import Message, Segment, Task, ToolCall, Trajectory, Turn
from agentrl.training import packing

TASK = Task('0', 'tools', (Message('user', '?'),), None)


def _trajectory(observations, calls):
  """A prompt of two tokens, then turns of two tokens with observations between them."""
  segment, turns = Segment(), []
  for k, (shown, called) in enumerate(zip([[1, 2], *observations], calls)):
    segment.append_forced(shown, k)
    start = len(segment)
    segment.append_sampled([8, 9], [-.1 - k, -.2 - k], [.5, .6], k)
    turns.append(Turn(k, 0, start, start + 2, '', 'stop', (ToolCall('look', {}),) if called else ()))
  return Trajectory(TASK, 0, '0', 0, segments=[segment], turns=turns)


def _part(trajectories, name):
  return [s.parts[name].tolist() for s in packing.sequences_of(trajectories, [name])]


def test_turns_that_call_are_marked_whole():
  assert _part([_trajectory([[5]], [True, False])], 'call') == [[1, 1, 1, 1, 0, 0, 0]]


def test_the_samplers_log_probs_are_kept_where_they_are_known():
  trajectory = _trajectory([], [False])
  np.testing.assert_allclose(_part([trajectory], 'sampler_log_prob'), [[0, 0, -.1, -.2]], rtol=1e-6)
  trajectory.segments[0].append_revised([7], 0)
  assert np.isnan(_part([trajectory], 'sampler_log_prob')[0][-1])


def test_the_lag_counts_steps_since_the_token_was_drawn():
  trajectory = _trajectory([], [False])
  trajectory.segments[0].append_sampled([7, 7], [-1., -1.], [1., 1.], 0, version=[2, 4])
  # Two forced tokens, two drawn by version 0, one by 2, one by 4; a draw of the present step is no older than that.
  for step, lags in ((4, [0, 0, 4, 4, 2, 0]), (3, [0, 0, 3, 3, 1, 0])):
    [sequence] = packing.sequences_of([trajectory], ['lag'], step)
    assert sequence.parts['lag'].tolist() == lags and sequence.parts['lag'].dtype == np.float32


def _states(name, *observations):
  """Returns the checksum that each turn of each trajectory begins with; checks that a turn has one."""
  out = []
  for given, values in zip(observations, _part([_trajectory(o, [False] * (len(o) + 1)) for o in observations], name)):
    turns, at = [], 0
    for shown in [[1, 2], *given]:
      own = values[at:at + len(shown) + 2]
      assert len(set(own)) == 1 and own[0] >= 0
      turns.append(own[0])
      at += len(own)
    out.append(turns)
  return out


def test_a_state_is_the_last_observation():
  (a0, a1, a2), (b0, b1, b2) = _states('state', [[5], [6]], [[7], [6]])
  assert a0 == b0 and a1 != b1 and a2 == b2
  # An observation seen again is the same state.
  (_, x, y), = _states('state', [[5], [5]])
  assert x == y


def test_a_history_is_all_of_them():
  (a0, a1, a2), (b0, b1, b2), (c0, c1, c2) = _states('history', [[5], [6]], [[7], [6]], [[5], [6]])
  assert a0 == b0 == c0 and a1 != b1 and a2 != b2 and (a1, a2) == (c1, c2)
  # Two observations of one token are not one of two.
  assert _states('history', [[5], [6]])[0][-1] != _states('history', [[5, 6]])[0][-1]


@pytest.mark.parametrize('name', sorted(packing.TOKEN_PARTS))
def test_examples_have_every_part_with_its_type(name):
  batch, _ = example_batch(reads=[name])
  plane = batch.token_parts[name]
  assert plane.dtype == packing.TOKEN_PARTS[name].dtype and name not in batch.parts
  np.testing.assert_array_equal(plane[batch.segment_ids == 0], packing.TOKEN_PARTS[name])
  assert len(np.unique(plane[batch.segment_ids > 0])) > 1


def test_the_objective_knows_the_samplers_part_by_its_name():
  assert objective.SAMPLER_LOG_PROB in packing.TOKEN_PARTS
