"""A mixture of experts in place of an MLP: each token goes through its best few, and no token is dropped.

On a mesh every device computes the experts, and the columns of them, that it holds: tokens come to it from the devices
that share those axes with it, and its part of the sum goes back.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from agentrl.models import grouped
from agentrl.models.activations import activate
from agentrl.models.config import ModelConfig
from agentrl.sharding import mesh as meshes


class Weights(NamedTuple):
  """What a device holds of a layer's experts: e of all E, f of their F columns.

  Attributes:
    up: [e, D, 2, f], or [e, D, 1, f] without gates.
    down: [e, f, D].
    up_bias: [e, 2, f]; None without biases.
    down_bias: [e, D]; None without biases.
  """

  up: jax.Array
  down: jax.Array
  up_bias: jax.Array | None
  down_bias: jax.Array | None


_AXES = Weights(('experts', 'width', None, 'ff'), ('experts', 'ff', 'width'), ('experts', None, 'ff'),
                ('experts', None))


def experts(layer: dict[str, Any], h: jax.Array, config: ModelConfig,
            axes: Sequence[str | None] = ('batch', 'length')) -> jax.Array:
  """Returns the weighted sum of each token's best experts, [..., D].

  Args:
    layer: One layer's parameters.
    h: [..., D] normalised inputs.
    config: Of the policy.
    axes: Logical axes of h but the last.
  Source: Shazeer et al., arXiv 1701.06538.
  """
  weights = Weights(*(layer.get(f'expert_{name}') for name in Weights._fields))
  router, bias = layer['router'], layer.get('router_bias')
  if meshes.current() is None:
    shares, chosen = route(h.reshape(-1, h.shape[-1]), router, bias, config)
    return mixture(h.reshape(-1, h.shape[-1]), shares, chosen, weights, config).reshape(h.shape)
  tokens = meshes.local_spec((*axes, None), h.shape)
  split = Weights(*(None if w is None else meshes.local_spec(a, w.shape) for w, a in zip(weights, _AXES)))
  whole = jax.sharding.PartitionSpec()
  local = jax.shard_map(functools.partial(_on_a_device, config=config, tokens=tokens, split=split),
                        in_specs=(tokens, whole, None if bias is None else whole, split), out_specs=tokens,
                        check_vma=False)
  return local(h, router, bias, weights)


def route(flat: jax.Array, router: jax.Array, bias: jax.Array | None,
          config: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Returns each token's best k experts, [n, k] int32, after their shares, [n, k] float32.

  Args:
    flat: [n, D].
    router: [D, E].
    bias: [E], or None.
    config: Of the policy.
  """
  scores = jnp.matmul(flat, router.astype(flat.dtype), preferred_element_type=jnp.float32)
  if bias is not None:
    scores += bias.astype(jnp.float32)[None]
  best, chosen = jax.lax.top_k(scores, config.experts_per_token)
  return jnp.exp(best - jax.nn.logsumexp(best if config.normalise_experts else scores, axis=-1, keepdims=True)), chosen


def mixture(flat: jax.Array, shares: jax.Array, chosen: jax.Array, weights: Weights, config: ModelConfig,
            first: int | jax.Array = 0) -> jax.Array:
  """Returns what the experts first, first + 1, ... add to each token, [n, D].

  Tokens are sorted by expert, so that each expert is one stretch of one grouped product.

  Args:
    flat: [n, D].
    shares: [n, k] float32.
    chosen: [n, k] int32.
    weights: Of these experts, or of some columns of them.
    config: Of the policy.
    first: The first of them.
  """
  (n, k), e = chosen.shape, weights.up.shape[0]
  # Of the n * k (token, expert) pairs; those of these experts come first.
  pairs = (chosen.reshape(-1) - first) % config.num_experts if e < config.num_experts else chosen.reshape(-1)
  order = jnp.argsort(pairs, stable=True)
  sizes = jnp.bincount(pairs, length=config.num_experts).astype(jnp.int32)[:e]
  product = functools.partial(grouped.product, sizes=sizes, implementation=config.expert_product)
  # What a grouped product leaves in rows of no group is not defined.
  own = functools.partial(jnp.where, (jnp.arange(n * k) < jnp.sum(sizes))[:, None])
  mask = own if e < config.num_experts else lambda x, _: x
  rows = mask(flat[order // k], jnp.zeros((), flat.dtype))
  up = product(rows, weights.up.reshape(e, flat.shape[1], -1).astype(flat.dtype))
  if weights.up_bias is not None:
    up += weights.up_bias.reshape(e, -1)[pairs[order]].astype(flat.dtype)
  up = mask(up, jnp.zeros((), up.dtype))
  hidden = activate(up.reshape(n * k, *weights.up.shape[2:]), config)
  down = product(hidden, weights.down.astype(flat.dtype))
  if weights.down_bias is not None:
    down += weights.down_bias[pairs[order]].astype(flat.dtype)
  down = mask(down, jnp.zeros((), down.dtype))[jnp.argsort(order)].reshape(n, k, -1)
  return jnp.einsum('nkd,nk->nd', down, shares.astype(flat.dtype))


def _on_a_device(h, router, bias, weights, *, config, tokens, split):
  """`experts` on one device's tokens with one device's weights."""
  flat = h.reshape(-1, h.shape[-1])
  shares, chosen = route(flat, router, bias, config)
  # Summed over: the axes over which experts or their columns are split.
  over = [*meshes.names_in(split.up[0]), *meshes.names_in(split.up[3])]
  among = [n for n in over if any(n in meshes.names_in(part) for part in tokens)]
  for name in among:
    flat, shares, chosen = (jax.lax.all_gather(x, name, tiled=True) for x in (flat, shares, chosen))
  weights = _whole_width(weights, split, flat.dtype)
  first = sum(jax.lax.axis_index(n) for n in meshes.names_in(split.up[0])) * weights.up.shape[0]
  if weights.down_bias is not None and split.up[3]:  # A bias is added once, not for each part of the columns.
    weights = weights._replace(down_bias=jnp.where(
        jax.lax.axis_index(split.up[3]) == 0, weights.down_bias, 0))
  out = mixture(flat, shares, chosen, weights, config, first)
  for name in reversed(over):
    out = jax.lax.psum_scatter(out, name, tiled=True) if name in among else jax.lax.psum(out, name)
  return out.reshape(h.shape)


def _whole_width(weights, split, dtype):
  """Returns the weights in `dtype` with their width gathered; the transpose sums gradients to where they lie."""
  up, down = weights.up.astype(dtype), weights.down.astype(dtype)
  for name in meshes.names_in(split.up[1]):
    up = jax.lax.all_gather(up, name, axis=1, tiled=True)
    down = jax.lax.all_gather(down, name, axis=2, tiled=True)
  return weights._replace(up=up, down=down)
