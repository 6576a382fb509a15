"""Whole objectives against slow references in float64, and what they refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import choices, grpo, make, objective, ppo
from agentrl.algorithms.channel import Channel, Choice
from agentrl.algorithms.examples import example_batch
from agentrl.algorithms.objective import Objective, PolicyOutputs


def _groups(rewards, groups, count):
  out = np.zeros(rewards.size)
  for i in range(count):
    members = rewards[:count][groups[:count] == groups[i]].astype(np.float64)
    out[i] = (rewards[i] - members.mean()) / (members.std() + 1e-6) if np.ptp(members) else 0
  return out


def _policy_loss(l, a, batch, low, high):
  d = l - batch.behaviour_log_probs
  r = np.exp(d)
  return np.maximum(-a * r, -a * np.clip(r, 1 - low, 1 + high))


def _grpo_reference(outputs, batch):
  """GRPO with clip .2/.28, KL .1 and entropy .01, each trajectory averaged, then all of them."""
  count = int(batch.baseline_mask.sum())
  advantages = _groups(batch.rewards, batch.group_ids, count)
  l, h = (x.astype(np.float64) for x in outputs[:2])
  a = advantages[batch.trajectory_ids]
  log = batch.reference_log_probs - l
  token = _policy_loss(l, a, batch, .2, .28) + .1 * (np.exp(log) - log - 1) - .01 * h
  means = [token[batch.loss_mask & (batch.trajectory_ids == i)].mean() for i in range(count)]
  return np.mean(means)


def _ppo_reference(outputs, batch):
  """PPO with gamma .97, lam .9, KL in the reward .05, value loss .5, averaged over tokens."""
  mask, gamma, lam = batch.loss_mask, .97, .9
  advantages = np.zeros(mask.shape)
  for b, row in enumerate(batch.segment_ids):
    for segment in set(row) - {0}:
      tokens = [t for t in range(row.size) if row[t] == segment and mask[b, t]]
      following = last = 0.0
      for t in reversed(tokens):
        final = batch.rewards[batch.trajectory_ids[b, t]] if t == tokens[-1] else 0
        reward = final - .05 * (batch.behaviour_log_probs[b, t] - batch.reference_log_probs[b, t])
        delta = reward + gamma * following - batch.values[b, t]
        last = delta + gamma * lam * last
        advantages[b, t], following = last, batch.values[b, t]
  returns = (advantages + batch.values)[mask]
  a = advantages[mask]
  a = (a - a.mean()) / np.sqrt(a.var(ddof=1) + 1e-8)
  l, _, v = (x.astype(np.float64)[mask] for x in outputs)
  inner = batch._replace(behaviour_log_probs=batch.behaviour_log_probs[mask])
  bounded = np.clip(v, batch.values[mask] - .5, batch.values[mask] + .5)
  value = .5 * np.maximum((v - returns)**2, (bounded - returns)**2)
  return np.mean(_policy_loss(l, a, inner, .2, .2) + .5 * value)


CASES = {
    'grpo': (grpo.grpo(clip_high=.28, aggregation='seq_mean_tok_mean', kl_coef=.1,
                       entropy_coef=.01), _grpo_reference),
    'ppo': (ppo.ppo(gamma=.97, lam=.9, kl_in_reward=.05), _ppo_reference),
}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('seed', [0, 1])
def test_the_loss_equals_a_reference_written_from_the_definition(name, seed):
  made, reference = CASES[name]
  batch, outputs = example_batch(seed, groups=4, group_size=3)
  loss, _ = jax.jit(lambda o, b: made.loss(o, made.prepare(b)))(outputs, batch)
  np.testing.assert_allclose(loss, reference(outputs, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_the_gradient_equals_finite_differences_of_the_reference(name):
  made, reference = CASES[name]
  batch, outputs = example_batch(2)
  gradients = jax.jit(jax.grad(lambda o, b: made.loss(o, made.prepare(b))[0]))(outputs, batch)
  sampled = list(zip(*np.nonzero(batch.loss_mask)))
  h, rng = 1e-6, np.random.default_rng(0)
  for field, gradient in zip(outputs._fields, gradients):
    exact = getattr(outputs, field).astype(np.float64)
    for i in rng.permutation(len(sampled))[:10]:
      step = np.zeros(exact.shape)
      step[sampled[i]] = h
      up, down = (reference(outputs._replace(**{field: exact + s}), batch) for s in (step, -step))
      np.testing.assert_allclose(gradient[sampled[i]], (up - down) / (2 * h), rtol=1e-3, atol=1e-6)


def test_metrics_equal_numpy_over_the_sampled_tokens():
  made, (batch, outputs) = ppo.ppo(entropy_coef=.1, kl_coef=.1), example_batch(4)
  prepared = jax.jit(made.prepare)(batch)
  loss, metrics = jax.jit(made.loss)(outputs, prepared)
  got, mask = objective.summarise(metrics), batch.loss_mask
  ratio = np.exp((outputs.log_probs - batch.behaviour_log_probs)[mask].astype(np.float64))
  a, returns = np.asarray(prepared.advantages[:, 0])[mask], np.asarray(prepared.returns)[mask]
  values = outputs.values[mask]
  want = {
      'policy/ratio': ratio.mean(),
      'policy/ratio_max': ratio.max(),
      'policy/clip_low': np.mean((ratio < .8) & (a < 0)),
      'policy/clip_high': np.mean((ratio > 1.2) & (a > 0)),
      'policy/advantage': a.mean(),
      'policy/advantage_abs': np.abs(a).mean(),
      'behaviour_kl': np.mean(ratio - 1 - np.log(ratio)),
      'entropy': outputs.entropies[mask].mean(),
      'value/explained_variance': 1 - np.var(returns - values) / np.var(returns),
      'loss/total': loss,
      'loss/entropy': -.1 * outputs.entropies[mask].mean(),
  }
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  parts = sum(got[f'loss/{term}'] for term in ('policy', 'value', 'kl', 'entropy'))
  np.testing.assert_allclose(parts, loss, rtol=1e-5)


def test_estimates_of_a_rollout_batch_serve_its_optimiser_batches():
  # Statistics come from all rows, denominators from the rows of the optimiser batch.
  made = make('grpo')
  batch, outputs = example_batch(0, min_rows=6)
  estimated = made.estimate(batch)
  rows = np.array([1, 2])

  def some(x, axis=0):
    return np.take(np.asarray(x), rows, axis=axis)

  planes = {k: some(v) for k, v in estimated._asdict().items()
            if np.shape(v) == batch.tokens.shape}
  part = estimated._replace(**planes, advantages=some(estimated.advantages, 1))
  weighed = made.weigh(part)
  np.testing.assert_array_equal(weighed.advantages[:, 0], some(estimated.advantages[0]))
  np.testing.assert_allclose(np.sum(weighed.token_weights), 1.0, rtol=1e-5)
  loss, _ = made.loss(PolicyOutputs(*(some(x) for x in outputs)), weighed)
  assert np.isfinite(loss)


def test_a_channel_may_train_on_some_rows_with_a_scheduled_weight():
  base = make('grpo').channels[0]
  first = dataclasses.replace(base, name='first', weight=lambda step: 1.0 / (1.0 + step),
                              rows=(Choice('good', lambda batch: (batch.rewards > 0).astype(jnp.float32)),))
  both = Objective('two', (base, first))
  alone = Objective('one', (dataclasses.replace(first, weight=1.0),))
  batch, outputs = example_batch(1)
  step = jnp.float32(3)
  loss, metrics = both.loss(outputs, both.prepare(batch, step))
  own, _ = alone.loss(outputs, alone.prepare(batch))
  plain, _ = make('grpo').loss(outputs, make('grpo').prepare(batch))
  # Channels add up, and at step 3 the second has weight 1/4.
  np.testing.assert_allclose(loss, plain + own / 4, rtol=1e-5)
  kept = batch.loss_mask & (batch.rewards > 0)[batch.trajectory_ids]
  assert metrics.sums['first/ratio'][1] == kept.sum()


def test_group_ids_may_be_any_numbers():
  made, (batch, _) = make('grpo'), example_batch()
  renamed = batch._replace(group_ids=batch.group_ids * -1000 + 7)
  np.testing.assert_array_equal(made.estimate(batch).advantages, made.estimate(renamed).advantages)


def test_rows_are_cut_so_that_every_part_takes_every_nth():
  prepared = make('grpo').prepare(example_batch(min_rows=8)[0])
  parts = objective.split_rows(prepared, 4)
  np.testing.assert_array_equal(parts.tokens[1], np.asarray(prepared.tokens)[[1, 5]])
  with pytest.raises(ValueError, match='8 rows do not divide into 3'):
    objective.split_rows(prepared, 3)


@pytest.mark.parametrize('make_it, words', [
    (lambda: grpo.grpo(advantage='gae'), "'gae'.*'z'"),
    (lambda: grpo.grpo(advantage='center', ddof=1), "'center'.*'ddof'.*takes singleton"),
    (lambda: grpo.grpo(clip='none', clip_high=.3), "'none'.*'high'.*no options"),
    (lambda: grpo.grpo(ratio='off'), "'off'.*'asym'.*take clip 'log_likelihood'"),
    (lambda: grpo.grpo(clip='log_likelihood'), "'log_likelihood'.*'token'.*take ratio 'off'"),
    (lambda: grpo.grpo(aggregation='sum_over_constant'), 'max_tokens'),
    (lambda: grpo.grpo(aggregation='tok_mean', max_tokens=5), "'tok_mean'.*'max_tokens'"),
    (lambda: grpo.grpo(kl_coef=.1, kl_estimator='k9'), "'k9'.*k1, k2, k3"),
    (lambda: grpo.grpo(entropy_coef=float('nan')), 'entropy_coef'),
    (lambda: ppo.ppo(lam=1.5), 'lam=1.5'),
    (lambda: Channel(choices.advantage('gae'), choices.credit('trajectory'), choices.ratio('token'),
                     choices.clip('asym'), choices.aggregation('tok_mean')),
     "'gae'.*'broadcast'.*take credit 'per_token'"),
    (lambda: Objective('mixed', grpo.grpo().channels, ppo.ppo().regularisers),
     "'value'.*'z'.*take advantage 'gae'"),
    (lambda: Objective('twice', grpo.grpo().channels * 2), 'names that differ'),
])
def test_choices_that_cannot_go_together_are_refused_with_an_alternative(make_it, words):
  with pytest.raises(ValueError, match=words):
    make_it()


@pytest.mark.parametrize('make_it, known', [
    (choices.advantage, 'gae,.* loo'), (choices.ratio, 'sequence_geo,.* token'),
    (choices.clip, 'asym,.* log_likelihood'), (choices.aggregation, 'seq_mean_tok_sum,.* sum'),
    (make, 'grpo,.* ppo'),
])
def test_an_unknown_name_lists_the_known_ones(make_it, known):
  with pytest.raises(LookupError, match=f"'nosuch'.*Known: .*{known}"):
    make_it('nosuch')


@pytest.mark.parametrize('name', CASES)
def test_padding_changes_neither_loss_nor_metrics(name):
  made, _ = CASES[name]
  run = jax.jit(lambda o, b: made.loss(o, made.prepare(b)))
  (loss, metrics), (other, same) = (
      run(*example_batch(0, min_rows=rows, spare=spare)[::-1]) for rows, spare in ((0, 0), (9, 5)))
  np.testing.assert_allclose(loss, other, rtol=1e-5)
  want = objective.summarise(metrics)
  for key, value in objective.summarise(same).items():
    np.testing.assert_allclose(value, want[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_run_that_cannot_train_the_objective_is_refused():
  fine = {'group_size': 4, 'value_head': True, 'reference': True}
  grpo.grpo(kl_coef=.1).check(**fine)
  with pytest.raises(ValueError, match="'z'.*group size of 1.*at least 2"):
    grpo.grpo().check(**{**fine, 'group_size': 1})
  grpo.grpo(singleton='raw').check(**{**fine, 'group_size': 1})
  ppo.ppo().check(**{**fine, 'group_size': 1, 'reference': False})
  with pytest.raises(ValueError, match="'ppo'.*value head.*'grpo'"):
    ppo.ppo().check(**{**fine, 'value_head': False})
  for needy in (grpo.grpo(kl_coef=.1), ppo.ppo(kl_in_reward=.1)):
    with pytest.raises(ValueError, match='reference.*coefficients to 0'):
      needy.check(**{**fine, 'reference': False})


def test_missing_outputs_are_refused_by_name():
  batch, outputs = example_batch()
  for made, missing in ((ppo.ppo(), 'values'), (grpo.grpo(entropy_coef=.1), 'entropies')):
    with pytest.raises(ValueError, match=missing):
      made.loss(outputs._replace(**{missing: None}), made.prepare(batch))


def test_half_precision_log_probs_are_refused():
  # Their rounding, 1e-2 at -3 nats in bfloat16, would pass for a change of policy.
  made, (batch, outputs) = make('grpo'), example_batch()
  with pytest.raises(AssertionError):
    made.loss(outputs._replace(log_probs=jnp.asarray(outputs.log_probs, jnp.bfloat16)),
              made.prepare(batch))
