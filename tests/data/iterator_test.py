"""The task iterator: a pure function of its state, and every task once an epoch."""

from __future__ import annotations

import json

import hypothesis
from hypothesis import strategies as st
import pytest

from agentrl.data import iterator as iterator_lib


def _collect(iterator, state, batches):
  out = []
  for _ in range(batches):
    tasks, state = iterator.next(state)
    out.append(tasks)
  return out, state


@hypothesis.given(size=st.integers(1, 20),
                  data=st.data(),
                  seed=st.integers(0, 9),
                  stop=st.integers(0, 12))
@hypothesis.settings(max_examples=60, deadline=None)
def test_resumed_equals_uninterrupted(size, data, seed, stop):
  batch = data.draw(st.integers(1, size))
  make = lambda: iterator_lib.TaskIterator(range(size), batch, seed)
  whole, _ = _collect(make(), make().start(), 12)
  first, state = _collect(make(), make().start(), stop)
  state = make().restore(json.loads(json.dumps(state)))
  rest, _ = _collect(make(), state, 12 - stop)
  assert first + rest == whole


@hypothesis.given(size=st.integers(1, 20), data=st.data(), seed=st.integers(0, 9))
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_task_comes_twice_in_an_epoch(size, data, seed):
  batch = data.draw(st.integers(1, size))
  iterator = iterator_lib.TaskIterator(range(size), batch, seed)
  state = iterator.start()
  for epoch in range(3):
    batches, state = _collect(iterator, state, size // batch)
    seen = [task for tasks in batches for task in tasks]
    assert len(set(seen)) == len(seen) == size // batch * batch
    assert state['epoch'] == epoch


def test_epochs_and_seeds_differ_in_order():
  # 30! orders: equal ones would mean that the epoch or the seed is not used.
  orders = []
  for seed in (0, 1):
    iterator = iterator_lib.TaskIterator(range(30), 30, seed)
    orders += _collect(iterator, iterator.start(), 2)[0]
  assert len({tuple(order) for order in orders}) == 4


def test_next_leaves_the_given_state_alone():
  iterator = iterator_lib.TaskIterator(range(4), 2, 0)
  state = iterator.start()
  assert iterator.next(state) == iterator.next(state)
  assert state == iterator.start()


@pytest.mark.parametrize('change, message', [
    ({'seed': 1}, 'seed 1'), ({'size': 5}, 'size 5'), ({'position': 9}, 'range'),
    ({'epoch': 'x'}, 'expected'), ({'more': 1}, 'expected')])
def test_foreign_states_are_refused(change, message):
  iterator = iterator_lib.TaskIterator(range(4), 2, 0)
  with pytest.raises(ValueError, match=message):
    iterator.restore({**iterator.start(), **change})


@pytest.mark.parametrize('batch', [0, 5])
def test_batches_that_cannot_be_filled_are_refused(batch):
  with pytest.raises(ValueError, match='batch'):
    iterator_lib.TaskIterator(range(4), batch, 0)
