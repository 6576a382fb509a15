"""ToolPO: a second advantage for one class of tokens. Axes: B rows, T tokens, N trajectories."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from agentrl.algorithms import advantages as advantages_lib
from agentrl.algorithms import choices, credit


@choices.MAPS.register('token_class_add')
def token_class_add(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *,
                    part: str = 'action', class_part: str = 'call',
                    weight: float = 1.0) -> chex.Array:
  """Adds what a trajectory's actions were worth, against its group, on the tokens that act.

      A_t <- A_t + weight M_t (R_act - mean_g of R_act)

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    part: Part of trajectories R_act.
    class_part: Token part that is above 0 on the class M: 'call', the turns that call a tool.
    weight: Of the sum.
  Source: ToolPO (DeepAgent), from its paper.  Deviation: M is the whole of a turn that calls, because
    a record does not say which of its tokens are the call.
  """
  del loss_mask
  values = choices.reward_of(batch, part)
  away = advantages_lib.group_center(values, advantages_lib.dense_groups(batch.group_ids),
                                     batch.baseline_mask, values.size)
  added = weight * credit.of_trajectory(away, batch.trajectory_ids)
  return advantages + jnp.where(batch.token_parts[class_part] > 0, added, 0.0)
