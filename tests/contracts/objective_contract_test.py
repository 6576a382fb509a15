"""What every registered objective and every config of configs/methods must do, found by name: a new
one is tested before its author writes a test.

Add a variant below where an objective's options change which code runs and no config has them.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl import algorithms
from agentrl.algorithms import objective as objectives
from agentrl.algorithms.examples import example_batch
from agentrl.algorithms.objective import PolicyOutputs
from agentrl.core import config as configs

pytestmark = pytest.mark.usefixtures('quick_compile')
STEP = 10  # late enough for schedules to have begun
FIXED = {
    'grpo with KL and entropy': ('grpo', dict(kl_coef=.1, entropy_coef=.01, clip_dual=3.)),
    'LOOP by trajectory': ('grpo', dict(advantage='loo', ratio='trajectory_prod', clip='recip',
                                       clip_high=.1)),
    'IPA-like': ('grpo', dict(ratio='segment_geo', clip='one_sided_neg')),
    'ppo with KL in reward': ('ppo', dict(gamma=.9, lam=.8, kl_in_reward=.1, value_clip=None)),
    **{name: (name, {}) for name in algorithms.OBJECTIVES.names()},
    # Choices that no config takes.
    'further advantages': ('compose', dict(channels={
        name: dict(advantage=choice) for name, choice in {
            'fork': dict(name='fork_z', turn_part='progress', reach='mean'),
            'step': dict(name='step_z', turn_part='progress'),
            'state': dict(name='state_z', turn_part='progress', std=False),
            'suffix': dict(name='suffix_sum', turn_part='progress', by_root=True,
                           alpha=dict(schedule='switch', before=.2, after=0., at=20)),
            'segment': dict(name='disc_segment_return', gamma=.9, group_baseline=True),
            'opo': 'opo', 'batch_std': 'batch_std', 'gpg': 'gpg', 'pass_k': 'pass_k'}.items()})),
    'further maps': ('compose', dict(channels={
        name: dict(maps=(choice,)) for name, choice in {
            'prefix': 'prefix_mean', 'entropy': 'entropy_scale', 'mask': 'mismatch_mask',
            'cov': dict(name='clip_cov', ratio=.2, low=.01),
            'tokens': dict(name='batch_z', level='token')}.items()})),
    'further clips': ('compose', dict(
        channels={'preserve': dict(clip=dict(name='grad_preserve', dual=3.)),
                  'masked': dict(clip='weight_sg_masked')},
        regularisers={'kl_cov': dict(coef=1., ratio=.2, channel='masked'),
                      'llds': dict(coef=.2, gate='action', channel='preserve')})),
}


def _variants():
  """Returns the above and the configs' objectives; what is equal is there once."""
  folder = pathlib.Path(__file__).parents[2] / 'configs' / 'methods'
  found = dict(FIXED)
  for path in sorted(folder.glob('*.py')):
    c = configs.load(path)
    if any(stage.partition(':')[0] == 'rl' for stage in c.stages):
      found[f'config {path.stem}'] = (c.rl.algorithm, c.rl.options.to_dict())
  once = {json.dumps(spec, sort_keys=True): name for name, spec in reversed(found.items())}
  return {name: spec for name, spec in found.items() if name in once.values()}


VARIANTS = _variants()
# A loss is its own derivative's integral only where no factor of it is held fixed.
FREE_CLIPS = ('none', 'asym', 'recip', 'dyn_high', 'cut_far')


@functools.cache
def _make(variant):
  name, options = VARIANTS[variant]
  return algorithms.make(name, **options)


@functools.cache
def _jitted(variant):
  made = _make(variant)
  return jax.jit(made.prepare), jax.jit(jax.value_and_grad(made.loss, has_aux=True))


def _run(variant, batch, outputs, parts=1):
  """Returns loss, metrics and gradients, summed over micro-batches as a user of the API would."""
  prepare, loss_and_grad = _jitted(variant)
  pieces = objectives.split_rows(prepare(batch, STEP), parts)
  done = [loss_and_grad(jax.tree.map(lambda x: x[i::parts], outputs),
                        jax.tree.map(lambda x: np.asarray(x)[i], pieces)) for i in range(parts)]
  gradients = jax.tree.map(np.zeros_like, outputs)
  for i, (_, part) in enumerate(done):
    for whole, piece in zip(gradients, part):
      whole[i::parts] = piece
  metrics = jax.tree.map(lambda *x: jnp.stack(x), *[metrics for (_, metrics), _ in done])
  summary = objectives.summarise(objectives.combine(metrics))
  return sum(loss for (loss, _), _ in done), summary, gradients


@functools.cache
def _batch(packed=True, variant='grpo'):
  # As many rows as trajectories, so that packed and unpacked compile to one program.
  return example_batch(0, packed=packed, min_rows=12, reads=_make(variant).reads)


every_objective = pytest.mark.parametrize('variant', VARIANTS)


