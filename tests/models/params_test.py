"""Tests of the one table of parameters."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, init_params, num_params, param_axes, param_specs
from agentrl.sharding.mesh import LOGICAL_AXES

SHAPE = dict(vocab_size=40, num_layers=3, width=16, ff_width=24, num_heads=4, num_kv_heads=2,
             head_dim=8)
VARIANTS = [
    {}, dict(qkv_bias=True, qk_norm=True), dict(tied_embeddings=False, value_head=True),
    dict(gated_mlp=False, num_kv_heads=4),
]


@pytest.mark.parametrize('variant', VARIANTS)
def test_num_params_counts_the_leaves(variant):
  config = ModelConfig(**{**SHAPE, **variant})
  params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  assert num_params(config) == sum(x.size for x in jax.tree.leaves(params))


def test_num_params_by_hand():
  # Embedding 40 x 16; a layer: norms 2 x 16, q k v 16 x 2 x (2 + 2) x 8, out 32 x 16, gate and up
  # 16 x 2 x 24, down 24 x 16; final norm 16.
  layer = 32 + 1024 + 512 + 768 + 384
  assert num_params(ModelConfig(**SHAPE)) == 640 + 3 * layer + 16
  # Untied head 40 x 16, value head 16 + 1, biases 2 x 4 x 8 and norms 2 x 8 a layer.
  more = ModelConfig(**SHAPE, tied_embeddings=False, value_head=True, qkv_bias=True, qk_norm=True)
  assert num_params(more) == 640 + 3 * (layer + 64 + 16) + 16 + 640 + 17


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_dimension_has_an_axis_name_and_every_name_a_rule(variant):
  config = ModelConfig(**{**SHAPE, **variant})
  specs = jax.tree.leaves(param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))
  for spec in specs:
    assert len(spec.axes) == len(spec.shape)
    # 'layers' alone is never split: the scan walks over it.
    assert all(a is None or a == 'layers' or a in LOGICAL_AXES for a in spec.axes)
  axes = jax.tree.leaves(param_axes(config), is_leaf=lambda x: isinstance(x, tuple))
  assert axes == [s.axes for s in specs]


def test_initial_scales():
  config = ModelConfig(**{**SHAPE, 'width': 64, 'ff_width': 128}, value_head=True, qkv_bias=True,
                       tied_embeddings=False, param_dtype='bfloat16')
  params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'bfloat16'}
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  assert not np.array_equal(params['embedding'], params['head'])
  layers = params['layers']
  np.testing.assert_array_equal(layers['attention_norm'], np.ones((3, 64)))
  np.testing.assert_array_equal(layers['qkv_bias'], np.zeros((3, 2, 4, 8)))
  np.testing.assert_array_equal(params['value']['weight'], np.zeros(64))
  # 1 / sqrt(fan in), and for what is added to the residual stream another 1 / sqrt(2 L).
  # The standard deviation of n normal draws is within 5 / sqrt(2 n) of the true one.
  for leaf, scale in ((params['embedding'], 64**-0.5), (layers['qkv'], 64**-0.5),
                      (layers['out'], 32**-0.5 / math.sqrt(6)),
                      (layers['down'], 128**-0.5 / math.sqrt(6))):
    assert abs(np.std(leaf) / scale - 1) < 5 / math.sqrt(2 * leaf.size)
