"""CISPO with PPO's set of tokens without gradient. Axes: B rows, T tokens."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from agentrl.algorithms import choices, clips


def weight_sg_masked(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array, *,
                     low: float = 0.2, high: float = 0.2) -> clips.Clipped:
  """Clips as `clips.weight_sg` does, and leaves out the tokens that PPO's rule stops.

      loss = 0                              where A > 0, r > 1 + high or A < 0, r < 1 - low
      loss = -sg(clip(r, 1 - low, 1 + high)) A l      elsewhere

  Args:
    low: Distance of the lower bound from 1.
    high: Distance of the upper bound from 1.
  Source: MiniMax (CISPO), arXiv 2506.13585.  Deviation: none.
  """
  clipped = clips.weight_sg(ratio, advantages, log_probs, low=low, high=high)
  stopped = ((advantages > 0) & (ratio > 1.0 + high)) | ((advantages < 0) & (ratio < 1.0 - low))
  return clipped._replace(loss=jnp.where(stopped, 0.0, clipped.loss))


@choices.CLIPS.register('weight_sg_masked')
def _weight_sg_masked(ratio, advantages, log_probs, batch, *, low: float = 0.2, high: float = 0.2):
  del batch
  return weight_sg_masked(ratio, advantages, log_probs, low=low, high=high)
