"""One table of a policy's parameters: their shapes, logical axes and initialisation.

Everything that must know the parameters (initialisation, sharding, counting, checkpoint checks,
conversion) derives from `param_specs`, so they cannot disagree.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agentrl.models.config import ModelConfig

Params = dict[str, Any]


class ParamSpec(NamedTuple):
  """A parameter before it exists.

  Attributes:
    shape: Its shape; layer parameters lead with L.
    axes: A logical axis name for each dimension; None for one that is never sharded.
    scale: Standard deviation of its normal initialisation; 0 for zeros, None for ones.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  scale: float | None


def param_specs(config: ModelConfig) -> Params:
  """Returns the tree of `ParamSpec`s of a policy.

  The query, key and value projections are one tensor [L, D, K, H/K + 2, Dh], grouped by key/value head: the last
  two of the H/K + 2 are the key and the value. Gate and up projection are one [L, D, 2, F]. Few large products
  are faster than many small ones, and both shard along K or F without a gather.
  """
  n, d, f = config.num_layers, config.width, config.ff_width
  k, g, dh = config.num_kv_heads, config.group_size, config.head_dim
  ups = 2 if config.gated_mlp else 1
  fan_in, out = 1 / math.sqrt(d), 1 / math.sqrt(2 * n)
  layers = {
      'attention_norm': ParamSpec((n, d), ('layers', None), None),
      'qkv': ParamSpec((n, d, k, g + 2, dh), ('layers', 'width', 'kv_heads', None, None), fan_in),
      'out': ParamSpec((n, k, g, dh, d), ('layers', 'kv_heads', None, None, 'width'),
                       out / math.sqrt(k * g * dh)),
      'mlp_norm': ParamSpec((n, d), ('layers', None), None),
      'up': ParamSpec((n, d, ups, f), ('layers', 'width', None, 'ff'), fan_in),
      'down': ParamSpec((n, f, d), ('layers', 'ff', 'width'), out / math.sqrt(f)),
  }
  if config.qkv_bias:
    layers['qkv_bias'] = ParamSpec((n, k, g + 2, dh), ('layers', 'kv_heads', None, None), 0.0)
  if config.qk_norm:
    layers['query_norm'] = ParamSpec((n, dh), ('layers', None), None)
    layers['key_norm'] = ParamSpec((n, dh), ('layers', None), None)
  specs = {
      'embedding': ParamSpec((config.vocab_size, d), ('vocab', 'width'), fan_in),
      'final_norm': ParamSpec((d,), (None,), None),
      'layers': layers,
  }
  if not config.tied_embeddings:
    specs['head'] = ParamSpec((config.vocab_size, d), ('vocab', 'width'), fan_in)
  if config.value_head:
    specs['value'] = {'weight': ParamSpec((d,), (None,), 0.0), 'bias': ParamSpec((), (), 0.0)}
  return specs


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Returns freshly drawn parameters in `param_dtype`; jit it to have them made where they will live."""
  leaves, tree = jax.tree.flatten(param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))
  dtype = jnp.dtype(config.param_dtype)
  keys = jax.random.split(key, len(leaves))
  return tree.unflatten([_draw(spec, k, dtype) for spec, k in zip(leaves, keys)])


def _draw(spec: ParamSpec, key: jax.Array, dtype) -> jax.Array:
  if spec.scale is None:
    return jnp.ones(spec.shape, dtype)
  if spec.scale == 0.0:
    return jnp.zeros(spec.shape, dtype)
  return (spec.scale * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)


def param_axes(config: ModelConfig) -> Params:
  """Returns the tree of logical axis names, one tuple a parameter."""
  return jax.tree.map(lambda s: s.axes, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


def num_params(config: ModelConfig) -> int:
  """Returns the number of scalars in a policy's parameters."""
  specs = jax.tree.leaves(param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))
  return sum(math.prod(s.shape) for s in specs)
