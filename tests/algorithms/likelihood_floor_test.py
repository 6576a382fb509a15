"""LLDS by hand: one sequence of two turns, the first a call and the second the answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import likelihood_floor, make
from agentrl.algorithms.examples import example_batch

MASK = np.array([[True, True, False, True, True]])
SEQUENCE, TURNS = np.int32([[1] * 5]), np.int32([[1, 1, 0, 2, 2]])
OLD = np.float32([[-1, -1, 0, -1, -1]])
GOOD = np.zeros((1, 5), np.float32)


def _penalty(new, advantages=GOOD, ids=SEQUENCE, factors=1.0):
  return np.asarray(likelihood_floor.lost_likelihood(np.float32(new), OLD, advantages, MASK, ids,
                                                     np.broadcast_to(np.float32(factors), (1, 5))))


def test_nothing_is_lost_where_all_rises():
  np.testing.assert_array_equal(_penalty([[-.9, -.5, 0, -1, -.1]]), 0)


@pytest.mark.parametrize('new, response, action', [
    # Falls of .5 and 0 in turn one, a rise of .2 and a fall of .1 in turn two: sums .5 and -.1, together .4.
    ([[-1.5, -1, 0, -.8, -1.1]], [.5, 0, 0, 0, .1], [.5, 0, 0, 0, 0]),
    # The sequence as a whole rises: only the gate of turns sees turn one's fall.
    ([[-1.5, -1, 0, -.1, -1.1]], [0, 0, 0, 0, 0], [.5, 0, 0, 0, 0]),
])
def test_the_two_gates(new, response, action):
  np.testing.assert_allclose(_penalty(new), [response], atol=1e-6)
  np.testing.assert_allclose(_penalty(new, ids=TURNS), [action], atol=1e-6)


def test_bad_trajectories_and_answers_are_not_held_and_dead_groups_are():
  new = [[-1.5, -1, 0, -1.5, -1]]
  np.testing.assert_array_equal(_penalty(new, GOOD - 1), 0)
  np.testing.assert_allclose(_penalty(new, GOOD), _penalty(new, GOOD + 1))
  np.testing.assert_allclose(_penalty(new, factors=[[1, 1, 1, .25, .25]]), [[.5, 0, 0, .125, 0]])


def test_the_gradient_pushes_back_what_fell_and_nothing_else():
  gradient = jax.grad(lambda l: jnp.sum(likelihood_floor.lost_likelihood(
      l, OLD, GOOD, MASK, SEQUENCE, np.ones((1, 5), np.float32))))(np.float32([[-1.5, -.9, -7, -1, -2]]))
  np.testing.assert_array_equal(np.asarray(gradient)[0, [0, 1, 2, 4]], [-1, 0, 0, -1])


def test_in_an_objective_answers_are_turns_without_a_call():
  batch, outputs = example_batch(reads=['call'])
  fallen = outputs._replace(log_probs=np.where(batch.loss_mask, batch.behaviour_log_probs - .5, 0).astype(np.float32))
  made = make('compose', regularisers={'llds': .2})
  prepared = made.prepare(batch)
  _, metrics = made.loss(fallen, prepared)
  held = batch.loss_mask & (batch.token_parts['call'] > 0) & (np.asarray(prepared.advantages)[:, 0] >= 0)
  assert held.any()
  np.testing.assert_allclose(metrics.sums['loss/llds'][0], .2 * .5 * held.sum() / batch.loss_mask.sum(), rtol=1e-4)


def test_answers_may_be_held_by_how_much_was_searched():
  batch, outputs = example_batch(reads=['call', 'searches'])
  batch = batch._replace(parts={'searches': np.float32(np.arange(len(batch.weights)) % 4)},
                         token_parts={'call': batch.token_parts['call']})
  fallen = outputs._replace(log_probs=np.where(batch.loss_mask, batch.behaviour_log_probs - .5, 0).astype(np.float32))
  made = make('compose', regularisers={'llds': {'coef': .2, 'answer': .4, 'searches_part': 'searches'}})
  prepared = made.prepare(batch)
  # 0 and 1 searches: nothing; 2: 0.4; 3: 0.8.
  factor = np.float32([0, 0, .4, .8])[np.maximum(batch.trajectory_ids, 0) % 4]
  factor = np.where(batch.token_parts['call'] > 0, 1, factor) * batch.loss_mask
  held = factor * (np.asarray(prepared.advantages)[:, 0] >= 0)
  _, metrics = made.loss(fallen, prepared)
  np.testing.assert_allclose(metrics.sums['loss/llds'][0], .2 * .5 * held.sum() / batch.loss_mask.sum(), rtol=1e-4)


def test_at_the_first_update_it_is_nothing_and_a_run_with_one_is_refused():
  batch, outputs = example_batch(reads=['call'])
  made = make('compose', regularisers={'llds': .2})
  _, metrics = made.loss(outputs._replace(log_probs=batch.behaviour_log_probs), made.prepare(batch))
  assert metrics.sums['loss/llds'][0] == 0
  with pytest.raises(ValueError, match="'llds'.*single update"):
    made.check(group_size=2, value_head=False, reference=False, updates=1)
  with pytest.raises(ValueError, match='gate'):
    make('compose', regularisers={'llds': {'coef': .2, 'gate': 'row'}})
