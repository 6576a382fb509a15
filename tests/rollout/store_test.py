"""Trajectories come back from disk exactly as they were."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import subprocess
import sys

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from agentrl.core import types
from agentrl.rollout import store

_PNG = b'\x89PNG\x00\xff'


def _trajectory(sample: int = 0) -> types.Trajectory:
  task = types.Task('gsm/7', 'math', (types.Message('user', 'What is 2 + 2? 🐍'), types.Message('tool', '4', 'add')), {
      'answer': 4,
      'tolerance': 1e-6
  }, {
      'family': 'sums',
      'pair': (1, 2),
      3: 'key that is no string'
  })
  first, second = types.Segment(), types.Segment()
  first.append_forced([1, 5, 9], turn=0)
  first.append_sampled([3, 4], [-0.1, -2.5], [0.3, 1.1], turn=0)
  first.append_forced([8], turn=1)
  first.append_sampled([2, 6], [-1e-7, -3.0], [0.0, 1.0], turn=1, version=[3, 4])
  first.append_revised([7, 9], turn=1, version=4)
  second.append_forced([1], turn=2)
  call = types.ToolCall('python', {'code': 'print(2+2)', 'nested': [1, {'x': None}]})
  bad = types.ToolCall('', {}, error='not JSON: expected a comma')
  result = types.ToolResult((types.Part('text', '4\n</script>'), types.Part('image', _PNG)),
                            seconds=0.25,
                            cost=1.5)
  failed = types.ToolResult((types.Part('text', 'timed out'),),
                            ok=False,
                            error='timeout',
                            truncated=True)
  return types.Trajectory(task,
                          sample,
                          'g7',
                          seed=11,
                          policy_version=3,
                          path=(0, 2),
                          parent_path=(0,),
                          fork_point=5,
                          fork_points=((1, 3), (1, 5)),
                          segments=[first, second],
                          turns=[
                              types.Turn(0, 0, 3, 5, '<call>', 'stop', (call, bad),
                                         (result, failed)),
                              types.Turn(1, 0, 6, 7, '4', 'length')
                          ],
                          status=types.Status.TOOL_FAILURE,
                          boundary=types.Boundary.TOOL,
                          detail='the sandbox died',
                          answer='4',
                          rewards={
                              'total': 0.5,
                              'format': math.nan,
                              'bonus': -math.inf
                          },
                          seconds=1.75)


def _assert_same(a: types.Trajectory, b: types.Trajectory):
  for field in dataclasses.fields(types.Trajectory):
    left, right = getattr(a, field.name), getattr(b, field.name)
    if field.name == 'segments':
      assert len(left) == len(right)
      for x, y in zip(left, right):
        for column in ('tokens', 'sampled', 'log_probs', 'entropies', 'turns', 'versions'):
          np.testing.assert_array_equal(getattr(x, column), getattr(y, column), strict=True)
    elif field.name == 'rewards':
      np.testing.assert_equal(left, right)  # NaN equals NaN here.
    else:
      assert left == right and type(left) is type(right), field.name


def test_everything_comes_back_exactly(tmp_path):
  written = [_trajectory(0), _trajectory(1)]
  extra = {
      'advantages': [[np.array([0, math.nan], np.float32)], -1.5],
      'baseline': np.float32(0.25),
      'shape': (2, 3)
  }
  path = store.TrajectoryStore(tmp_path, piece=lambda i: f'<{i}>').write(42, written, extra)
  stored = store.read(path)
  assert stored.step == 42
  for a, b in zip(stored.trajectories, written, strict=True):
    _assert_same(a, b)
  np.testing.assert_array_equal(stored.extra['advantages'][0][0],
                                extra['advantages'][0][0],
                                strict=True)
  assert stored.extra['advantages'][1] == -1.5 and stored.extra['shape'] == (2, 3)
  assert stored.extra['baseline'] == np.float32(0.25) and type(
      stored.extra['baseline']) is np.float32
  assert stored.pieces == {i: f'<{i}>' for i in (1, 2, 3, 4, 5, 6, 7, 8, 9)}  # The ids that occur above.
  assert stored.trajectories[0].task is stored.trajectories[1].task  # Stored once for the group.


_FLOATS = st.floats(-50, 0, width=32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(['forced', 'sampled', 'revised']), st.integers(0, 2), st.integers(0, 9),
                       st.lists(st.tuples(st.integers(0, 2**31 - 1), _FLOATS, _FLOATS),
                                max_size=5)),
             max_size=6))
def test_any_log_of_appends_comes_back(tmp_path_factory, appends):
  segment = types.Segment()
  for kind, turn, version, rows in appends:
    tokens, log_probs, entropies = zip(*rows) if rows else ((), (), ())
    if kind == 'sampled':
      segment.append_sampled(tokens, log_probs, entropies, turn, version)
    elif kind == 'revised':
      segment.append_revised(tokens, turn, version)
    else:
      segment.append_forced(tokens, turn)
  trajectory = dataclasses.replace(_trajectory(), segments=[segment])
  path = store.TrajectoryStore(tmp_path_factory.mktemp('store')).write(0, [trajectory])
  _assert_same(store.read(path).trajectories[0], trajectory)


def test_messages_of_older_files_have_no_name(tmp_path):
  path = store.TrajectoryStore(tmp_path).write(0, [_trajectory()])
  document = json.loads(gzip.decompress(path.read_bytes()))
  for message in document['tasks'][0]['messages']['items']:
    del message['name']
  path.write_bytes(gzip.compress(json.dumps(document).encode()))
  messages = _trajectory().task.messages
  assert store.read(path).trajectories[0].task.messages == tuple(dataclasses.replace(m, name=None) for m in messages)


def test_tokens_of_older_files_have_their_trajectorys_version(tmp_path):
  path = store.TrajectoryStore(tmp_path).write(0, [_trajectory()])
  document = json.loads(gzip.decompress(path.read_bytes()))
  for segment in document['trajectories'][0]['segments']:
    del segment['versions']
  path.write_bytes(gzip.compress(json.dumps(document).encode()))
  first = store.read(path).trajectories[0].segments[0]
  np.testing.assert_array_equal(first.versions, np.where(first.sampled, 3, -1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(
            st.text(max_size=8) | st.just('__kind__') | st.integers(), inner, max_size=3)))
@settings(max_examples=60, deadline=None)
def test_any_extra_comes_back(tmp_path_factory, value):
  path = store.TrajectoryStore(tmp_path_factory.mktemp('store')).write(0, [], {'value': value})
  assert repr(store.read(path).extra['value']) == repr(
      value)  # repr tells NaN, -0.0, tuples and lists apart.


def test_an_object_that_cannot_be_stored_does_not_end_the_run(tmp_path):
  path = store.TrajectoryStore(tmp_path).write(0, [], {'odd': {1 + 2j}})
  assert store.read(path).extra == {'odd': '{(1+2j)}'}


def test_files_are_listed_by_step_and_replaced_whole(tmp_path):
  files = store.TrajectoryStore(tmp_path / 'trajectories')
  assert files.paths() == []
  for step in (10, 9, 123456789, 9):
    files.write(step, [_trajectory()])
  (tmp_path / 'trajectories' / 'step_00000001.json.gz.tmp').write_bytes(b'left by a kill')
  assert [store.step_of(path) for path in files.paths()] == [9, 10, 123456789]
  first = files.paths()[0].read_bytes()
  assert files.write(9, [_trajectory()]).read_bytes() == first  # No time stamp inside.


@pytest.mark.parametrize('damage', [
    lambda data: data[:len(data) // 2],
    lambda data: data[:-9] + b'x' + data[-8:],
    lambda data: b'plain text',
    lambda data: gzip.compress(b'{"format": 99}'),
])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
  path = store.TrajectoryStore(tmp_path).write(3, [_trajectory()])
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match='step_00000003'):
    store.read(path)


def test_needs_no_jax():
  script = 'import sys; from agentrl.rollout import store; assert "jax" not in sys.modules'
  assert subprocess.run([sys.executable, '-c', script], timeout=60).returncode == 0
