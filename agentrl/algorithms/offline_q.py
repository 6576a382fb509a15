"""Critics learned from a log, and the choice of the action to imitate: arrays only.

Axes: M transitions, N actions offered in a state, F features.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

CRITICS = ('q1', 'q2', 'v1', 'v2')


def init_critics(key: jax.Array, features: int, hidden: int) -> dict[str, Any]:
  """Returns two action values and two state values, each a network of two hidden layers.

  The action values read the features of the state and those of the state with the action, the state values the first
  alone.
  """
  keys = jax.random.split(key, len(CRITICS))
  return {name: _init_network(k, (2 if name[0] == 'q' else 1) * features, hidden) for name, k in zip(CRITICS, keys)}


def _init_network(key: jax.Array, inputs: int, hidden: int) -> list[dict[str, jax.Array]]:
  sizes = [(inputs, hidden), (hidden, hidden), (hidden, 1)]
  # The output starts at 0, as far from a wrong value as from a right one.
  scale = lambda i, fan_in: 0.0 if i == len(sizes) - 1 else (2.0 / fan_in) ** 0.5
  return [{'weight': scale(i, a) * jax.random.normal(jax.random.fold_in(key, i), (a, b)), 'bias': jnp.zeros(b)}
          for i, (a, b) in enumerate(sizes)]


def value(network: list[dict[str, jax.Array]], x: chex.Array) -> chex.Array:
  """Returns [...] float32 of inputs [..., F]."""
  for i, layer in enumerate(network):
    x = jax.nn.relu(x) if i else x
    x = x @ layer['weight']
    x += jnp.broadcast_to(layer['bias'], x.shape)
  return x[..., 0]


def critic_loss(critics: dict[str, Any], targets: dict[str, Any], states: chex.Array, actions: chex.Array,
                rewards: chex.Array, next_states: chex.Array, done: chex.Array, *,
                gamma: float) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Returns the squared errors of both pairs of critics, summed, each against the frozen other one of its pair.

      Q_i(s, a) -> r + (1 - done) gamma V_i'(s');    V_i(s) -> Q_i'(s, a)

  Args:
    critics: From `init_critics`.
    targets: Slow copies; no gradient flows to them.
    states: [M, F] float32.
    actions: [M, F] float32. Features of the state with the logged action.
    rewards: [M] float32.
    next_states: [M, F] float32; not read where done.
    done: [M] bool.
    gamma: Discount a turn.
  Source: Digi-Q, code DigiRL-agent/digiq: gamma 0.95.  Deviation: that the critics are paired by index is our reading.
  """
  chex.assert_rank([states, actions, next_states, rewards, done], [2, 2, 2, 1, 1])
  inputs = jnp.concatenate([states, actions], axis=-1)
  loss, metrics = jnp.float32(0.0), {}
  for i in '12':
    after = jax.lax.stop_gradient(value(targets[f'v{i}'], next_states))
    wanted = rewards + jnp.where(done, 0.0, gamma * after)
    q_error = jnp.mean(jnp.square(value(critics[f'q{i}'], inputs) - wanted))
    seen = jax.lax.stop_gradient(value(targets[f'q{i}'], inputs))
    v_error = jnp.mean(jnp.square(value(critics[f'v{i}'], states) - seen))
    loss += q_error + v_error
    metrics.update({f'q{i}_error': q_error, f'v{i}_error': v_error})
  return loss, metrics


def moved(targets: Any, critics: Any, rate: float) -> Any:
  """Returns targets + rate (critics - targets)."""
  return jax.tree.map(lambda t, c: t + rate * (c - t), targets, critics)


def best_actions(critics: dict[str, Any], states: chex.Array, actions: chex.Array, offered: chex.Array, *,
                 threshold: float) -> tuple[chex.Array, chex.Array]:
  """Returns which action of each state to imitate, and how strongly.

      A = max(Q1, Q2) - max(V1, V2);    the action of largest A, with weight clip(A, 0, 1) if A > threshold, else 0

  Args:
    critics: From `init_critics`.
    states: [M, F] float32.
    actions: [M, N, F] float32.
    offered: [M, N] bool. Whether there is such an action.
    threshold: 0.05 for web shopping, 0.1 for devices.
  Returns:
    [M] int32 and [M] float32.
  Source: Digi-Q, code DigiRL-agent/digiq.  Deviation: none.
  """
  chex.assert_rank([states, actions, offered], [2, 3, 2])
  inputs = jnp.concatenate([jnp.broadcast_to(states[:, None], actions.shape), actions], axis=-1)
  q = jnp.maximum(value(critics['q1'], inputs), value(critics['q2'], inputs))
  v = jnp.maximum(value(critics['v1'], states), value(critics['v2'], states))
  gain = jnp.where(offered, q - v[:, None], -jnp.inf)
  best = jnp.argmax(gain, axis=1)
  most = jnp.max(gain, axis=1)
  return best.astype(jnp.int32), jnp.where(most > threshold, jnp.clip(most, 0.0, 1.0), 0.0)
