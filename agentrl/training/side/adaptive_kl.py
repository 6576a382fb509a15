"""A penalty for drifting from the reference whose weight follows how far the policy has drifted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.core import masked
from agentrl.core.types import TrainBatch
from agentrl.training.side import base
from agentrl.training.sums import Trained


@base.SIDE_MODELS.register('adaptive_kl')
class AdaptiveKl:
  """Gives the part 'kl_penalty', a number a token, to be added to the reward: `turn_part` of 'gae' or 'reward_to_go'.

      kl_penalty_t = -beta (b_t - q_t)
      KL = mean over trajectories of the mean over their tokens of b_t - q_t
      beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)          after each batch of n trajectories

  with b the behaviour's and q the reference's log-probability. A penalty of constant weight is the option `kl_in_reward`
  of those advantages.

  Source: Ziegler et al., arXiv 1909.08593, as in volcengine/verl.  Deviation: none; a step with several minibatches is
    several batches.
  """

  turn_names = ('kl_penalty',)
  needs = ()
  turn_needs = ()
  needs_reference = True

  def __init__(self, *, coef: float = 0.001, target: float = 0.1, horizon: float = 10_000.0):
    """Binds the settings.

    Args:
      coef: beta to begin with, reward a nat.
      target: KL aimed at, nats a token.
      horizon: Trajectories in which beta may change by a fifth.
    Raises:
      ValueError: if one is not above 0.
    """
    if min(coef, target, horizon) <= 0:
      raise ValueError(f'coef={coef}, target={target} and horizon={horizon} of adaptive_kl must be above 0')
    self._coef, self._target, self._horizon = coef, target, horizon

  def bind(self, setting: base.Setting):
    """See `SideModel`."""
    del setting
    self._learn = jax.jit(self._step)

  def begin(self, params: Any) -> Trained:
    """Returns the weight to begin with."""
    del params
    return Trained({'coef': jnp.float32(self._coef)}, (), np.int32(0))

  def warm_up(self, trained: Trained, batch: TrainBatch, used: int):
    """See `SideModel`."""
    self._learn = self._learn.lower(trained, batch).compile()

  def learn(self, trained: Trained, batch: TrainBatch, used: int) -> tuple[Trained, dict[str, Any], dict[str, Any]]:
    """See `SideModel`; the penalty has the weight before the change."""
    del used
    trained, penalty, metrics = self._learn(trained, batch)
    return trained, {'kl_penalty': penalty}, metrics

  def _step(self, trained: Trained, batch: TrainBatch):
    coef, count = trained.params['coef'], batch.weights.shape[0]
    drift = jnp.where(batch.loss_mask, batch.behaviour_log_probs - batch.reference_log_probs, 0.0)
    ids = jnp.where(batch.loss_mask, batch.trajectory_ids, count).reshape(-1)
    sums, tokens = (jax.ops.segment_sum(x.reshape(-1).astype(jnp.float32), ids, num_segments=count + 1)[:count]
                    for x in (drift, batch.loss_mask))
    present = jnp.sum(tokens > 0, dtype=jnp.float32)
    kl = masked.safe_divide(jnp.sum(masked.safe_divide(sums, tokens)), present)
    change = 1.0 + jnp.clip(kl / self._target - 1.0, -0.2, 0.2) * present / self._horizon
    trained = Trained({'coef': coef * change}, (), jnp.asarray(trained.updates, jnp.int32) + 1)
    return trained, -coef * drift, {'coef': coef, 'kl': kl}
