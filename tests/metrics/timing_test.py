"""Timer on a clock we move by hand; compile counts of programs we compile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from agentrl.metrics import timing


class Clock:

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_phases_add_up_to_wall_time_when_nested():
  clock = Clock()
  timer = timing.Timer(clock)
  with timer('rollout'):
    clock.now += 1
    with timer('tool'):
      clock.now += 2
    clock.now += 4
  clock.now += 100  # In no phase.
  with timer('rollout'):
    clock.now += 8
  assert timer.pop() == {'rollout': 13, 'tool': 2}  # 1 + 4 + 8, and 2.
  assert timer.pop() == {}


def test_a_phase_counts_when_its_body_raises():
  clock = Clock()
  timer = timing.Timer(clock)
  with pytest.raises(RuntimeError):
    with timer('update'):
      clock.now += 3
      raise RuntimeError
  assert timer.pop() == {'update': 3}


def test_an_open_phase_is_counted_up_to_now_and_goes_on():
  clock = Clock()
  timer = timing.Timer(clock)
  with timer('rollout'):
    clock.now += 5
    assert timer.pop() == {'rollout': 5}
    clock.now += 1
  assert timer.pop() == {'rollout': 1}


def test_counts_new_shapes_and_nothing_else():
  counter = timing.CompileCounter()
  x, y = jnp.ones(3), jnp.ones(4)  # Made before the mark: making them compiles too.

  @jax.jit
  def triple(x):
    return x * 3 + 1

  counter.mark()
  triple(x)
  assert counter.count == 1 and 'triple' in counter.names[0] and counter.seconds > 0
  triple(x)
  assert counter.count == 1  # Same shape: the compiled program is there.
  triple(y)
  assert counter.count == 2
  counter.mark()
  assert counter.count == 0 and counter.names == []
  counter.close()
  jax.jit(lambda x: x - 5)(x)
  assert counter.count == 0
