"""An estimator of progress: how much each turn adds to the final reward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.algorithms import preference, turns
from agentrl.core import masked
from agentrl.core.types import TrainBatch
from agentrl.models import transformer
from agentrl.training import sums
from agentrl.training.optimizer import make_optimizer
from agentrl.training.side import base
from agentrl.training.sums import Trained


@base.SIDE_MODELS.register('progress')
class Progress:
  """Gives the part of turns 'progress': what the turn contributes to the final reward, and whether it could be run.

      loss = mean_n (sum_k c_k - R_n)^2,         r_k = weight c_k + grounding g_k

  c_k is a linear function of the last hidden state at the last token of turn k, in a copy of the policy that is trained
  with it; R the reward part `part`, and g_k the part of turns `grounding_part`.

  Source: SPA-RL, code WangHanLinHenry/SPA-RL-Agent: weight 1, grounding 0.5. Deviation: the paper trains the estimator
    before reinforcement learning and then keeps it, here it learns from each batch before it scores it; the release's
    centred final reward and its multiplication by the turns that follow are left out, as they are not in the paper.
  """

  turn_names = ('progress',)
  needs_reference = False

  def __init__(self, *, part: str = 'total', weight: float = 1.0, grounding: float = 0.5,
               grounding_part: str = 'executable', learning_rate: float = 1e-3, optimizer: str = 'adamw',
               max_grad_norm: float = 1.0, passes: int = 1):
    """Binds the settings.

    Args:
      part: Reward that the turns add up to.
      weight: Of the estimate.
      grounding: Weight of the other part; 0 for none.
      grounding_part: Part of turns, 1 where a turn could be run.
      learning_rate: Constant.
      optimizer: See `training.optimizer`.
      max_grad_norm: Likewise.
      passes: Updates on each batch.
    Raises:
      ValueError: if `passes` is below 1.
    """
    if passes < 1:
      raise ValueError(f'passes={passes} of progress must be at least 1')
    self._part, self._weight, self._passes = part, weight, passes
    self._grounding, self._grounding_part = grounding, grounding_part
    self.needs = () if part == 'total' else (part,)
    self.turn_needs = (grounding_part,) if grounding else ()
    self._optimizer = make_optimizer(optimizer, learning_rate, max_grad_norm=max_grad_norm)

  def bind(self, setting: base.Setting):
    """See `SideModel`."""
    outputs = functools.partial(_contributions, setting.model)
    cut = dict(micro_batches=setting.micro_batches, mesh=setting.mesh)
    gradient, evaluate = sums.make_gradient(outputs, **cut), sums.make_outputs(outputs, **cut)
    self._update = jax.jit(functools.partial(_update, gradient, self._optimizer, self._part), donate_argnums=0)
    self._score = jax.jit(functools.partial(_score, evaluate, self._weight, self._grounding, self._grounding_part))

  def begin(self, params: Any) -> Trained:
    """Returns a copy of the policy with an output that is 0."""
    trunk = base.copied(params)
    width = trunk['embedding'].shape[1]
    own = {'trunk': trunk, 'weight': jnp.zeros(width, jnp.float32), 'bias': jnp.zeros((), jnp.float32)}
    return Trained(own, self._optimizer.init(own), np.int32(0))

  def warm_up(self, trained: Trained, batch: TrainBatch, used: int):
    """See `SideModel`."""
    self._update = self._update.lower(trained, batch, np.int32(used)).compile()
    self._score = self._score.lower(trained.params, batch, np.int32(used)).compile()

  def learn(self, trained: Trained, batch: TrainBatch, used: int) -> tuple[Trained, dict[str, Any], dict[str, Any]]:
    """See `SideModel`."""
    for _ in range(self._passes):
      trained, metrics = self._update(trained, batch, np.int32(used))
    return trained, {'progress': self._score(trained.params, batch, np.int32(used))}, metrics


def _planes(batch: TrainBatch) -> dict[str, Any]:
  """The batch's planes with a mask of the last tokens of turns, where estimates stand."""
  last = turns.find(batch, jnp.asarray(batch.loss_mask)).last
  return {**sums.planes_of(batch), 'loss_mask': last}


def _contributions(config, params, planes):
  hidden = transformer.hidden_states(params['trunk'], config, *(planes[k] for k in (
      'tokens', 'positions', 'segment_ids')))
  return hidden.astype(jnp.float32) @ params['weight'] + params['bias']


def _update(gradient, optimizer, part, trained: Trained, batch: TrainBatch, used):
  count = batch.weights.shape[0]
  final, weights = base.part_of(batch, part), jnp.asarray(batch.weights > 0, jnp.float32)
  mean = lambda x: masked.safe_divide(jnp.sum(weights * x), jnp.sum(weights))

  def loss(totals):
    return mean(jnp.square(totals - final)), {'estimate': mean(totals)}

  (value, metrics), grads = gradient(trained.params, _planes(batch), count, used, loss)
  trained, scalars = sums.apply_gradient(trained, optimizer, value, grads)
  return trained, {**jax.lax.stop_gradient(metrics), **scalars}


def _score(evaluate, weight, grounding, grounding_part, params, batch: TrainBatch, used):
  progress = weight * evaluate(params, _planes(batch), used)
  return progress + grounding * batch.token_parts[grounding_part] if grounding else progress
