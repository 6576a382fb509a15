"""Tests of the learner's view against a numpy transformer that reads one sequence at a time."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs

PLAIN = ModelConfig(vocab_size=30, num_layers=2, width=16, ff_width=24, num_heads=4,
                    num_kv_heads=2, head_dim=8, value_head=True)
RICH = dataclasses.replace(PLAIN, activation='gelu', gated_mlp=False, qkv_bias=True, qk_norm=True,
                           tied_embeddings=False, scale_embeddings=True, value_width=6, value_gradient=False)
RNG = np.random.default_rng(0)


@functools.cache
def params_of(config):
  """Random parameters, biases, norms and value head included, so that none of them is neutral."""
  rng = np.random.default_rng(0)

  def draw(spec):
    shift = 1.0 if spec.scale is None else 0.0
    return (shift + (spec.scale or 0.2) * rng.normal(size=spec.shape)).astype(np.float32)

  return jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


@functools.cache
def jitted(config, temperature=1.0):
  return jax.jit(functools.partial(transformer.evaluate, config=config, temperature=temperature,
                                   with_entropy=True))


def evaluate(config, rows, temperature=1.0):
  """Evaluates at most two rows of sequences, packed one after the other; one shape for all."""
  tokens, positions, segments = (np.zeros((2, 12), np.int32) for _ in range(3))
  for r, row in enumerate(rows):
    at = 0
    for i, s in enumerate(row):
      where = (r, slice(at, at + len(s)))
      tokens[where], positions[where], segments[where] = s, np.arange(len(s)), i + 1
      at += len(s)
  return jitted(config, temperature)(params_of(config), tokens=tokens, positions=positions,
                                     segment_ids=segments)


def norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def turn(x, position, theta):
  half = x.shape[-1] // 2
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(
      1j * position * theta**(-2 * np.arange(half) / x.shape[-1]))
  return np.concatenate([z.real, z.imag], axis=-1)


def reference(config, tokens):
  """Returns the last hidden states [T, D] and logits [T, V] of one sequence, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(config))
  x = p['embedding'][tokens] * (np.sqrt(config.width) if config.scale_embeddings else 1.0)
  g, eps = config.group_size, config.norm_eps
  act = {'silu': lambda y: y / (1 + np.exp(-y)),
         'gelu': lambda y: y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))}
  for i in range(config.num_layers):
    w = {k: v[i] for k, v in p['layers'].items()}
    qkv = np.einsum('td,dkjh->tkjh', norm(x, w['attention_norm'], eps), w['qkv'])
    if config.qkv_bias:
      qkv += w['qkv_bias']
    q, k, v = qkv[:, :, :g], qkv[:, :, g], qkv[:, :, g + 1]
    if config.qk_norm:
      q, k = norm(q, w['query_norm'], eps), norm(k, w['key_norm'], eps)
    q = np.stack([turn(y, t, config.rope_theta) for t, y in enumerate(q)])
    k = np.stack([turn(y, t, config.rope_theta) for t, y in enumerate(k)])
    for t in range(len(tokens)):
      scores = np.exp(np.einsum('kgh,skh->kgs', q[t], k[:t + 1]) / np.sqrt(config.head_dim))
      weights = scores / scores.sum(-1, keepdims=True)
      heads = np.einsum('kgs,skh->kgh', weights, v[:t + 1])
      x[t] += np.einsum('kgh,kghd->d', heads, w['out'])
    up = np.einsum('td,dif->tif', norm(x, w['mlp_norm'], eps), w['up'])
    f = act[config.activation]
    x = x + (f(up[:, 0]) * up[:, 1] if config.gated_mlp else f(up[:, 0])) @ w['down']
  x = norm(x, p['final_norm'], eps)
  return x, x @ p.get('head', p['embedding']).T


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('config, temperature', [(PLAIN, 1.0), (RICH, 0.7)], ids=['plain', 'rich'])
def test_matches_a_numpy_transformer(config, temperature):
  tokens = RNG.integers(0, 30, 9)
  got = evaluate(config, [[tokens]], temperature)
  hidden, logits = reference(config, tokens)
  log_probs = log_softmax(logits / temperature)
  # Token t was drawn from what position t - 1 predicts, in the state at t - 1; the first from none.
  expected = np.r_[0.0, log_probs[np.arange(8), tokens[1:]]]
  np.testing.assert_allclose(got.log_probs[0, :9], expected, atol=2e-5)
  entropies = -(np.exp(log_probs) * log_probs).sum(-1)
  np.testing.assert_allclose(got.entropies[0, :9], np.r_[0.0, entropies[:-1]], atol=2e-5)
  head = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(config)['value'])
  states = np.maximum(hidden @ head['hidden'] + head['hidden_bias'], 0) if config.value_width else hidden
  values = states @ head['weight'] + head['bias']
  np.testing.assert_allclose(got.values[0, :9], np.r_[0.0, values[:-1]], atol=2e-5)


