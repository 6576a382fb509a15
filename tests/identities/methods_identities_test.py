"""Equalities of the methods, by mathematics alone; those that say that something has no effect among them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import make
from agentrl.algorithms.examples import example_batch
from agentrl.core import types
from agentrl.rewards.shaping import difficulty_w, mult_eff

READS = ('s', 'r', 'call', 'entropy', 'consensus', 'node', 'node_parent', 'history', 'sampler_log_prob')


@functools.cache
def _batch(**kwargs):
  return example_batch(9, reads=READS, **kwargs)


def _made(advantage='z', maps=(), clip='asym', ratio='token', filters=(), weight=1.0, **rest):
  channel = dict(advantage=advantage, maps=maps, clip=clip, ratio=ratio, filters=filters, weight=weight)
  return make('compose', channels={'p': channel}, **rest)


def _advantages(made, batch):
  return np.asarray(made.estimate(batch).advantages)[0]


def _gradient(made, batch, outputs):
  prepared = made.prepare(batch)
  return np.asarray(jax.grad(lambda o: made.loss(o, prepared)[0])(outputs).log_probs)


def _turn(name, **options):
  return {'name': name, 'turn_part': 's', **options}


# ---- observations are no steps ------------------------------------------------------------------


def _with_observations(batch, rng):
  """Puts forced tokens into the rows, anywhere, each into the sequence and the turn of the token after it."""
  rows, length = batch.tokens.shape
  longer = length + 20
  at = [np.sort(rng.permutation(longer)[:length]) for _ in range(rows)]

  def spread(x, forced):
    out = np.zeros((rows, longer), x.dtype)
    for b in range(rows):
      source = np.minimum(np.searchsorted(at[b], np.arange(longer)), length - 1)
      out[b] = x[b, source] if forced is None else forced
      out[b, at[b]] = x[b]
    return out

  noise = np.float32(7.5)
  forced = {'loss_mask': False, 'values': noise, 'behaviour_log_probs': noise, 'reference_log_probs': noise}
  planes = {k: spread(v, forced.get(k)) for k, v in batch._asdict().items()
            if isinstance(v, np.ndarray) and v.ndim == 2}
  parts = {k: spread(v, None if v.dtype == np.int32 else noise) for k, v in batch.token_parts.items()}
  return batch._replace(**planes, token_parts=parts)


@pytest.mark.parametrize('advantage', [
    'gae', 'reward_to_go', _turn('turn_gae'), _turn('bilevel_gae'), _turn('disc_segment_return', gamma=.9),
    _turn('step_z'), _turn('z_per_turn_index'), _turn('state_z', state_part='history'), _turn('suffix_sum'),
    _turn('fork_z'), 'opo', 'turn_rows_z'], ids=str)
def test_forced_tokens_before_a_turn_leave_every_advantage(advantage):
  batch, _ = _batch(packed=False)
  apart = _with_observations(batch, np.random.default_rng(0))
  if isinstance(advantage, dict) or advantage == 'turn_rows_z':
    # A forced token inside a run of sampled ones ends the run; what counts turns is given the same turns.
    apart = _joined(apart)
  made = _made(advantage)
  np.testing.assert_allclose(_advantages(made, apart)[apart.loss_mask], _advantages(made, batch)[batch.loss_mask],
                             rtol=1e-4, atol=1e-5)


def _joined(batch):
  """Moves the sampled tokens of each turn together, behind what was forced in it."""
  rows, length = batch.tokens.shape
  order = np.stack([np.array(sorted(range(length), key=lambda t, b=b: (
      _run_start(batch, b, t), batch.loss_mask[b, t], t))) for b in range(rows)])
  move = lambda x: np.take_along_axis(x, order, axis=1)
  planes = {k: move(v) for k, v in batch._asdict().items() if isinstance(v, np.ndarray) and v.ndim == 2}
  return batch._replace(**planes, token_parts={k: move(v) for k, v in batch.token_parts.items()})


def _run_start(batch, b, t):
  """First token of the stretch of one sequence and turn that token t lies in."""
  same = (batch.segment_ids[b] == batch.segment_ids[b, t]) & (batch.turn_ids[b] == batch.turn_ids[b, t])
  return int(np.flatnonzero(same)[0])


# ---- on the policy's own samples ----------------------------------------------------------------


@pytest.mark.parametrize('ratio', ['token', 'segment_geo', 'sequence_geo'])
@pytest.mark.parametrize('clip', ['grad_preserve', 'dyn_high', 'cut_far', 'weight_sg_masked'])
def test_on_policy_every_clip_gives_the_reinforce_gradient(ratio, clip):
  batch, outputs = _batch()
  still = outputs._replace(log_probs=batch.behaviour_log_probs)
  made = _made(clip=clip, ratio=ratio)
  prepared = made.prepare(batch)
  want = -np.asarray(prepared.token_weights[:, 0] * prepared.advantages[:, 0])
  np.testing.assert_allclose(_gradient(made, batch, still), want, rtol=1e-5, atol=1e-8)


# ---- what has no effect -------------------------------------------------------------------------


def _trajectories(rewards):
  task = types.Task('0', 'chains', (), None)
  return [types.Trajectory(task, i, str(i // 4), 0, rewards={'total': float(r)}) for i, r in enumerate(rewards)]


def test_the_difficulty_weight_acts_under_center_and_not_under_z():
  # Group totals of mean 1.5, 2.5 and 1: weights .75, .5 and 1.
  totals = np.float32([1, 2, 1, 2, 3, 2, 2, 3, 1, 0, 2, 1])
  given = difficulty_w.DifficultyWeight()(_trajectories(totals), types.Iteration(0, 1))
  weighted = np.float32([g['total'] for g in given])
  np.testing.assert_allclose(weighted / np.maximum(totals, 1e-9) * (totals > 0),
                             np.repeat([.75, .5, 1], 4) * (totals > 0), rtol=1e-5)
  batch, _ = _batch()
  of = lambda r: batch._replace(rewards=np.append(r, np.float32([0, 0])).astype(np.float32))
  np.testing.assert_allclose(_advantages(_made('z'), of(weighted)), _advantages(_made('z'), of(totals)),
                             rtol=1e-4, atol=1e-5)
  factor = np.repeat(np.float32([.75, .5, 1]), 4)
  scale = np.where(batch.loss_mask, factor[np.maximum(batch.trajectory_ids, 0)], 0)
  np.testing.assert_allclose(_advantages(_made('center'), of(weighted)), scale * _advantages(_made('center'), of(totals)),
                             rtol=1e-4, atol=1e-6)


def _efficiency(alpha, calls, right, iteration=None):
  shaping = mult_eff.MultiplicativeEfficiency('fewest', max_calls=4, alpha=alpha)
  trajectories = _trajectories(np.zeros(12))
  for t, m, a in zip(trajectories, calls, right):
    t.rewards.update(calls=float(m), accuracy=float(a))
  return np.float32([p['total'] for p in shaping(trajectories, iteration or types.Iteration(0, 1))])


def test_otcs_alpha_acts_under_center_and_not_under_z():
  calls, right = [3, 1, 2, 4, 2, 2, 5, 0, 1, 1, 3, 6], [1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]
  batch, _ = _batch()
  of = lambda alpha: batch._replace(rewards=np.append(_efficiency(alpha, calls, right), np.float32([0, 0])))
  np.testing.assert_allclose(_advantages(_made('z'), of(3.)), _advantages(_made('z'), of(1.)), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(_advantages(_made('center'), of(3.)), 3 * _advantages(_made('center'), of(1.)),
                             rtol=1e-4, atol=1e-5)


def test_otc_is_one_exactly_at_the_fewest_calls_and_nothing_for_wrong_answers():
  of = mult_eff.fewest
  assert of(1, 1, 4) == of(0, 0, 4) == 1 and all(of(m, 1, 4) < 1 for m in (0, 2, 3, 9))
  calls, right = [2, 3, 2, 4] * 3, [1, 1, 0, 1] * 3
  np.testing.assert_allclose(_efficiency(1., calls, right), [1, of(3, 2, 4), 0, of(4, 2, 4)] * 3, rtol=1e-6)
  # One call sufficed in an earlier epoch: two are no longer the best.
  seen = types.Iteration(0, 1, {'fewest': {'0': 1.0}})
  np.testing.assert_allclose(_efficiency(1., calls, right, seen), [of(2, 1, 4), of(3, 1, 4), 0, of(4, 1, 4)] * 3, rtol=1e-6)


def test_whitening_twice_is_whitening_once_where_every_group_has_a_signal():
  # z-scores with the population's deviation have mean 0 and variance 1 in each group, hence over all groups.
  batch, _ = _batch()
  batch = batch._replace(rewards=np.random.default_rng(0).random(14).astype(np.float32))
  np.testing.assert_allclose(_advantages(_made('z', maps='batch_z'), batch), _advantages(_made('z'), batch),
                             rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('advantage, plain', [
    ({'name': 'suffix_sum', 'turn_part': 's', 'alpha': 0.}, 'z'),
    ({'name': 'sum', 'terms': {'a': {'name': 'z'}, 'b': _turn('state_z', state_part='history', weight=0.)}}, 'z'),
    ({'name': 'sum', 'terms': {'a': {'name': 'loo'}, 'b': _turn('step_z', weight=0.)}}, 'loo'),
    ({'name': 'turn_rows_z', 'rows': False}, 'z'), ('rloo', 'loo'),
    ({'name': 'disc_segment_return', 'group_baseline': True}, 'center')], ids=str)
def test_at_its_neutral_setting_a_method_is_the_one_it_extends(advantage, plain):
  batch, _ = _batch()
  np.testing.assert_allclose(_advantages(_made(advantage), batch), _advantages(_made(plain), batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('change', [
    {'maps': ({'name': 'entropy_scale', 'weight': 0.},)},
    {'maps': ({'name': 'consensus_scale', 'least': 1.},)},
    {'maps': ({'name': 'token_class_add', 'part': 's', 'weight': 0.},)},
    {'maps': ({'name': 'mismatch_mask', 'low': 0., 'high': 1e9},)},
    {'clip': {'name': 'dyn_high', 'extra': 0.}},
    {'filters': ({'name': 'abs_adv', 'least': 0.},)},
    {'regularisers': {'llds': 0., 'kl_cov': 0.}}], ids=str)
def test_a_part_at_its_neutral_setting_has_no_effect(change):
  batch, outputs = _batch()
  np.testing.assert_allclose(_gradient(_made(**change), batch, outputs), _gradient(_made(), batch, outputs),
                             rtol=1e-5, atol=1e-8)


def test_two_losses_of_one_reward_are_one_loss_with_both_weights():
  batch, outputs = _batch()
  channel = {'advantage': 'z'}
  both = make('compose', channels={'a': channel, 'b': {**channel, 'weight': .15}})
  np.testing.assert_allclose(_gradient(both, batch, outputs), 1.15 * _gradient(_made(), batch, outputs),
                             rtol=1e-5, atol=1e-8)


def test_bounds_so_wide_that_they_never_act_make_all_clips_equal():
  batch, outputs = _batch()
  wide = [{'name': name, 'low': 1., 'high': 1e6} for name in ('asym', 'grad_preserve', 'dyn_high')]
  gradients = [_gradient(_made(clip=c), batch, outputs) for c in ('none', *wide)]
  for gradient in gradients[1:]:
    np.testing.assert_allclose(gradient, gradients[0], rtol=1e-5, atol=1e-8)


def test_without_forks_siblings_are_the_first_steps_of_the_group():
  batch, _ = _batch()
  own = (100 * np.maximum(batch.trajectory_ids, 0) + np.maximum(batch.turn_ids, 0)).astype(np.int32)
  parents = np.where(batch.turn_ids > 0, own - 1, -1).astype(np.int32)
  batch = batch._replace(token_parts={**batch.token_parts, 'node': own, 'node_parent': parents})
  want = np.where(batch.turn_ids == 0, _advantages(_made('z'), batch), 0)
  np.testing.assert_allclose(_advantages(_made('fork_z'), batch), want, rtol=1e-4, atol=1e-5)
  # And nobody shares anything.
  np.testing.assert_allclose(_advantages(_made(maps='prefix_mean'), batch), _advantages(_made(), batch), rtol=1e-5)


def test_where_every_trajectory_is_one_turn_turns_are_trajectories():
  batch, _ = _batch()
  one = batch._replace(loss_mask=batch.loss_mask & (batch.turn_ids == 0))
  last = np.asarray(one.loss_mask) & ~np.pad(one.loss_mask[:, 1:], ((0, 0), (0, 1)))
  placed = np.where(last, one.rewards[np.maximum(one.trajectory_ids, 0)], 0).astype(np.float32)
  one = one._replace(token_parts={**one.token_parts, 's': placed})
  want = _advantages(_made('z'), one)
  for name in ('step_z', 'z_per_turn_index'):
    np.testing.assert_allclose(_advantages(_made(_turn(name)), one), want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(_advantages(_made('turn_rows_z'), one), want, rtol=1e-4, atol=1e-5)


# ---- what has an effect, and which --------------------------------------------------------------


def test_more_turns_of_one_trajectory_move_the_mean_of_rows_alone():
  batch, _ = _batch()
  i = next(i for i in range(12) if len(np.unique(batch.turn_ids[batch.loss_mask & (batch.trajectory_ids == i)])) > 1)
  rewards = np.zeros(14, np.float32)
  rewards[i] = 1.0
  fewer = batch.loss_mask & ~((batch.trajectory_ids == i) & (batch.turn_ids == 0))
  others = fewer & (batch.trajectory_ids != i) & (batch.group_ids[np.maximum(batch.trajectory_ids, 0)] == batch.group_ids[i])
  many, few = batch._replace(rewards=rewards), batch._replace(rewards=rewards, loss_mask=fewer)
  for rows in (True, False):
    made = _made({'name': 'turn_rows_z', 'rows': rows})
    moved = np.abs(_advantages(made, many)[others] - _advantages(made, few)[others])
    assert (moved > 1e-3).all() if rows else (moved == 0).all()


def test_with_rewards_of_0_and_1_the_half_for_bad_trajectories_never_acts():
  # Hence the baseline: IPA's loss of a trajectory without reward is 0 times its ratio.
  batch, outputs = _batch()
  rewards = np.where(np.arange(14) % 2, np.float32(1), np.float32(0)) * (np.arange(14) < 12)
  batch = batch._replace(rewards=rewards.astype(np.float32))
  bad = batch.loss_mask & (batch.rewards[np.maximum(batch.trajectory_ids, 0)] == 0)
  for baseline in (False, True):
    made = _made({'name': 'disc_segment_return', 'group_baseline': baseline}, clip='one_sided_neg', ratio='segment_geo')
    assert np.any(_gradient(made, batch, outputs)[bad] != 0) == baseline


def test_good_trajectories_of_ipa_read_no_ratio():
  batch, outputs = _batch()
  made = _made('disc_segment_return', clip='one_sided_neg', ratio='segment_geo')
  shifted = batch._replace(behaviour_log_probs=batch.behaviour_log_probs - 2)
  np.testing.assert_allclose(_gradient(made, shifted, outputs), _gradient(made, batch, outputs), rtol=1e-6)


def test_replayed_rows_are_weighed_by_their_stored_log_probs_and_stay_finite():
  batch, outputs = _batch()
  old = np.where(batch.loss_mask & (batch.trajectory_ids == 0), np.float32(-60), batch.behaviour_log_probs)
  stored = batch._replace(behaviour_log_probs=old.astype(np.float32))
  made = _made('center', clip='none')
  gradient = _gradient(made, stored, outputs)
  assert np.all(np.isfinite(gradient))
  replayed = batch.loss_mask & (batch.trajectory_ids == 0)
  fresh = _gradient(made, batch, outputs)
  np.testing.assert_allclose(gradient[~replayed], fresh[~replayed], rtol=1e-6)
  # d = clip(l - l0, -20, 20) is held at its bound, where no gradient flows.
  np.testing.assert_array_equal(gradient[replayed], 0)
  assert np.any(fresh[replayed] != 0)


def test_the_gradient_of_every_term_reaches_logits_of_sampled_tokens_alone():
  batch, outputs = _batch()
  logits = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 5))
  symbols = jnp.asarray(batch.tokens % 5)
  channels = {c: {'clip': c} for c in ('grad_preserve', 'dyn_high', 'cut_far', 'weight_sg_masked')}
  channels['turns'] = {'advantage': _turn('turn_gae'), 'maps': ('clip_cov', 'mismatch_weight')}
  made = make('compose', channels=channels, regularisers={
      'llds': {'coef': .2, 'channel': 'turns'}, 'kl_cov': {'coef': 1., 'ratio': .5, 'channel': 'turns'}, 'kl': .1, 'entropy': .1, 'turn_value': .5})
  prepared = made.prepare(batch)

  def loss(logits):
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, symbols[..., None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return made.loss(outputs._replace(log_probs=chosen, entropies=entropies, values=logits[..., 0]), prepared)[0]

  gradient = np.asarray(jax.grad(loss)(logits))
  np.testing.assert_array_equal(gradient[~batch.loss_mask], 0)
  assert np.all(np.any(gradient[batch.loss_mask] != 0, axis=-1))
