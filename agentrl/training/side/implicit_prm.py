"""A reward model that was never told about steps: a copy of the policy, trained to prefer whole successes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.algorithms import preference, turns
from agentrl.core.types import TrainBatch
from agentrl.training import sums
from agentrl.training.optimizer import make_optimizer
from agentrl.training.side import base
from agentrl.training.sums import Trained


@base.SIDE_MODELS.register('implicit_prm')
class ImplicitPrm:
  """Gives the part of turns 'implicit': how much likelier than the policy the reward model finds a turn.

      r_k = beta sum_{t in turn k} (log pi_prm(t) - log pi_old(t))

  The reward model starts as the policy and learns by direct preference optimisation on pairs of a success and a failure
  of one group, matched one to one in their order, with the policy that sampled them as the reference. Their recorded
  log-probs are those of the policy, so nothing is evaluated twice.

  Each batch is learned from before it is scored: our choice, without which the first rewards would all be 0.

  Source: OPRL (iStar), code Tongyi-ConvAI/Qwen-Character: beta 0.05, learning rate 1e-6 beside 5e-7 of the policy.
    Deviation: none known.
  """

  turn_names = ('implicit',)
  turn_needs = ()
  needs_reference = False

  def __init__(self, *, beta: float = 0.05, part: str = 'success', threshold: float = 0.5, learning_rate: float = 1e-3,
               optimizer: str = 'adamw', max_grad_norm: float = 1.0, passes: int = 1):
    """Binds the settings.

    Args:
      beta: See above.
      part: Reward part by which a trajectory is a success.
      threshold: Least value of a success.
      learning_rate: Constant.
      optimizer: See `training.optimizer`.
      max_grad_norm: Likewise.
      passes: Updates on each batch.
    Raises:
      ValueError: if `beta` or `passes` is out of range.
    """
    if passes < 1 or beta <= 0:
      raise ValueError(f'passes={passes} of implicit_prm must be at least 1, and beta={beta} above 0')
    self._preference = preference.Preference('margins', lambda s, _: preference.dpo_loss(s.margins, beta=beta))
    self._beta, self._part, self._threshold, self._passes = beta, part, threshold, passes
    self.needs = () if part == 'total' else (part,)
    self._optimizer = make_optimizer(optimizer, learning_rate, max_grad_norm=max_grad_norm)

  def bind(self, setting: base.Setting):
    """See `SideModel`."""
    outputs = sums.log_probs_of(setting.model, setting.temperature)
    cut = dict(micro_batches=setting.micro_batches, mesh=setting.mesh)
    gradient, evaluate = sums.make_gradient(outputs, **cut), sums.make_outputs(outputs, **cut)
    self._update = jax.jit(functools.partial(_update, gradient, self._optimizer, self._preference, setting.mesh),
                           donate_argnums=0)
    self._score = jax.jit(functools.partial(_score, evaluate, self._beta))

  def begin(self, params: Any) -> Trained:
    """Returns a copy of the policy."""
    own = base.copied(params)
    return Trained(own, self._optimizer.init(own), np.int32(0))

  def warm_up(self, trained: Trained, batch: TrainBatch, used: int):
    """See `SideModel`."""
    self._update = self._update.lower(trained, batch, self._pairs(batch), np.int32(used)).compile()
    self._score = self._score.lower(trained.params, batch, np.int32(used)).compile()

  def learn(self, trained: Trained, batch: TrainBatch, used: int) -> tuple[Trained, dict[str, Any], dict[str, Any]]:
    """See `SideModel`; a batch without a pair is only scored."""
    pairs, metrics = self._pairs(batch), {}
    if pairs.weights.any():
      for _ in range(self._passes):
        trained, metrics = self._update(trained, batch, pairs, np.int32(used))
    metrics = {**metrics, 'pairs': int((pairs.weights > 0).sum())}
    return trained, {'implicit': self._score(trained.params, batch, np.int32(used))}, metrics

  def _pairs(self, batch: TrainBatch) -> preference.Pairs:
    success = np.asarray(base.part_of(batch, self._part)) >= self._threshold
    found = base.one_to_one(success, np.asarray(batch.group_ids), np.asarray(batch.weights) > 0)
    weights = found[2] / max(1.0, float(found[2].sum()))
    return preference.Pairs(found[0], found[1], weights.astype(np.float32))


def _update(gradient, optimizer, loss_of_pairs, mesh, trained: Trained, batch: TrainBatch, pairs, used):
  count = batch.weights.shape[0]
  of = lambda values: preference.sums_of_trajectories(
      jnp.where(batch.loss_mask, values, 0.0), batch.trajectory_ids, count)
  reference, tokens = sums.replicated(
      (of(batch.behaviour_log_probs), of(jnp.ones(batch.tokens.shape, jnp.float32))), mesh)
  loss = lambda totals: preference.pair_loss(loss_of_pairs, totals, reference, tokens, pairs, trained.updates)
  (value, metrics), grads = gradient(trained.params, sums.planes_of(batch), count, used, loss)
  trained, scalars = sums.apply_gradient(trained, optimizer, value, grads)
  return trained, {**metrics, **scalars}


def _score(evaluate, beta, params, batch: TrainBatch, used):
  log_probs = evaluate(params, sums.planes_of(batch), used)
  gain = jnp.where(batch.loss_mask, beta * (log_probs - batch.behaviour_log_probs), 0.0)
  found = turns.find(batch, jnp.asarray(batch.loss_mask))
  return jnp.where(found.last, turns.on_turns(gain, found), 0.0)
