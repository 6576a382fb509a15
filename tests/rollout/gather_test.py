"""Tests of how groups are divided between processes, and of what a trajectory is like after it was sent.

What two processes gather is tested where two are started, in tests/training/several_processes_test.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agentrl.core import types
from agentrl.rollout import gather
from agentrl.rollout.engine import EngineStats, Job

TASKS = [types.Task(f't{i}', 'tools', (types.Message('user', 'what?'),), i) for i in range(5)]


def _jobs(group_size=3):
  return [Job(task, k, task.id, None) for task in TASKS for k in range(group_size)]


@pytest.mark.parametrize('processes', [1, 2, 3, 5, 7])
def test_shares_are_whole_groups_and_together_all_jobs(processes):
  jobs = _jobs()
  shares = [gather.share(jobs, processes, p) for p in range(processes)]
  assert [job for share in shares for job in share] == jobs
  groups = [[job.group_id for job in share] for share in shares]
  sizes = [len(set(ids)) for ids in groups]
  assert sum(sizes) == len(TASKS) and max(sizes) - min(sizes) <= 1


def test_a_trajectory_arrives_as_it_was_sent():
  trajectory = types.Trajectory(TASKS[2], sample=1, group_id='t2', seed=0, path=(1,), parent_path=(), fork_point=2,
                                fork_points=((1, 2),), status=types.Status.FINISHED, answer='4', rewards={'total': 1.0})
  segment = trajectory.segments[0]
  segment.append_forced([3, 4], 0)
  segment.append_sampled([5, 6], [-0.1, -0.2], [0.3, 0.4], 0)
  segment.append_revised([7], 1)
  trajectory.segments.append(types.Segment())
  call = types.ToolCall('add', {'a': 1})
  trajectory.turns.append(types.Turn(0, 0, 2, 4, 'x', 'stop', (call,), (types.ToolResult((types.Part('image', b'1'),)),)))
  data = gather._dump(([trajectory], EngineStats(decoded_tokens=7)), TASKS)
  (arrived,), stats = gather._load(data, TASKS)
  assert stats == EngineStats(decoded_tokens=7)
  # A process has the tasks already: they are not sent, and stay the ones that are compared by identity.
  assert arrived.task is TASKS[2]
  plain = lambda t: {f.name: getattr(t, f.name) for f in dataclasses.fields(t) if f.name != 'segments'}
  assert plain(arrived) == plain(trajectory)
  for got, want in zip(arrived.segments, trajectory.segments, strict=True):
    for column in ('tokens', 'sampled', 'log_probs', 'entropies', 'turns', 'versions'):
      np.testing.assert_array_equal(getattr(got, column), getattr(want, column))
  arrived.segments[0].append_forced([8], 1)
  assert len(arrived.segments[0]) == 6 and len(segment) == 5


def test_stats_add_up_and_the_slowest_process_takes_the_time():
  one = EngineStats(total_seconds=3.0, decode_seconds=1.0, idle_seconds=2.0, tool_seconds=5.0, decoded_tokens=3, chunks=1)
  other = EngineStats(total_seconds=2.5, decode_seconds=2.0, tool_seconds=1.0, decoded_tokens=4)
  assert gather.add_stats([one, other]) == EngineStats(
      total_seconds=5.5, decode_seconds=3.0, idle_seconds=2.0, tool_seconds=6.0, decoded_tokens=7, chunks=1)
  # Its parts still add up to the time; what sessions waited is the sum over all of them.
  assert gather._slowest([one, other]) == EngineStats(
      total_seconds=3.0, decode_seconds=1.0, idle_seconds=2.0, tool_seconds=6.0, decoded_tokens=7, chunks=1)
