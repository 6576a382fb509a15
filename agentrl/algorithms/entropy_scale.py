"""AEPO: credit by entropy, and a clip that keeps the gradient above the band.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import choices, clips, turns

SPANS = ('batch', 'group')


@choices.MAPS.register('entropy_scale')
def entropy_scale(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *, weight: float = 0.2,
                  over: str = 'group', part: str = 'entropy', eps: float = 1e-6) -> chex.Array:
  """Raises the advantages of tokens that were drawn at more entropy than others.

      A_t <- A_t (1 + weight z(H_t))

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    weight: Of the z-score.
    over: What tokens are compared with: 'group', the paper's, or 'batch', the code's.
    part: Token part with the entropies.
    eps: Added to the deviation.
  Raises:
    ValueError: if `over` is unknown.
  Source: AEPO, read in third-party copies of its code.  Deviation: entropies are those of sampling,
    so that they are there with and without an entropy bonus.
  """
  if over not in SPANS:
    raise ValueError(f'over={over!r} is none of {", ".join(SPANS)}')
  keys = turns.groups(batch) if over == 'group' else jnp.zeros_like(batch.trajectory_ids)
  z = turns.compare(batch.token_parts[part], keys, loss_mask, loss_mask, eps=eps)
  return advantages * (1.0 + weight * z)


def grad_preserve(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array, *,
                  low: float = 0.2, high: float = 0.2, dual: float | None = None) -> clips.Clipped:
  """Clips as `clips.asym` does, but a good token above the band keeps a gradient.

      loss = max(-A r, -A clamp(r, 1 - low, u)),     u = (1 + high) r / sg(r)
      loss = min(loss, -A dual)                      where A < 0, if dual is given

  The value is that of `clips.asym`. The gradient of -loss / A by the log-probability is 1 + high for
  A > 0 and r > 1 + high, 0 for A < 0 and r < 1 - low, and r otherwise.

  Args:
    low: Distance of the lower bound from 1.
    high: Distance of the upper bound from 1.
    dual: Bound of the loss for negative advantages, above 1 + high; None for none. 3 in the source.
  Source: AEPO, read in third-party copies of its code.  Deviation: none.
  """
  plain = clips.asym(ratio, advantages, log_probs, low=low, high=high, dual=dual)
  advantages = jax.lax.stop_gradient(advantages)
  above = -advantages * (1.0 + high) * ratio / jax.lax.stop_gradient(ratio)
  kept = (advantages > 0) & (ratio > 1.0 + high)
  return clips.Clipped(jnp.where(kept, above, plain.loss), plain.low, plain.high)


@choices.CLIPS.register('grad_preserve')
def _grad_preserve(ratio, advantages, log_probs, batch, *, low: float = 0.2, high: float = 0.2,
                   dual: float | None = None):
  del batch
  return grad_preserve(ratio, advantages, log_probs, low=low, high=high, dual=dual)
