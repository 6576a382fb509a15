"""Each implementation of attention against the plain one: where it cannot run, in interpret mode or by its twin."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import attention, layers, transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params
from agentrl.sharding import mesh as meshes

B, T, K, G, DH = 2, 256, 2, 2, 64
CONFIG = ModelConfig(vocab_size=30, num_layers=2, width=16, ff_width=24, num_heads=4, num_kv_heads=2, head_dim=DH,
                     compute_dtype='bfloat16')


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  # Boundaries within a block of the kernel, on one, and padding (segment 0) at the end of the second row.
  segments = np.asarray([[1] * 100 + [2] * 156, [1] * 128 + [2] * 96 + [0] * 32], np.int32)
  return draw(B, T, K, G, DH), draw(B, T, K, DH), draw(B, T, K, DH), segments, draw(K, G)


def causal(segments):
  return (segments[:, :, None] == segments[:, None, :]) & np.tri(T, dtype=bool)[None]


def plain(q, k, v, segments, sinks, window, scale=0.0):
  distances = jnp.arange(T)[:, None] - jnp.arange(T)[None]
  mask = causal(segments)
  mask = mask & (distances < window)[None] if window else mask
  return layers.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, scale=scale, sinks=sinks)


def with_gradients(attend, with_sinks, mesh=None):
  """Returns what attention gives and the gradients of all it reads, by way of a sum that weighs every entry."""
  q, k, v, segments, sinks = inputs() if mesh is None else jax.device_put(inputs(), meshes.replicated(mesh))
  weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

  def total(q, k, v, sinks):
    out = attend(q, k, v, segments, sinks if with_sinks else None)
    return jnp.sum(out * weights), out

  (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
  return out, grads


@pytest.mark.parametrize('window, with_sinks', [(0, False), (70, True)], ids=['causal', 'window and sinks'])
def test_splash_equals_the_plain_one(window, with_sinks):
  want = with_gradients(lambda *x: plain(*x, window), with_sinks)
  got = with_gradients(
      lambda q, k, v, ids, sinks: attention.splash(q, k, v, ids, window=window, sinks=sinks, interpret=True), with_sinks)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)
  assert np.abs(want[1][3]).max() > 1e-3 or not with_sinks  # a gradient of sinks is compared at all


def test_splash_on_a_mesh_gives_each_device_its_rows_and_heads():
  mesh = meshes.make_mesh(dict(data=2, tensor=2), jax.devices()[:4])
  attend = meshes.under(mesh, lambda q, k, v, ids, sinks: attention.splash(
      q, k, v, ids, scale=0.3, sinks=sinks, interpret=True))
  got, want = with_gradients(attend, True, mesh), with_gradients(lambda *x: plain(*x, 0, 0.3), True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)


# A whole segment, two that go on from its first 30 and 3 tokens; another whole one, one that goes on from it; padding.
PIECES = [(0, 40), (30, 20), (3, 50), (0, 10), (9, 100), None]


def pieces():
  """Returns positions, segment ids and, told one by one, which tokens each may look at."""
  positions, ids, mask = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32), np.zeros((1, T, T), bool)
  at = whole = 0
  for number, piece in enumerate(PIECES, 1):
    start, count = piece or (0, T - at)
    whole = whole if start else at
    if piece:
      positions[0, at:at + count], ids[0, at:at + count] = np.arange(start, start + count), number
    for i in range(at, at + count):
      mask[0, i, at:i + 1] = True
      mask[0, i, whole:whole + start] = True
    at += count
  return positions, ids, mask


def test_a_segment_sees_itself_and_what_it_goes_on_from():
  positions, ids, mask = pieces()
  np.testing.assert_array_equal(attention.visible(jnp.asarray(positions), jnp.asarray(ids)), mask)


def test_a_first_segment_that_starts_late_goes_on_from_nothing():
  ids = jnp.ones((1, 4), jnp.int32)
  np.testing.assert_array_equal(attention.visible(7 + jnp.arange(4)[None], ids)[0], np.tri(4, dtype=bool))


@pytest.mark.parametrize('window', [0, 20])
def test_windows_reach_back_by_positions_where_segments_go_on_from_others(window):
  config = dataclasses.replace(CONFIG, compute_dtype='float32', windows=(window, 0), head_dim=8)
  params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
  positions, ids, _ = pieces()
  tokens = np.random.default_rng(0).integers(0, 30, (1, T)).astype(np.int32)
  hidden = jax.jit(functools.partial(transformer.hidden_states, config=config))
  got = hidden(params, tokens=tokens, positions=positions, segment_ids=ids)[0]
  edges = np.cumsum([0] + [count for _, count in PIECES[:-1]])
  for (start, count), at, whole in zip(PIECES, edges, (0, 0, 0, edges[3], edges[3])):
    own = np.zeros((1, T), np.int32)
    own[0, :start], own[0, start:start + count] = tokens[0, whole:whole + start], tokens[0, at:at + count]
    want = hidden(params, tokens=own, positions=np.arange(T, dtype=np.int32)[None], segment_ids=np.ones((1, T), np.int32))
    np.testing.assert_allclose(got[at:at + count], want[0, start:start + count], atol=1e-5)


@pytest.mark.parametrize('platform, change, want', [
    ('cpu', {}, True), ('cpu', dict(windows=(32, 32)), True), ('tpu', {}, False), ('tpu', dict(head_dim=80), True), ('gpu', {}, True),
    ('gpu', dict(windows=(32, 32)), False), ('gpu', dict(windows=(32, 32), head_dim=256), True)])
def test_where_rows_may_share_what_sequences_begin_with(platform, change, want):
  assert attention.shares(dataclasses.replace(CONFIG, **change), 1_024, platform) == want


@pytest.mark.parametrize('length', [100, 128, 300])
def test_parts_of_a_row_see_what_the_whole_of_it_would(length):
  q, k, v, segments, sinks = inputs()
  longer = lambda x: jnp.concatenate([x, x], axis=1)[:, :length]
  q, k, v, segments = longer(q), longer(k), longer(v), longer(segments)
  mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)[None]
  want = layers.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, sinks=sinks)
  np.testing.assert_allclose(attention.plain(q, k, v, mask, sinks=sinks), want, atol=1e-5)


@pytest.mark.parametrize('window', [0, 70])
def test_what_cudnn_is_asked_for_is_the_same(window):
  q, k, v, segments, _ = inputs()
  got = attention.cudnn(q, k, v, causal(segments), window=window, scale=0.2, implementation='xla')
  np.testing.assert_allclose(got, plain(q, k, v, segments, None, window, 0.2), atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN needs an NVIDIA GPU')
@pytest.mark.parametrize('window', [0, 70])
def test_cudnn_equals_the_plain_one(window):
  half = lambda x: x.astype(jnp.bfloat16)
  q, k, v, segments, _ = inputs()
  got = attention.cudnn(half(q), half(k), half(v), causal(segments), window=window)
  np.testing.assert_allclose(got.astype(jnp.float32), plain(q, k, v, segments, None, window), atol=0.05)


@pytest.mark.parametrize('platform, change, length, want', [
    ('cpu', {}, 1_024, 'xla'),
    ('tpu', {}, 1_024, 'splash'),
    ('gpu', {}, 1_024, 'cudnn'),
    ('tpu', dict(attention='xla'), 1_024, 'xla'),
    ('tpu', dict(attention_sinks=True), 1_024, 'splash'),
    ('gpu', dict(attention_sinks=True), 1_024, 'xla'),
    ('tpu', dict(head_dim=80), 1_024, 'xla'),
    ('tpu', {}, 1_000, 'xla'),
    ('gpu', dict(compute_dtype='float32'), 1_024, 'xla'),
    ('gpu', dict(head_dim=256), 1_024, 'xla'),
    ('cpu', dict(attention='splash'), 1_024, 'splash'),
])
def test_the_platform_decides_unless_the_config_or_a_shape_does(platform, change, length, want):
  assert attention.choose(dataclasses.replace(CONFIG, **change), length, platform) == want


def test_giving_way_is_said_in_the_log(caplog):
  attention._say.cache_clear()
  with caplog.at_level('WARNING'):
    attention.choose(dataclasses.replace(CONFIG, attention_sinks=True), 512, 'gpu')
  assert 'cuDNN has no attention sinks' in caplog.text


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="attention='flash' is unknown; known: auto, xla, cudnn, splash"):
    dataclasses.replace(CONFIG, attention='flash')
