"""Tokens that an older policy drew (`rl.staleness`): leave them out beyond an age.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from agentrl.algorithms import choices


@choices.MAPS.register('lag_mask')
def lag_mask(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *, most: float = 1.0,
             part: str = 'lag') -> chex.Array:
  """Takes the advantage away from tokens that were drawn more than `most` steps ago.

  What is taken away still counts in the aggregation's denominators. `mismatch_mask` goes by the probabilities instead.

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    most: Steps.
    part: Token part with the steps since a token was drawn.
  """
  return jnp.where(_older(batch, loss_mask, most=most, part=part), 0.0, advantages)


@choices.marks('lag_mask')
def _older(batch, loss_mask, *, most=1.0, part='lag'):
  return loss_mask & (batch.token_parts[part] > most)
