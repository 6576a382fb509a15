"""Reference tests of what agents need of a loss: a wider clip for guided rows, likelihood of what went well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import choices, clips
from agentrl.algorithms.compose import compose
from agentrl.algorithms.examples import example_batch
from agentrl.algorithms.guided import guided


def test_guided_rows_have_their_own_upper_bound():
  rng = np.random.default_rng(0)
  ratio, advantages = np.exp(rng.normal(size=(3, 40))).astype(np.float32), rng.normal(size=(3, 40)).astype(np.float32)
  is_guided = (rng.random((3, 40)) < 0.5).astype(np.float32)
  got = guided(ratio, advantages, np.log(ratio), is_guided, low=0.2, high=0.28, guided_high=0.6)
  expected = np.empty_like(ratio)
  for i in np.ndindex(ratio.shape):
    bounded = min(max(ratio[i], 0.8), 1.6 if is_guided[i] else 1.28)
    expected[i] = max(-advantages[i] * ratio[i], -advantages[i] * bounded)
  np.testing.assert_allclose(got.loss, expected, rtol=1e-5)
  # With nobody guided it is the plain clip, to the bit.
  plain = clips.asym(ratio, advantages, np.log(ratio), low=0.2, high=0.28)
  np.testing.assert_array_equal(guided(ratio, advantages, np.log(ratio), 0 * is_guided).loss, plain.loss)


def test_likelihood_is_raised_where_the_advantage_is_positive_and_nowhere_else():
  objective = compose(channels={'policy': {'clip': 'none', 'ratio': 'token'}}, regularisers={'nll_positive': 0.01})
  plain = compose(channels={'policy': {'clip': 'none', 'ratio': 'token'}})
  batch, outputs = example_batch(3)
  prepared = objective.prepare(batch)
  loss = lambda o, prepared: lambda l: o.loss(outputs._replace(log_probs=l), prepared)[0]
  extra = jax.grad(loss(objective, prepared))(outputs.log_probs) - jax.grad(loss(plain, plain.prepare(batch)))(
      outputs.log_probs)
  mask = np.asarray(prepared.loss_mask)
  advantages = np.asarray(prepared.advantages)[:, 0]
  expected = np.where(mask & (advantages > 0), -0.01 / mask.sum(), 0.0)
  assert (expected < 0).any() and (expected == 0)[mask].any()
  np.testing.assert_allclose(extra, expected, atol=1e-7)
  value = loss(objective, prepared)(outputs.log_probs) - loss(plain, plain.prepare(batch))(outputs.log_probs)
  np.testing.assert_allclose(value, np.sum(expected * outputs.log_probs), rtol=1e-4)


def test_the_likelihood_of_one_channel_is_that_of_its_own_rows():
  channels = {'rows': {'rows': {'name': 'fresh', 'part': 'suffix'}}, 'suffixes': {'rows': {'name': 'replayed', 'part': 'suffix'}}}
  batch, _ = example_batch(1, reads=('suffix',))
  batch = batch._replace(parts={'suffix': np.float32(np.arange(len(batch.weights)) % 2)})
  # Whatever the order that a config lists them in.
  for channel, order in ((0, ('rows', 'suffixes')), (1, ('rows', 'suffixes')), (1, ('suffixes', 'rows'))):
    objective = compose(channels={name: channels[name] for name in order}, regularisers={
        'nll_positive': {'coef': .01, 'channel': ('rows', 'suffixes')[channel]}})
    where = np.asarray(objective.regularisers[0].where(objective.estimate(batch)))
    of = np.asarray(jnp.where(batch.trajectory_ids >= 0, batch.parts['suffix'][batch.trajectory_ids], -1))
    assert where.any() and set(of[where > 0].tolist()) == {float(channel)}
  with pytest.raises(ValueError, match='it takes channel'):
    choices.regulariser('nll_positive', weight=1)
