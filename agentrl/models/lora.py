"""Low-rank adapters: what is trained of a policy that has them, and merging them into its weights.

A policy has adapters if `ModelConfig.lora_targets` names linears. They are leaves of its parameters, under
params['layers']['lora'], so initialisation, sharding and run checkpoints treat them as any other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agentrl.models.config import ModelConfig
from agentrl.models.params import Params

# What stays trainable beside adapters, since no checkpoint has it.
_NEW = ('value',)


def trained(params: Params) -> Any:
  """Returns a tree like `params`: True for what is trained where there are adapters, those and a value head."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[0].key in _NEW or any(p.key == 'lora' for p in path), params)


def freeze(params: Params) -> Params:
  """Returns the parameters such that only adapters and a value head get gradients."""
  return jax.tree.map(lambda x, learns: x if learns else jax.lax.stop_gradient(x), params, trained(params))


def adapters_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns an optimiser that moves adapters and a value head alone and keeps state for nothing else.

  Without it weight decay would move frozen weights, and Adam would keep moments for them.
  """
  return optax.multi_transform(
      {'train': optimizer, 'freeze': optax.set_to_zero()},
      lambda params: jax.tree.map(lambda learns: 'train' if learns else 'freeze', trained(params)))


def for_policy(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns an optimiser that is `adapters_only` for parameters with adapters, and the given one for others."""
  def of(params):
    has_adapters = 'lora' in params.get('layers', ()) if isinstance(params, dict) else False
    return adapters_only(optimizer) if has_adapters else optimizer

  return optax.GradientTransformation(
      lambda params: of(params).init(params),
      lambda updates, state, params=None: of(params).update(updates, state, params))


def snapshot(params: Params) -> Params:
  """Returns a copy of what training changes of a policy: its adapters, if it has any, else all of it.

  For a reference policy: frozen weights are the same in both, and stay where they are.
  """
  kept = {'layers': {'lora': params['layers']['lora']}} if 'lora' in params['layers'] else params
  return jax.tree.map(lambda x: x.copy(), kept)


def restored(params: Params, kept: Params) -> Params:
  """Returns the policy that `snapshot` was taken of, for log-probs; of two policies only what differs is held twice."""
  if set(kept) != {'layers'}:
    return kept
  return {**params, 'layers': {**params['layers'], **kept['layers']}}


def merge(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
  """Returns the policy without adapters that computes the same: weight + alpha / rank * a @ b.

  The product is added in float32 and rounded to the weight's dtype once.

  Args:
    params: Learner's view.
    config: Of the policy; the one returned has no `lora_targets`.
  """
  layers = dict(params['layers'])
  pairs = layers.pop('lora', {})
  k, g, dh, n = config.num_kv_heads, config.group_size, config.head_dim, config.num_layers

  def add(name, index, shape, pair):
    full = layers[name]
    delta = jnp.einsum('lir,lro->lio', pair['a'].astype(jnp.float32), pair['b'].astype(jnp.float32))
    delta = (delta * (config.lora_alpha / config.lora_rank)).reshape(n, *shape)
    layers[name] = full.at[index].set((full[index].astype(jnp.float32) + delta).astype(full.dtype))

  every, d, f = slice(None), config.width, config.ff_width
  places = {
      'q_proj': ('qkv', (every, every, every, slice(0, g)), (d, k, g, dh)),
      'k_proj': ('qkv', (every, every, every, g), (d, k, dh)),
      'v_proj': ('qkv', (every, every, every, g + 1), (d, k, dh)),
      'o_proj': ('out', (every,), (k, g, dh, d)),
      'gate_proj': ('up', (every, every, 0), (d, f)),
      'up_proj': ('up', (every, every, 1 if config.gated_mlp else 0), (d, f)),
      'down_proj': ('down', (every,), (f, d)),
  }
  for name, pair in pairs.items():
    add(*places[name], pair)
  return {**params, 'layers': layers}, dataclasses.replace(config, lora_targets=())
