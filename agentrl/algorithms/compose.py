"""Puts an objective of one policy channel together from named choices."""

from __future__ import annotations

import math

from agentrl.algorithms import choices, regularisers
from agentrl.algorithms.channel import Advantage, Channel, Choice, Regulariser
from agentrl.algorithms.objective import Objective


def given(**options) -> dict:
  """Returns the options that are not None, so that each default stays where its reader is.

  Example:
    >>> given(low=None, high=.28)
    {'high': 0.28}
  """
  return {name: value for name, value in options.items() if value is not None}


def single_channel(name: str, advantage: Advantage, ratio: Choice, clip: Choice,
                   aggregation: Choice,
                   extra: tuple[Regulariser | None, ...] = ()) -> Objective:
  """Returns an objective of one channel, with the plain credit map of its advantage's level.

  Args:
    name: Of the objective.
    advantage: From `choices.advantage`, as the next three from their own functions.
    ratio: Importance ratio.
    clip: Clip rule.
    aggregation: Of the policy loss.
    extra: Regularisers; None stands for one that is switched off.
  """
  channel = Channel(advantage, choices.credit(advantage.level), ratio, clip, aggregation)
  return Objective(name, (channel,), tuple(r for r in extra if r is not None))


def kl(coefficient: float, estimator: str, aggregation: Choice) -> Regulariser | None:
  """Returns the KL penalty to the reference; None if its coefficient is 0."""
  regularisers.check_estimator(estimator)
  _check_coefficient('kl_coef', coefficient)
  if not coefficient:
    return None

  def function(outputs, batch):
    return regularisers.kl(outputs.log_probs, batch.reference_log_probs, batch.loss_mask,
                           estimator=estimator)

  return Regulariser('kl', function, coefficient, aggregation, needs_reference=True)


def entropy(coefficient: float, aggregation: Choice) -> Regulariser | None:
  """Returns the entropy bonus; None if its coefficient is 0."""
  _check_coefficient('entropy_coef', coefficient)
  if not coefficient:
    return None

  def function(outputs, batch):
    return regularisers.entropy(outputs.entropies, batch.loss_mask)

  return Regulariser('entropy', function, -coefficient, aggregation, needs_entropies=True)


def value(coefficient: float, clip: float | None, aggregation: Choice) -> Regulariser | None:
  """Returns the value head's regression; None if its coefficient is 0."""
  _check_coefficient('value_coef', coefficient)
  if not coefficient:
    return None

  def function(outputs, batch):
    return regularisers.value_loss(outputs.values, batch.values, batch.returns, batch.loss_mask,
                                   clip=clip)

  return Regulariser('value', function, coefficient, aggregation, needs_values=True)


def _check_coefficient(name, coefficient):
  if not (math.isfinite(coefficient) and coefficient >= 0):
    raise ValueError(f'{name}={coefficient} must be finite and not negative')
