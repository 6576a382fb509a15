"""LLDS: good trajectories must not become less likely.

Axes: B rows, T tokens.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import choices, ratios
from agentrl.algorithms.channel import Regulariser
from agentrl.core import masked

GATES = ('response', 'action')


@choices.REGULARISERS.register('llds')
def llds(*, gate: str = 'response', answer: float = 0.0, channel: int = 0,
         part: str = 'call', searches_part: str = '') -> Regulariser:
  """Makes a penalty on what good trajectories lose in likelihood; its coefficient is lambda.

      penalty_t = c_t gate max(0, b_t - l_t) 1[A_t >= 0]
      c_t = 1 in turns that call, `answer` in the others
      gate = 1 where the sum of b - l over the sequence (or over the turn) is above 0

  A >= 0 includes groups without signal, so what gets no policy gradient is held as well. 0 at the
  first update on a batch: it needs several, see `rl.minibatches` and `rl.epochs`.

  Args:
    gate: 'response', over the sequence, or 'action', over the turn.
    answer: Factor of the final answer, w / lambda and at most 1; the source's w is 0.
    channel: Index of the channel whose advantages are read; a config names it.
    part: Token part that is above 0 in turns that call.
    searches_part: Part of trajectories, their number n of searches that succeeded: the factor is then
      `answer` times max(n - 1, 0), the source's adaptive form; '' for none.
  Raises:
    ValueError: if `gate` is unknown.
  Source: LLDS, code vengdeng/LLDS; lambda is 0.2 in its script.  Deviation: the answer is the whole
    of a turn without a call; which side of its mask is the answer is our reading.
  """
  if gate not in GATES:
    raise ValueError(f'gate={gate!r} is none of {", ".join(GATES)}')

  def function(outputs, batch):
    ids = batch.segment_ids if gate == 'response' else ratios.run_ids(
        batch.loss_mask, batch.segment_ids, batch.turn_ids)
    searches = jnp.maximum(batch.parts[searches_part] - 1.0, 0.0) if searches_part else 1.0
    factors = jnp.where(batch.parts[part] > 0, 1.0, jnp.minimum(answer * searches, 1.0))
    return lost_likelihood(outputs.log_probs, batch.behaviour_log_probs, batch.advantages[:, channel],
                           batch.loss_mask, ids, factors)

  return Regulariser('llds', function, needs_drift=True)


def lost_likelihood(log_probs: chex.Array, behaviour_log_probs: chex.Array, advantages: chex.Array,
                    loss_mask: chex.Array, ids: chex.Array, factors: chex.Array) -> chex.Array:
  """Returns the penalty of each token; see `llds`.

  Args:
    log_probs: [B, T] float32, nats.
    behaviour_log_probs: [B, T] float32, nats.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    ids: [B, T] int32, from 0 to T. What the gate sums over.
    factors: [B, T] float32. c_t.
  Returns:
    [B, T] float32, nats; 0 outside the loss mask.
  """
  lost = -ratios.log_ratio(log_probs, behaviour_log_probs, loss_mask)
  gate = masked.row_segment_sum(jax.lax.stop_gradient(lost), ids) > 0
  held = loss_mask & gate & (advantages >= 0)
  return jnp.where(held, factors * jnp.maximum(lost, 0.0), 0.0)
