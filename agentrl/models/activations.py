"""What an MLP does between its two products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agentrl.models.config import ModelConfig


@jax.custom_vjp
def halve(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x[..., 0, :] and x[..., 1, :] of [..., 2, F]; the gradient is one stack, not two paddings and a sum."""
  return x[..., 0, :], x[..., 1, :]


halve.defvjp(lambda x: (halve(x), None), lambda _, grads: (jnp.stack(grads, axis=-2),))


def activate(up: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns [..., F] from what the up projection gives: [..., 2, F], the gate first, or [..., 1, F] without gates.

  Source: SwiGLU, Shazeer, arXiv 2002.05202; squared ReLU, So et al., arXiv 2109.08668; clamped_swiglu,
  min(g, limit) sigmoid(alpha g) (clip(u) + 1), as gpt-oss's implementation does.
  """
  if config.activation == 'clamped_swiglu':
    gate, up = halve(up)
    gate = jnp.minimum(gate, config.swiglu_limit)
    up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)
  act = {'silu': jax.nn.silu, 'gelu': jax.nn.gelu, 'relu2': lambda y: jnp.square(jax.nn.relu(y))}[
      config.activation]
  if config.gated_mlp:
    gate, up = halve(up)
    return act(gate) * up
  return act(up[..., 0, :])
