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
  are faster than many small ones, and both shard along K or F without a gather. Experts are [L, E, D, 2, F] and
  [L, E, F, D].
  """
  n, d, f = config.num_layers, config.width, config.ff_width
  k, g, dh = config.num_kv_heads, config.group_size, config.head_dim
  ups = 2 if config.gated_mlp else 1
  fan_in, out = 1 / math.sqrt(d), 1 / math.sqrt(2 * n)
  neutral = 0.0 if config.offset_norms else None  # of a norm's scale
  layers = {
      'attention_norm': ParamSpec((n, d), ('layers', None), neutral),
      'qkv': ParamSpec((n, d, k, g + 2, dh), ('layers', 'width', 'kv_heads', None, None), fan_in),
      'out': ParamSpec((n, k, g, dh, d), ('layers', 'kv_heads', None, None, 'width'),
                       out / math.sqrt(k * g * dh)),
      'mlp_norm': ParamSpec((n, d), ('layers', None), neutral),
  }
  if config.num_experts:
    layers |= _expert_specs(config, n, d, f, ups, fan_in, out)
  else:
    layers['up'] = ParamSpec((n, d, ups, f), ('layers', 'width', None, 'ff'), fan_in)
    layers['down'] = ParamSpec((n, f, d), ('layers', 'ff', 'width'), out / math.sqrt(f))
  if config.qkv_bias:
    layers['qkv_bias'] = ParamSpec((n, k, g + 2, dh), ('layers', 'kv_heads', None, None), 0.0)
  if config.output_bias:
    layers['out_bias'] = ParamSpec((n, d), ('layers', None), 0.0)
  if config.attention_sinks:
    layers['sinks'] = ParamSpec((n, k, g), ('layers', 'kv_heads', None), 0.0)
  if config.qk_norm:
    layers['query_norm'] = ParamSpec((n, dh), ('layers', None), neutral)
    layers['key_norm'] = ParamSpec((n, dh), ('layers', None), neutral)
  if config.post_norms:
    layers['attention_post_norm'] = ParamSpec((n, d), ('layers', None), neutral)
    layers['mlp_post_norm'] = ParamSpec((n, d), ('layers', None), neutral)
  if config.adapted:
    layers['lora'] = _adapter_specs(config)
  specs = {
      'embedding': ParamSpec((config.vocab_size, d), ('vocab', 'width'), fan_in),
      'final_norm': ParamSpec((d,), (None,), neutral),
      'layers': layers,
  }
  if not config.tied_embeddings:
    specs['head'] = ParamSpec((config.vocab_size, d), ('vocab', 'width'), fan_in)
  if config.value_head:
    width = config.value_width
    specs['value'] = {'weight': ParamSpec((width or d,), (None,), 0.0), 'bias': ParamSpec((), (), 0.0)}
    if width:
      specs['value'] |= {'hidden': ParamSpec((d, width), (None, None), fan_in),
                         'hidden_bias': ParamSpec((width,), (None,), 0.0)}
  return specs


def _expert_specs(config: ModelConfig, n, d, f, ups, fan_in, out) -> Params:
  e = config.num_experts
  specs = {
      'router': ParamSpec((n, d, e), ('layers', None, None), fan_in),
      'expert_up': ParamSpec((n, e, d, ups, f), ('layers', 'experts', 'width', None, 'ff'), fan_in),
      'expert_down': ParamSpec((n, e, f, d), ('layers', 'experts', 'ff', 'width'), out / math.sqrt(f)),
  }
  if config.expert_bias:
    specs['router_bias'] = ParamSpec((n, e), ('layers', None), 0.0)
    specs['expert_up_bias'] = ParamSpec((n, e, ups, f), ('layers', 'experts', None, 'ff'), 0.0)
    specs['expert_down_bias'] = ParamSpec((n, e, d), ('layers', 'experts', None), 0.0)
  return specs


def _adapter_specs(config: ModelConfig) -> Params:
  """Two factors a linear, [L, in, rank] and [L, rank, out]: the second is zero, so that an adapter starts as none."""
  n, r = config.num_layers, config.lora_rank
  specs = {}
  for name in config.adapted:
    inner, outer = linear_shape(config, name)
    specs[name] = {'a': ParamSpec((n, inner, r), ('layers', None, None), 1 / math.sqrt(3 * inner)),
                   'b': ParamSpec((n, r, outer), ('layers', None, None), 0.0)}
  return specs


def linear_shape(config: ModelConfig, name: str) -> tuple[int, int]:
  """Returns the numbers of inputs and outputs of the linear `name`, one of `agentrl.models.config.LINEARS`."""
  queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  d, f = config.width, config.ff_width
  return {'q_proj': (d, queries), 'k_proj': (d, keys), 'v_proj': (d, keys), 'o_proj': (queries, d),
          'gate_proj': (d, f), 'up_proj': (d, f), 'down_proj': (f, d)}[name]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Returns freshly drawn parameters in `param_dtype`; jit it to have them made where they will live."""
  leaves, tree = jax.tree.flatten(param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))
  dtype = jnp.dtype(config.param_dtype)
  keys = jax.random.split(key, len(leaves))
  return tree.unflatten([init_param(spec, k, dtype) for spec, k in zip(leaves, keys)])


def init_param(spec: ParamSpec, key: jax.Array, dtype: Any) -> jax.Array:
  """Returns one freshly drawn parameter."""
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
