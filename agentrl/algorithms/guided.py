"""A clip with more room upwards for rollouts that were guided. Axes: B rows, T tokens."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from agentrl.algorithms import choices, clips


def guided(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array, is_guided: chex.Array, *,
           low: float = 0.2, high: float = 0.28, guided_high: float = 0.6,
           dual: float | None = None) -> clips.Clipped:
  """Clips as `clips.asym` does, with an upper bound of its own for guided rows.

      upper bound = 1 + guided_high where guided, 1 + high elsewhere

  Args:
    is_guided: [B, T] float32. Above 0 where the row was sampled with a hint that it is trained without.
    low: Distance of the lower bound from 1.
    high: Distance of the upper bound from 1.
    guided_high: The same for guided rows; 0.6 in the source.
    dual: As in `clips.asym`.
  Source: AgentEvolver, code modelscope/AgentEvolver.  Deviation: `high` elsewhere is our choice.
  """
  upper = jnp.where(is_guided > 0, guided_high, high)
  return clips.asym(ratio, advantages, log_probs, low=low, high=upper, dual=dual)


@choices.CLIPS.register('guided')
def _guided(ratio, advantages, log_probs, batch, *, low: float = 0.2, high: float = 0.28, guided_high: float = 0.6,
            dual: float | None = None, part: str = 'guided'):
  return guided(ratio, advantages, log_probs, batch.parts[part], low=low, high=high, guided_high=guided_high, dual=dual)
