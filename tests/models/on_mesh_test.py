"""What is written for each device of a mesh (embedding, experts, log-probs) against the policy on one device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, param_axes
from agentrl.sharding import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compile')

ROWS, T, KNOWN = 8, 16, 61
DENSE = ModelConfig(vocab_size=64, num_layers=2, width=32, ff_width=48, num_heads=4, num_kv_heads=2, head_dim=8,
                    qk_norm=True, tied_embeddings=False, known_tokens=KNOWN, unroll_layers=False, remat=True,
                    logit_chunk=8, value_head=True)
EXPERTS = dataclasses.replace(DENSE, num_experts=4, experts_per_token=2, expert_bias=True, tied_embeddings=True,
                              activation='clamped_swiglu', windows=(5, 0), logit_chunk=0)
ADAPTED = dataclasses.replace(DENSE, lora_targets=('*_proj',), gated_mlp=False, activation='relu2')
POLICIES = {'dense': DENSE, 'experts': EXPERTS, 'adapted': ADAPTED}


def batch():
  tokens = np.random.default_rng(0).integers(0, KNOWN, (ROWS, T)).astype(np.int32)
  positions = np.tile(np.r_[0:6, 0:10], (ROWS, 1)).astype(np.int32)
  return tokens, positions, np.tile([1] * 6 + [2] * 10, (ROWS, 1)).astype(np.int32)


@functools.cache
def params_of(name):
  params = jax.jit(functools.partial(init_params, POLICIES[name]))(jax.random.key(0))
  # Neither biases nor adapters nor a value head are left at the zeros they start from.
  return jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def loss_and_gradients(name, mesh=None):
  config, params = POLICIES[name], params_of(name)
  if mesh is not None:
    params = jax.device_put(params, meshes.shardings(param_axes(config), params, mesh))
  tokens, positions, segments = batch()

  def loss(params):
    got = meshes.under(mesh, transformer.evaluate)(params, config, tokens, positions, segments, temperature=0.8,
                                                   with_entropy=True)
    return jnp.sum(got.log_probs * (1 + positions)) / 100 + jnp.sum(got.entropies) / 100 + jnp.sum(got.values)

  return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@functools.cache
def on_one_device(name):
  return loss_and_gradients(name)


@pytest.mark.parametrize('name, shape', [
    ('dense', dict(fsdp=8)),
    ('dense', dict(data=2, fsdp=2, tensor=2)),
    ('experts', dict(fsdp=2, tensor=2, expert=2)),
    ('experts', dict(tensor=2, expert=4)),
    ('adapted', dict(fsdp=4, tensor=2)),
], ids=str)
def test_a_mesh_changes_neither_the_loss_nor_a_gradient(name, shape):
  want, got = on_one_device(name), loss_and_gradients(name, meshes.make_mesh(shape))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want[1]), jax.tree.leaves(got[1])):
    np.testing.assert_allclose(b, a, atol=2e-5 * max(1.0, np.abs(a).max()), err_msg=jax.tree_util.keystr(path))


def test_a_chunk_that_does_not_divide_the_tokens_of_a_device_is_refused_with_the_numbers():
  mesh = meshes.make_mesh(dict(fsdp=8))
  config = dataclasses.replace(DENSE, logit_chunk=5)
  with pytest.raises(ValueError, match='logit_chunk=5 .* 1 x 16 = 16 tokens of a device'):
    jax.eval_shape(lambda p: meshes.under(mesh, transformer.evaluate)(p, config, *batch()), params_of('dense'))
