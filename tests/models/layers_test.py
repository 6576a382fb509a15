"""Tests of the blocks against numpy written from the papers' formulas, one token at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import layers
from agentrl.models.config import ModelConfig

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


def norm_reference(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def test_rms_norm():
  x, scale = normal(2, 3, 8), normal(8)
  close(layers.rms_norm(x, scale, 0.1), norm_reference(x, scale, 0.1))
  # Twice the input is the same output, but for eps.
  close(layers.rms_norm(2 * x, scale, 0.0), layers.rms_norm(x, scale, 0.0))


def test_rms_norm_keeps_its_input_dtype_and_computes_in_float32():
  x = jnp.full((4,), 300.0, jnp.float16)  # Its square overflows float16.
  out = layers.rms_norm(x, jnp.ones(4), 0.0)
  assert out.dtype == jnp.float16
  close(out, np.ones(4), 1e-3)


def rotate_reference(x, position, theta):
  """Pair (i, i + Dh/2) as a complex number, turned by position * theta^(-2i/Dh)."""
  half = x.shape[-1] // 2
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
      1j * position * theta**(-2 * np.arange(half) / x.shape[-1]))
  return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rotation_turns_pairs_as_complex_numbers():
  x = normal(5, 8)
  cos, sin = layers.rotary_angles(jnp.asarray([0, 1, 2, 7, 100]), 8, 50.0)
  expected = np.stack([rotate_reference(r, p, 50.0) for r, p in zip(x, [0, 1, 2, 7, 100])])
  close(layers.rotate(x, cos, sin), expected)


def test_scores_of_rotated_heads_depend_on_the_distance_alone():
  q, k = normal(8), normal(8)

  def score(a, b):
    cos, sin = layers.rotary_angles(jnp.asarray([a, b]), 8, 100.0)
    return float(layers.rotate(q, cos[0], sin[0]) @ layers.rotate(k, cos[1], sin[1]))

  assert score(3, 1) == pytest.approx(score(45, 43), abs=1e-4)
  assert abs(score(3, 1) - score(3, 2)) > 1e-2


def attend_reference(q, k, v, mask):
  """Loops; q [T, H, Dh], k and v [S, K, Dh], head h reads key head h // (H / K)."""
  out = np.zeros_like(q, np.float64)
  group = q.shape[1] // k.shape[1]
  for t in range(q.shape[0]):
    for h in range(q.shape[1]):
      scores = k[:, h // group] @ q[t, h] / np.sqrt(q.shape[-1])
      weights = np.where(mask[t], np.exp(scores - scores.max()), 0.0)
      out[t, h] = weights @ v[:, h // group] / weights.sum()
  return out


@pytest.mark.parametrize('group', [1, 3])
def test_attention(group):
  b, t, s, kh, dh = 2, 4, 6, 2, 8
  q, k, v = normal(b, t, kh, group, dh), normal(b, s, kh, dh), normal(b, s, kh, dh)
  mask = RNG.random((b, t, s)) < 0.5
  mask[:, :, 0] = True
  got = layers.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask)
  for i in range(b):
    expected = attend_reference(q[i].reshape(t, kh * group, dh), k[i], v[i], mask[i])
    close(got[i].reshape(t, kh * group, dh), expected)


def test_attention_reads_nothing_that_is_masked():
  q, k, v = normal(1, 2, 1, 2, 4), normal(1, 1, 4, 3), normal(1, 1, 3, 4)
  mask = jnp.asarray([[[True, True, False]] * 2])
  before = layers.attend(q, k, v, mask)
  k[..., 2], v[:, :, 2] = 1e6, -1e6
  np.testing.assert_array_equal(before, layers.attend(q, k, v, mask))


@pytest.mark.parametrize('qkv_bias, qk_norm', [(False, False), (True, False), (True, True)])
def test_projection(qkv_bias, qk_norm):
  config = ModelConfig(vocab_size=8, width=12, num_heads=4, num_kv_heads=2, head_dim=6,
                       rope_theta=30.0, norm_eps=1e-3, qkv_bias=qkv_bias, qk_norm=qk_norm)
  layer = {'attention_norm': normal(12), 'qkv': normal(12, 2, 4, 6), 'qkv_bias': normal(2, 4, 6),
           'query_norm': normal(6), 'key_norm': normal(6)}
  x, positions = normal(3, 12), np.asarray([5, 0, 9])
  cos, sin = layers.rotary_angles(jnp.asarray(positions), 6, 30.0)
  q, k, v = layers.project_qkv(layer, x, cos, sin, config)
  for i, position in enumerate(positions):
    h = norm_reference(x[i], layer['attention_norm'], 1e-3)
    for head in range(2):
      bias = layer['qkv_bias'][head] if qkv_bias else np.zeros((4, 6))
      for j in range(4):
        expected = h @ layer['qkv'][:, head, j] + bias[j]
        got = (q[i, head, 0], q[i, head, 1], k[i, head], v[i, head])[j]
        if j < 3:
          if qk_norm:
            name = 'query_norm' if j < 2 else 'key_norm'
            expected = norm_reference(expected, layer[name], 1e-3)
          expected = rotate_reference(expected, position, 30.0)
        close(got, expected, 1e-4)


ACTIVATIONS = {
    'silu': lambda x: x / (1 + np.exp(-x)),
    'gelu': lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    'relu2': lambda x: np.maximum(x, 0)**2,
}


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('activation', list(ACTIVATIONS))
def test_mlp(activation, gated):
  config = ModelConfig(vocab_size=8, width=6, ff_width=10, activation=activation, gated_mlp=gated)
  layer = {'mlp_norm': normal(6), 'up': normal(6, 2 if gated else 1, 10), 'down': normal(10, 6)}
  x = normal(4, 6)
  h = norm_reference(x, layer['mlp_norm'], config.norm_eps)
  act = ACTIVATIONS[activation](h @ layer['up'][:, 0])
  hidden = act * (h @ layer['up'][:, 1]) if gated else act
  close(layers.add_mlp(layer, x, config), x + hidden @ layer['down'], 1e-4)


def test_attention_output_is_added_to_the_residual_stream():
  config = ModelConfig(vocab_size=8)
  layer, x, attended = {'out': normal(2, 3, 4, 5)}, normal(7, 5), normal(7, 2, 3, 4)
  expected = x + np.einsum('tkgd,kgdw->tw', attended, layer['out'])
  close(layers.add_attention(layer, jnp.asarray(x), jnp.asarray(attended), config), expected, 1e-4)
  shape = jax.eval_shape(lambda *a: layers.add_attention(*a, config), layer, x, attended).shape
  assert shape == (7, 5)