def test_packed_equals_unpacked():
  a, b, c = (RNG.integers(0, 30, n) for n in (5, 3, 7))
  packed = evaluate(RICH, [[a, b], [c]], 0.7)
  for (row, at), s in zip(((0, 0), (0, 5), (1, 0)), (a, b, c)):
    alone = evaluate(RICH, [[s]], 0.7)
    for field in ('log_probs', 'entropies', 'values'):
      np.testing.assert_allclose(getattr(packed, field)[row, at:at + len(s)],
                                 getattr(alone, field)[0, :len(s)], atol=1e-5)


@pytest.mark.parametrize('config', [PLAIN, RICH], ids=['plain', 'rich'])
def test_a_values_gradient_stops_above_the_layers_if_asked_to(config):
  tokens, positions = np.ones((1, 4), np.int32), np.arange(4, dtype=np.int32)[None]
  gradient = jax.grad(lambda p: jnp.sum(transformer.evaluate(p, config, tokens, positions, tokens).values))(
      params_of(config))
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient.pop('value')))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient)) == config.value_gradient


def test_a_value_does_not_see_its_token_nor_what_follows():
  a = RNG.integers(0, 30, 8)
  b = a.copy()
  b[5:] = (b[5:] + 1) % 30
  one, other = evaluate(PLAIN, [[a]]), evaluate(PLAIN, [[b]])
  np.testing.assert_array_equal(one.values[0, :6], other.values[0, :6])
  assert abs(float(one.values[0, 6] - other.values[0, 6])) > 1e-4


def test_without_value_head_or_entropy_there_are_none():
  config = dataclasses.replace(PLAIN, value_head=False)
  tokens = jnp.ones((1, 3), jnp.int32)
  got = jax.eval_shape(lambda p: transformer.evaluate(p, config, tokens, tokens, tokens),
                       params_of(config))
  assert got.log_probs.shape == (1, 3)
  assert got.values is None and got.entropies is None


def loss(params, config, tokens, positions, segments):
  got = transformer.evaluate(params, config, tokens, positions, segments, with_entropy=True)
  return jnp.sum(got.log_probs * (1 + positions)) + jnp.sum(got.entropies) + jnp.sum(got.values)


def loss_and_gradients(config):
  tokens = np.random.default_rng(1).integers(0, 30, (2, 12))
  positions = np.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], range(12)], np.int32)
  segments = np.asarray([[1] * 5 + [2] * 7, [1] * 12], np.int32)
  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  return jax.device_get(grad(params_of(config), config, tokens, positions, segments))


def test_scan_remat_and_logit_chunks_change_neither_values_nor_gradients():
  plain = loss_and_gradients(PLAIN)
  settings = dict(unroll_layers=False, remat=True, logit_chunk=4)
  other = loss_and_gradients(dataclasses.replace(PLAIN, **settings))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), plain, other)
  # No parameter is left out of the comparison.
  assert min(np.abs(x).max() for x in jax.tree.leaves(plain[1])) > 1e-3


def test_a_chunk_that_does_not_divide_the_batch_is_refused_with_the_numbers():
  config = dataclasses.replace(PLAIN, logit_chunk=5)
  tokens = jnp.ones((2, 6), jnp.int32)
  with pytest.raises(ValueError, match='logit_chunk=5 .* 2 x 6 = 12'):
    jax.eval_shape(lambda p: transformer.evaluate(p, config, tokens, tokens, tokens),
                   params_of(PLAIN))


def test_log_probs_are_float32_in_bfloat16_policies():
  config = dataclasses.replace(PLAIN, compute_dtype='bfloat16')
  tokens = RNG.integers(0, 30, 9)
  got, exact = evaluate(config, [[tokens]]), evaluate(PLAIN, [[tokens]])
  assert got.log_probs.dtype == jnp.float32
  # Eight bits of mantissa over two layers; a wrong token would be off by about 1 nat.
  np.testing.assert_allclose(got.log_probs[0, :9], exact.log_probs[0, :9], atol=0.15)
