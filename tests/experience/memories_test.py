"""Memories of trajectories, step by step: what they keep, what they give back, and how that is marked."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.core import types
from agentrl.experience import base

TASKS = [types.Task(f'task-{i}', 'tools', (), None) for i in range(6)]


def _group(number, *totals, step=0, calls=1.0, **parts):
  made = [types.Trajectory(TASKS[number], i, f'task-{number}', 0, policy_version=step, status=types.Status.FINISHED,
                           rewards={'total': float(r), 'accuracy': float(r), 'calls': calls, **{k: v[i] for k, v in parts.items()}})
          for i, r in enumerate(totals)]
  for t in made:
    t.segments[0].append_sampled([step], [-float(step)], [0.], 0)
  return made


class Steps:
  """A memory driven as the stage does."""

  def __init__(self, name, **options):
    self.memory, self.noted, self.rng = base.make(name, options), {}, np.random.default_rng(0)

  def exchange(self, step, *groups):
    fresh = [t for group in groups for t in group]
    before = [dict(t.rewards) for t in fresh]
    out = self.memory.exchange(fresh, self.rng, types.Iteration(step, 10, self.noted))
    assert [dict(t.rewards) for t in fresh] == before, 'fresh trajectories are not changed'
    assert len(out) <= len(fresh) + self.memory.max_replayed(len(fresh))
    self.back = [t for t in out if t.rewards.get(base.REPLAYED)]
    for t in self.back:
      assert set(t.rewards) >= set(self.memory.names)
    return out

  def ask(self, step, *numbers):
    asked = self.memory.ask([TASKS[i] for i in numbers], self.rng, types.Iteration(step, 10, self.noted))
    assert len({t.id for t in asked}) == len(asked)
    return [int(t.id.removeprefix('task-')) for t in asked]


def test_an_earlier_success_takes_a_place_in_a_failed_group():
  steps = Steps('prompt_success')
  steps.exchange(0, _group(0, 0, 1, 0, step=0), _group(1, 0, 0, 0))
  assert steps.back == []
  out = steps.exchange(1, _group(0, 0, 0, 0, step=1), _group(1, 0, 0, .5, step=1))
  (back,) = steps.back
  assert back.rewards['total'] == 1 and back.group_id == 'task-0' and len(out) == 6
  # The log-probs are those of its own sampling, at step 0; its group keeps its size.
  assert back.segments[0].log_probs.tolist() == [0.] and sum(t.group_id == 'task-0' for t in out) == 3
  # A later success is what comes back next.
  steps.exchange(2, _group(0, 1, 0, 0, step=2))
  steps.exchange(3, _group(0, 0, 0, 0, step=3))
  assert steps.back[0].policy_version == 2


def test_solved_questions_are_not_asked_again():
  steps = Steps('prompt_success', solved=.75)
  steps.exchange(0, _group(0, 1, 1, 1, 0), _group(1, 1, 1, 0, 0))
  assert steps.ask(1, 0, 1, 2) == [1, 2]
  assert [t.task.id for t in steps.memory.trajectories] == ['task-1']


def test_leftovers_wait_in_line_and_come_back_oldest_first():
  steps = Steps('fifo_leftover', size=3, probability=1.0)
  steps.exchange(0, _group(0, 1, 1, 0, 0, priority=[1., 0., 0., 1.]))
  assert steps.back == [] and len(steps.memory.trajectories) == 2
  out = steps.exchange(1, _group(1, 1, 1, 0, 0, step=1, priority=[0., 0., 0., 1.]))
  assert [(t.policy_version, t.sample) for t in steps.back] == [(0, 1), (0, 2)]
  assert [(t.policy_version, t.sample) for t in steps.memory.trajectories] == [(1, 0), (1, 1), (1, 2)]
  # They come back in groups of their own.
  assert len({t.group_id for t in out}) == 3
  never = Steps('fifo_leftover', size=1, probability=0.0)
  never.exchange(0, _group(0, 1, 1, priority=[0., 0.]))
  assert never.back == [] and len(never.memory.trajectories) == 1


def test_self_imitation_waits_for_enough_good_ones():
  steps = Steps('sil_buffer', size=2, most=3, max_age=5)
  # Of each group the first is better than the mean.
  steps.exchange(0, _group(0, 1, 0), _group(1, 1, .8), _group(2, .2, 0))
  assert [t.task.id for t in steps.memory.trajectories] == ['task-0', 'task-1', 'task-2']
  steps.exchange(1, _group(3, 1, 0, step=1), _group(4, 1, 1, calls=0., step=1))
  # Group means .5, .9, .1, .5, 1: their median is .5, and two of the kept are above it, not more than 1.5 * 2.
  assert steps.back == [] and len(steps.memory.trajectories) == 4
  steps.exchange(2, _group(5, 1, 0, step=2))
  assert steps.back == []
  steps.exchange(3, _group(0, 0, 0, step=3))
  # Four good ones (tasks 0, 1, 3, 5) above the median .5: a power of two, at most 3, so 2 of them.
  assert len(steps.back) == 2 and steps.memory.trajectories == []
  assert all(t.rewards['percentile'] == pytest.approx(.5) and t.rewards['total'] == 1 for t in steps.back)
  assert len({t.group_id for t in steps.back}) == 2


def test_old_trajectories_are_not_imitated():
  steps = Steps('sil_buffer', size=1, max_age=2)
  steps.exchange(0, _group(0, 1, 0), _group(1, 1, 0))
  steps.exchange(3, _group(2, 0, 0, step=3))
  assert steps.back == [] and steps.memory.trajectories == []


def test_failed_questions_are_asked_again_now_and_then():
  steps = Steps('failed_queries', every=2, share=.5)
  steps.exchange(0, _group(0, 0, 0), _group(1, 0, 1))
  assert steps.ask(1, 2, 3) == [2, 3]
  assert steps.ask(2, 2, 3) == [2, 0]
  # What is due anyway is not asked twice.
  assert steps.ask(2, 0, 3) == [0, 3]
  out = steps.exchange(2, _group(0, 0, 1, step=2))
  assert steps.back == [] and len(out) == 2
  assert steps.ask(4, 2, 3) == [2, 3], 'it was answered since'


@pytest.mark.parametrize('name, options, message', [
    ('fifo_leftover', dict(size=0), 'size=0'), ('fifo_leftover', dict(probability=2.), 'probability=2.0'),
    ('sil_buffer', dict(size=1, percentile=101.), 'percentile'), ('sil_buffer', dict(), 'size'),
    ('failed_queries', dict(share=0.), 'share=0.0'), ('failed_queries', dict(period=3), 'period')])
def test_options_out_of_range_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    base.make(name, options)
