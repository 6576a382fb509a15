"""Each implementation of attention against the plain one: where it cannot run, in interpret mode or by its twin."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import attention, layers
from agentrl.models.config import ModelConfig
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


def plain(q, k, v, segments, sinks, window, scale=0.0):
  distances = jnp.arange(T)[:, None] - jnp.arange(T)[None]
  mask = (segments[:, :, None] == segments[:, None, :]) & (distances >= 0)[None]
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


@pytest.mark.parametrize('window', [0, 70])
def test_what_cudnn_is_asked_for_is_the_same(window):
  q, k, v, segments, _ = inputs()
  got = attention.cudnn(q, k, v, segments, window=window, scale=0.2, implementation='xla')
  np.testing.assert_allclose(got, plain(q, k, v, segments, None, window, 0.2), atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN needs an NVIDIA GPU')
@pytest.mark.parametrize('window', [0, 70])
def test_cudnn_equals_the_plain_one(window):
  half = lambda x: x.astype(jnp.bfloat16)
  q, k, v, segments, _ = inputs()
  got = attention.cudnn(half(q), half(k), half(v), segments, window=window)
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