@every_objective
def test_forced_tokens_and_padding_get_exactly_zero_gradient(variant):
  batch, outputs = _batch(variant=variant)
  _, _, gradients = _run(variant, batch, outputs)
  assert np.any(np.asarray(gradients.log_probs) != 0)
  for gradient in gradients:
    np.testing.assert_array_equal(np.asarray(gradient)[~batch.loss_mask], 0)


@every_objective
def test_what_stands_on_forced_tokens_is_not_read(variant):
  batch, outputs = _batch(variant=variant)
  loss, _, gradients = _run(variant, batch, outputs)

  def spoil(x):
    return np.where(batch.loss_mask, x, np.float32(np.nan))

  dirty = batch._replace(**{k: spoil(getattr(batch, k)) for k in (
      'behaviour_log_probs', 'reference_log_probs', 'values')})
  other, metrics, same = _run(variant, dirty, PolicyOutputs(*map(spoil, outputs)))
  np.testing.assert_array_equal(loss, other)
  jax.tree.map(np.testing.assert_array_equal, gradients, same)
  assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize('variant, parts', [
    *((variant, 4) for variant in VARIANTS),
    *((name, 2) for name in algorithms.OBJECTIVES.names())])
def test_micro_batches_give_the_loss_gradient_and_metrics_of_the_whole(variant, parts):
  batch, outputs = _batch(variant=variant)
  whole = _run(variant, batch, outputs)
  split = _run(variant, batch, outputs, parts)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), split, whole)


