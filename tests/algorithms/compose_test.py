"""Objectives spelled out choice by choice: equal to those of the factories, and refused where they make no sense."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from agentrl import algorithms
from agentrl.algorithms import choices
from agentrl.algorithms.channel import Advantage, Estimate
from agentrl.algorithms.examples import example_batch


def _loss(made, batch, outputs, step=0):
  loss, metrics = jax.jit(lambda b, o, s: made.loss(o, made.prepare(b, s)))(batch, outputs, step)
  return float(loss), metrics


def test_a_config_of_defaults_is_grpo():
  batch, outputs = example_batch()
  assert _loss(algorithms.make('compose'), batch, outputs)[0] == _loss(algorithms.make('grpo'), batch, outputs)[0]


def test_a_spelled_out_objective_is_the_factorys():
  batch, outputs = example_batch()
  spelled = algorithms.make('compose', channels={'policy': {
      'advantage': {'name': 'gae', 'lam': .9}, 'clip': {'name': 'asym', 'high': .3}}},
                            regularisers={'value': {'coef': .5, 'clip': .5}, 'kl': .1, 'entropy': {'coef': .01}})
  made = algorithms.make('ppo', lam=.9, clip_high=.3, kl_coef=.1, entropy_coef=.01)
  np.testing.assert_allclose(_loss(spelled, batch, outputs)[0], _loss(made, batch, outputs)[0], rtol=1e-6)


def test_channels_add_up_with_their_weights():
  batch, outputs = example_batch(reads=['accuracy', 'economy'])
  of = lambda part: {'advantage': {'name': 'center', 'part': part}}
  alone = [_loss(algorithms.make('compose', channels={'policy': of(part)}), batch, outputs)[0]
           for part in ('accuracy', 'economy')]
  both = algorithms.make('compose', channels={'accuracy': of('accuracy'), 'economy': {**of('economy'), 'weight': .15}})
  assert both.reads == ('accuracy', 'economy')
  np.testing.assert_allclose(_loss(both, batch, outputs)[0], alone[0] + .15 * alone[1], rtol=1e-6)


def test_a_sum_of_advantages_is_the_sum():
  batch, _ = example_batch(reads=['economy'])
  terms = {'outcome': {'name': 'z'}, 'economy': {'name': 'center', 'part': 'economy', 'weight': .5}}
  made = algorithms.make('compose', channels={'policy': {'advantage': {'name': 'sum', 'terms': terms}}})
  single = [algorithms.make('compose', channels={'policy': {'advantage': a}}).estimate(batch).advantages
            for a in ('z', {'name': 'center', 'part': 'economy'})]
  np.testing.assert_allclose(made.estimate(batch).advantages, single[0] + .5 * single[1], rtol=1e-6)


def _with(number):
  """Returns an objective with many numbers `number(start, end)`: each channel and regulariser has one or two."""
  n = number
  channels = {
      'weight': {'weight': n(1., 2.)},
      'bounds': {'clip': {'name': 'asym', 'high': n(.2, .4), 'low': n(.2, .5), 'dual': n(2., 3.)}},
      'discounts': {'advantage': {'name': 'gae', 'gamma': n(1., .5), 'lam': n(.9, .5)}},
      'to_go': {'advantage': {'name': 'reward_to_go', 'kl_in_reward': n(0., .2)}},
      'rloo': {'advantage': {'name': 'rloo', 'kl_in_reward': n(0., .2)}},
      'suffix': {'advantage': {'name': 'suffix_sum', 'turn_part': 's', 'alpha': n(.2, 0.)}},
      'terms': {'advantage': {'name': 'sum', 'terms': {
          'a': {'name': 'z', 'weight': n(1., 0.)}, 'b': {'name': 'disc_segment_return', 'gamma': n(1., .5)}}}},
      'map': {'maps': {'name': 'entropy_scale', 'weight': n(0., 1.)}},
      'count': {'maps': {'name': 'clip_cov', 'ratio': n(.1, .3), 'low': .01}},
      'filter': {'filters': {'name': 'abs_adv', 'least': n(0., 1.)}}}
  regularisers = {'kl': n(0., .2), 'llds': {'coef': .2, 'answer': n(0., 1.), 'channel': 'weight'},
                  'value': {'coef': .5, 'clip': n(.2, .6)}}
  return algorithms.make('compose', channels=channels, regularisers=regularisers)


@pytest.mark.usefixtures('quick_compile')
def test_any_number_may_be_a_schedule():
  moving = _with(lambda start, end: {'schedule': 'linear', 'start': start, 'end': end, 'steps': 2})
  assert moving.needs_reference
  batch, outputs = example_batch(reads=('s', *moving.reads))
  run = lambda made: jax.jit(lambda s: made.loss(outputs, made.prepare(jax.tree.map(jax.numpy.asarray, batch), s))[1].sums)
  found, seen = run(moving), {}
  for step, share in ((0, 0.), (1, .5), (2, 1.)):
    at, want = found(step), run(_with(lambda start, end, p=share: start + (end - start) * p))(step)
    for name in (*(c.name for c in moving.channels), 'llds', 'value'):
      np.testing.assert_allclose(at[f'loss/{name}'][0], want[f'loss/{name}'][0], rtol=1e-5, atol=1e-7, err_msg=name)
      seen.setdefault(name, set()).add(float(at[f'loss/{name}'][0]))
  # It is the numbers that move.
  assert all(len(values) > 1 for values in seen.values()), seen


def test_a_constant_of_an_aggregation_is_no_schedule():
  with pytest.raises(ValueError, match="'sum_over_constant' cannot go with a schedule"):
    algorithms.make('compose', aggregation={'name': 'sum_over_constant', 'max_tokens': {
        'schedule': 'linear', 'start': 1, 'end': 2, 'steps': 2}})


def test_maps_rows_and_filters_act_where_they_say():
  batch, outputs = example_batch()
  first = np.arange(batch.rewards.size) < 4

  @choices.MAPS.register('twice_for_test')
  def twice(batch, advantages, loss_mask, *, factor=2.0):
    del batch, loss_mask
    return factor * advantages

  @choices.ROWS.register('first_group_for_test')
  def rows(batch):
    return first.astype(np.float32)

  @choices.FILTERS.register('good_for_test')
  def good(batch, advantages):
    best = jax.ops.segment_max(advantages.reshape(-1), np.maximum(batch.trajectory_ids, 0).reshape(-1), first.size)
    return (best > 0).astype(np.float32)

  made = lambda **parts: algorithms.make('compose', channels={'policy': parts}).prepare(batch)
  plain = made()
  np.testing.assert_allclose(made(maps='twice_for_test').advantages, 2 * plain.advantages)
  np.testing.assert_allclose(made(maps=({'name': 'twice_for_test', 'factor': 3.}, 'twice_for_test')).advantages,
                             6 * plain.advantages, rtol=1e-6)
  in_first = np.where(batch.trajectory_ids >= 0, first[batch.trajectory_ids], False)
  chosen = made(rows='first_group_for_test')
  np.testing.assert_array_equal(np.asarray(chosen.advantages)[:, 0][~in_first], 0)
  # A token mean over what is left.
  kept = np.asarray(chosen.token_weights)[:, 0]
  np.testing.assert_allclose(kept, (in_first & batch.loss_mask) / (in_first & batch.loss_mask).sum(), rtol=1e-6)
  filtered = made(filters='good_for_test')
  np.testing.assert_array_equal(filtered.advantages, plain.advantages)
  positive = batch.loss_mask & (np.asarray(plain.advantages)[:, 0] > 0)
  np.testing.assert_allclose(np.asarray(filtered.token_weights)[:, 0], positive / positive.sum(), rtol=1e-6)


@pytest.mark.parametrize('options, message', [
    ({'channels': {'policy': {'advantge': 'z'}}}, "channel 'policy'.*advantge"),
    ({'channels': {'policy': {'advantage': 'zz'}}}, "unknown advantage 'zz'.*Known:.*center"),
    ({'channels': {'policy': {'advantage': {'ddof': 1}}}}, 'needs a name'),
    ({'channels': {'policy': {'advantage': {'name': 'z', 'dof': 1}}}}, "cannot go with option 'dof'"),
    ({'channels': {'policy': {'ratio': 'off'}}}, "ratio 'off' .* cannot go with clip 'asym'"),
    ({'regularisers': {'kl': -1.}}, 'kl_coef=-1.0'),
    ({'regularisers': {'value': .5}}, "regulariser 'value' needs returns.*take advantage 'gae'"),
    ({'aggregation': 'sum_over_constant'}, 'cannot go without max_tokens'),
    ({'channels': {'a': {}, 'b': {}}, 'regularisers': {'llds': .2}}, "'llds'.*channel=None where there are a, b; name one"),
    ({'regularisers': {'llds': {'coef': .2, 'channel': 'other'}}}, "'llds'.*channel='other' where there are policy"),
])
def test_what_cannot_go_together_is_refused(options, message):
  with pytest.raises((ValueError, LookupError), match=message):
    algorithms.make('compose', **options)


def test_a_part_is_read_where_an_option_names_it():
  @choices.ADVANTAGES.register('two_parts_for_test')
  def two(*, part: str = 'total', turn_part: str = 'progress') -> Advantage:
    del part, turn_part
    return Advantage('two_parts_for_test', lambda batch, mask: Estimate(batch.rewards))

  assert choices.advantage('two_parts_for_test').reads == ('progress',)
  assert choices.advantage('two_parts_for_test', part='a', turn_part='b').reads == ('a', 'b')
  assert choices.advantage('z').reads == ()
