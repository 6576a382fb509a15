"""ADPO: how far to trust a label that the group voted for itself.

Axes: B rows, T tokens, N trajectories. p is the share of a group's answers that agree with the
majority, from reward shaping 'majority_vote'.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from agentrl.algorithms import choices, clips, credit, selectors


@choices.MAPS.register('consensus_scale')
def consensus_scale(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *,
                    least: float = 0.5, low: float = 0.3, span: float = 0.5,
                    part: str = 'consensus') -> chex.Array:
  """Scales advantages down where the group hardly agrees on the label.

      A <- A (least + (1 - least) clip((p - low) / span, 0, 1))

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    least: Factor of a group without agreement; 0.5, and 0.6 in the script.
    low: Agreement up to which it applies.
    span: Further agreement after which advantages are whole.
    part: Part of trajectories with p.
  Source: Agent0, code aiming-lab/Agent0.  Deviation: none.
  """
  del loss_mask
  agreement = credit.of_trajectory(batch.parts[part], batch.trajectory_ids)
  return advantages * (least + (1.0 - least) * jnp.clip((agreement - low) / span, 0.0, 1.0))


def dyn_high(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array,
             agreement: chex.Array, *, low: float = 0.2, high: float = 0.2, extra: float = 0.1,
             edge: float = 0.8, span: float = 0.5) -> clips.Clipped:
  """Clips as `clips.asym` does, with more room upwards where the group agrees less.

      upper bound = 1 + high + extra clip((edge - p) / span, 0, 1)

  Args:
    agreement: [B, T] float32. p of each token's group.
    low: Distance of the lower bound from 1.
    high: Distance of the upper bound from 1 where all agree.
    extra: Further distance where they agree least.
    edge: Agreement from which on there is none.
    span: Agreement below `edge` at which it is whole.
  Source: Agent0, code aiming-lab/Agent0.  Deviation: none.
  """
  upper = high + extra * jnp.clip((edge - agreement) / span, 0.0, 1.0)
  return clips.asym(ratio, advantages, log_probs, low=low, high=upper)


@choices.CLIPS.register('dyn_high')
def _dyn_high(ratio, advantages, log_probs, batch, *, low: float = 0.2, high: float = 0.2,
              extra: float = 0.1, edge: float = 0.8, span: float = 0.5, part: str = 'consensus'):
  return dyn_high(ratio, advantages, log_probs, batch.parts[part], low=low, high=high, extra=extra,
                  edge=edge, span=span)


@selectors.SELECTORS.register('band')
def band(candidates: selectors.Candidates, rng: np.random.Generator, *, low: float = 0.3,
         high: float = 0.8, part: str = 'consensus') -> selectors.Selection:
  """Leaves out groups whose mean of a part lies outside a band: too easy, or hopeless.

  Args:
    candidates: Of a step.
    rng: Not used.
    low: Smallest mean that is kept.
    high: Largest mean that is kept.
    part: Reward part; the mean over the group's trajectories that count in its baseline.
  Source: Agent0, code aiming-lab/Agent0: tasks are kept with p in [0.3, 0.8].  Deviation: groups
    of each step; the release filters the task set.
  Example:
    >>> n = selectors.Candidates(np.float32([0, 0]), np.int32([0, 1]), {'consensus': np.float32([.5, 1.])},
    ...                          np.ones(2, np.float32), np.ones(2, bool))
    >>> band(n, np.random.default_rng(0)).weights.tolist()
    [1.0, 0.0]
  """
  del rng
  values, weights = selectors.of_part(candidates, part), candidates.weights.copy()
  for group in np.unique(candidates.group_ids):
    members = candidates.group_ids == group
    counted = values[members & candidates.baseline_mask]
    if not counted.size or not low - 1e-6 <= counted.mean() <= high + 1e-6:
      weights[members] = 0.0
  return selectors.Selection(weights, candidates.baseline_mask)
