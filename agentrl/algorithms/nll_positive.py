"""Likelihood of what went well: THOR's second term. Axes: B rows, T tokens, C channels."""

from __future__ import annotations

import jax.numpy as jnp

from agentrl.algorithms import choices
from agentrl.algorithms.channel import Regulariser


@choices.REGULARISERS.register('nll_positive')
def nll_positive(*, channel: int = 0) -> Regulariser:
  """Makes a regulariser that raises the likelihood of tokens with a positive advantage.

      loss_t = -l_t [A_t > 0]

  The aggregation counts all tokens, so that it fades where few have a positive advantage.

  Args:
    channel: Index of the channel whose advantages decide; a config names it.
  Source: THOR, code JingMog/THOR: coefficient 0.01.  Deviation: the denominator is not found in the source.
  """
  def function(outputs, batch):
    return jnp.where(batch.loss_mask, -outputs.log_probs, 0.0)

  def where(batch):
    return (batch.advantages[channel] > 0).astype(jnp.float32)

  return Regulariser('nll_positive', function, where=where)