@every_objective
def test_packed_and_unpacked_rows_agree(variant):
  # The packed rows hold every trajectory and are followed by rows of padding.
  batch, outputs = _batch(variant=variant)
  loose_batch, loose_outputs = _batch(packed=False, variant=variant)
  loss, metrics, gradients = _run(variant, batch, outputs)
  loose, loose_metrics, loose_gradients = _run(variant, loose_batch, loose_outputs)
  np.testing.assert_allclose(loss, loose, rtol=1e-5, atol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, loose_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
  for packed, unpacked in zip(gradients, loose_gradients):
    # Both visit the trajectories in order, token by token.
    np.testing.assert_allclose(np.asarray(packed)[batch.loss_mask],
                               np.asarray(unpacked)[loose_batch.loss_mask], rtol=1e-4, atol=1e-6)


@every_objective
def test_the_compiled_loss_is_the_uncompiled_one(variant):
  made, (batch, outputs) = _make(variant), _batch(variant=variant)
  with jax.numpy_dtype_promotion('strict'):
    loss, _ = made.loss(jax.tree.map(jnp.asarray, outputs),
                        made.prepare(jax.tree.map(jnp.asarray, batch), STEP))
  np.testing.assert_allclose(loss, _run(variant, batch, outputs)[0], rtol=1e-5, atol=1e-6)


def _edge_cases(batch, outputs):
  silent = batch.loss_mask & (batch.trajectory_ids != 3)
  count = batch.rewards.size
  yield 'nothing in the loss', batch._replace(loss_mask=np.zeros_like(silent)), outputs
  yield 'a trajectory without a token', batch._replace(loss_mask=silent), outputs
  yield 'no weight', batch._replace(weights=np.zeros_like(batch.weights)), outputs
  yield 'no baseline', batch._replace(baseline_mask=np.zeros(count, bool)), outputs
  yield 'groups of one', batch._replace(group_ids=np.arange(count, dtype=np.int32)), outputs
  yield 'equal rewards', batch._replace(rewards=np.full(count, .1, np.float32)), outputs
  alone = np.cumsum(batch.loss_mask.reshape(-1)).reshape(silent.shape) == 1
  yield 'one token', batch._replace(loss_mask=batch.loss_mask & alone), outputs
  for move in (-1e4, 1e4):
    yield f'moved by {move}', batch, outputs._replace(log_probs=outputs.log_probs + move)


@every_objective
def test_edge_cases_give_finite_numbers(variant):
  batch, outputs = _batch(variant=variant)
  for case, edge_batch, edge_outputs in _edge_cases(batch, outputs):
    for leaf in jax.tree.leaves(_run(variant, edge_batch, edge_outputs)):
      assert np.all(np.isfinite(leaf)), case


@every_objective
@pytest.mark.parametrize('field', ['loss_mask', 'weights'])
def test_a_batch_without_signal_has_zero_loss_and_gradient(variant, field):
  batch, outputs = _batch(variant=variant)
  empty = batch._replace(**{field: np.zeros_like(getattr(batch, field))})
  loss, _, gradients = _run(variant, empty, outputs)
  assert loss == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


@every_objective
def test_a_trajectory_of_weight_zero_outside_the_baseline_might_as_well_not_be_there(variant):
  batch, outputs = _batch(variant=variant)
  gone = batch.trajectory_ids == 2
  marked = batch._replace(
      weights=np.where(np.arange(batch.weights.size) == 2, np.float32(0), batch.weights),
      baseline_mask=batch.baseline_mask & (np.arange(batch.weights.size) != 2))
  loss, _, gradients = _run(variant, marked, outputs)
  for gradient in gradients:
    np.testing.assert_array_equal(np.asarray(gradient)[gone], 0)
  # Its reward may even be NaN, as when the reward function failed.
  broken = np.where(np.arange(batch.rewards.size) == 2, np.float32(np.nan), batch.rewards)
  np.testing.assert_array_equal(_run(variant, marked._replace(rewards=broken), outputs)[0], loss)
  # Erased: its tokens are padding. Sequences of a row need not have neighbouring numbers.
  erased = marked._replace(
      loss_mask=batch.loss_mask & ~gone, segment_ids=np.where(gone, 0, batch.segment_ids),
      trajectory_ids=np.where(gone, -1, batch.trajectory_ids))
  np.testing.assert_allclose(_run(variant, erased, outputs)[0], loss, rtol=1e-5, atol=1e-6)


@every_objective
def test_the_order_of_rows_is_of_no_account(variant):
  batch, outputs = _batch(variant=variant)
  order = np.random.default_rng(0).permutation(len(batch.tokens))
  shuffled = batch._replace(
      token_parts={k: v[order] for k, v in batch.token_parts.items()},
      **{k: v[order] for k, v in batch._asdict().items() if isinstance(v, np.ndarray) and v.ndim == 2})
  loss, _, _ = _run(variant, batch, outputs)
  other, _, _ = _run(variant, shuffled, PolicyOutputs(*(x[order] for x in outputs)))
  np.testing.assert_allclose(loss, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', algorithms.OBJECTIVES.names())
def test_on_policy_the_gradient_raises_what_was_good_and_lowers_what_was_bad(name):
  batch, outputs = _batch(variant=name)
  advantages = np.sum(_jitted(name)[0](batch, STEP).advantages, axis=1)
  _, _, gradients = _run(name, batch, outputs._replace(log_probs=batch.behaviour_log_probs))
  np.testing.assert_array_equal(np.sign(gradients.log_probs), -np.sign(advantages))
  assert np.any(advantages != 0)


@every_objective
def test_advantages_and_returns_are_zero_outside_the_loss(variant):
  batch, _ = _batch(variant=variant)
  prepared = _jitted(variant)[0](batch, STEP)
  np.testing.assert_array_equal(np.swapaxes(prepared.advantages, 1, 2)[~batch.loss_mask], 0)
  np.testing.assert_array_equal(np.asarray(prepared.returns)[~batch.loss_mask], 0)


@every_objective
def test_what_is_prepared_keeps_shapes_and_types(variant):
  batch, _ = _batch(variant=variant)
  made, prepared = _make(variant), _jitted(variant)[0](batch, STEP)
  rows, length = batch.tokens.shape
  for field, terms in (('advantages', made.channels), ('token_weights', made.channels),
                       ('regulariser_weights', made.regularisers)):
    plane = prepared._asdict()[field]
    assert plane.shape == (rows, len(terms), length) and plane.dtype == np.float32
  for field, dtype in (('tokens', np.int32), ('loss_mask', bool), ('behaviour_log_probs', np.float32),
                       ('returns', np.float32)):
    plane = prepared._asdict()[field]
    assert plane.shape == (rows, length) and plane.dtype == dtype
  assert all(leaf.shape[0] == rows for leaf in jax.tree.leaves(prepared))


def _is_free(variant):
  return all((c.ratio.name == 'token' and c.clip.name in FREE_CLIPS) or
             c.clip.name == 'log_likelihood' for c in _make(variant).channels)


@pytest.mark.parametrize('variant', [v for v in VARIANTS if _is_free(v)])
def test_gradients_are_the_slopes_of_the_loss(variant):
  # Central differences along the gradient's own signs, where the slope is the sum of its sizes.
  batch, outputs = _batch(variant=variant)
  _, _, gradients = _run(variant, batch, outputs)
  for field, gradient in zip(outputs._fields, gradients):
    size = float(np.abs(gradient).sum())
    if size == 0:
      continue
    move = 1e-3 * np.sign(np.asarray(gradient))
    up, down = (_run(variant, batch, outputs._replace(
        **{field: outputs._asdict()[field] + sign * move}))[0] for sign in (1, -1))
    np.testing.assert_allclose((up - down) / 2e-3, size, rtol=.02, atol=1e-3, err_msg=field)


@pytest.mark.parametrize('variant', ['ppo', 'further advantages', 'further maps', 'further clips'])
def test_rows_spread_over_devices_give_the_same(variant):
  batch, outputs = _batch(variant=variant)
  made = _make(variant)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('data',))
  rows = batch.tokens.shape[0]

  def spread(x):
    spec = ('data',) if np.ndim(x) == 2 and np.shape(x)[0] == rows else ()
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

  whole = jax.jit(lambda b, o: jax.value_and_grad(
      lambda p: made.loss(p, made.prepare(b, STEP))[0])(o))
  loss, gradients = whole(*jax.tree.map(spread, (batch, outputs)))
  one_loss, _, one = _run(variant, batch, outputs)
  np.testing.assert_allclose(loss, one_loss, rtol=1e-5, atol=1e-6)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), tuple(gradients),
               tuple(one))
