"""Every choice by its name: what a config can write on an axis of a channel.

To add one, write the pure function and register it, here or in the file of the method that brings
it. Options are those of the function: one that it does not take is refused, so that no setting is
silently without effect.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Mapping

import jax.numpy as jnp

from agentrl.algorithms import advantages as advantages_lib
from agentrl.algorithms import aggregation as aggregation_lib
from agentrl.algorithms import clips
from agentrl.algorithms import credit as credit_lib
from agentrl.algorithms import gae as gae_lib
from agentrl.algorithms import ratios
from agentrl.algorithms.channel import Advantage, Choice, Credit, Estimate
from agentrl.core.registry import Registry


ADVANTAGES: Registry[Callable[..., Advantage]] = Registry('advantage')
RATIOS: Registry[Callable[..., Any]] = Registry('ratio')
CLIPS: Registry[Callable[..., Any]] = Registry('clip')
AGGREGATIONS: Registry[Callable[..., Any]] = Registry('aggregation')


def advantage(name: str, **options) -> Advantage:
  """Makes an advantage choice: 'z', 'center', 'loo', 'gae' or 'reward_to_go'.

  Args:
    name: Which estimator.
    **options: Of the estimator; those left out keep its defaults.
  Raises:
    UnknownNameError: if there is none of that name; the known ones are listed.
    ValueError: if it does not take an option.
  Example:
    >>> advantage('z', ddof=1).min_group, advantage('gae').needs_values
    (2, True)
  """
  return _bind('advantage', name, ADVANTAGES.get(name), options)()


def ratio(name: str) -> Choice:
  """Makes a ratio choice: 'token', 'segment_geo', 'sequence_geo', 'trajectory_prod' or 'off'."""
  return Choice(name, RATIOS.get(name))


def clip(name: str, **options) -> Choice:
  """Makes a clip choice.

  Args:
    name: 'asym', 'recip', 'weight_sg', 'one_sided_neg', 'none' or 'log_likelihood'.
    **options: Of the rule; those left out keep its defaults.
  """
  return Choice(name, _bind('clip', name, CLIPS.get(name), options))


def aggregation(name: str, **options) -> Choice:
  """Makes an aggregation choice.

  Args:
    name: 'tok_mean', 'seq_mean_tok_mean', 'seq_mean_tok_sum' or 'sum_over_constant'.
    **options: `max_tokens` for 'sum_over_constant', which needs it.
  """
  rule = _bind('aggregation', name, AGGREGATIONS.get(name), options)
  if name == 'sum_over_constant' and 'max_tokens' not in options:
    raise ValueError("aggregation 'sum_over_constant' cannot go without max_tokens, the most "
                     "tokens a trajectory may sample; give it, or take aggregation "
                     "'seq_mean_tok_sum'")
  return Choice(name, rule)


def credit(level: str) -> Credit:
  """Makes the plain credit map for advantages of a level: 'broadcast', or 'per_token'."""
  if level == 'trajectory':
    return Credit('broadcast', credit_lib.broadcast, level)
  return Credit('per_token', credit_lib.per_token, level)


def _group_advantage(name, rule, options):
  rule = functools.partial(rule, **options)

  def estimate(batch, loss_mask):
    del loss_mask
    return Estimate(rule(batch.rewards, advantages_lib.dense_groups(batch.group_ids),
                         batch.baseline_mask, batch.rewards.shape[0]))

  # A group of one has a signal only where its raw reward is taken for the advantage.
  min_group = 1 if options['singleton'] == 'raw' else 2
  return Advantage(name, estimate, level='trajectory', min_group=min_group)


@ADVANTAGES.register('z')
def _z(*, ddof: int = 0, eps: float = 1e-6, singleton: str = 'zero') -> Advantage:
  options = {'ddof': ddof, 'eps': eps, 'singleton': singleton}
  return _group_advantage('z', advantages_lib.group_z, options)


@ADVANTAGES.register('center')
def _center(*, singleton: str = 'zero') -> Advantage:
  return _group_advantage('center', advantages_lib.group_center, {'singleton': singleton})


@ADVANTAGES.register('loo')
def _loo(*, singleton: str = 'zero') -> Advantage:
  return _group_advantage('loo', advantages_lib.group_leave_one_out, {'singleton': singleton})


@ADVANTAGES.register('gae')
def _gae(*, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True,
         kl_in_reward: float = 0.0) -> Advantage:
  _check_unit(gamma=gamma, lam=lam)

  def estimate(batch, loss_mask):
    rewards = _token_rewards(batch, batch.rewards, loss_mask, kl_in_reward)
    raw, returns = gae_lib.gae(rewards, batch.values, loss_mask, batch.segment_ids, gamma=gamma,
                               lam=lam)
    return Estimate(advantages_lib.global_whiten(raw, loss_mask) if whiten else raw, returns)

  return Advantage('gae', estimate, level='token', needs_values=True,
                   needs_reference=kl_in_reward != 0, gives_returns=True)


@ADVANTAGES.register('reward_to_go')
def _reward_to_go(*, gamma: float = 1.0, whiten: bool = True, group_baseline: bool = False,
                  kl_in_reward: float = 0.0) -> Advantage:
  _check_unit(gamma=gamma)

  def estimate(batch, loss_mask):
    final = batch.rewards
    if group_baseline:
      groups = advantages_lib.dense_groups(batch.group_ids)
      final = advantages_lib.group_center(final, groups, batch.baseline_mask, final.shape[0])
    rewards = _token_rewards(batch, final, loss_mask, kl_in_reward)
    raw, _ = gae_lib.gae(rewards, jnp.zeros_like(rewards), loss_mask, batch.segment_ids,
                         gamma=gamma)
    return Estimate(advantages_lib.global_whiten(raw, loss_mask) if whiten else raw)

  return Advantage('reward_to_go', estimate, level='token', needs_reference=kl_in_reward != 0,
                   min_group=2 if group_baseline else 1)


def _token_rewards(batch, final, loss_mask, kl_in_reward):
  """The final rewards on their tokens, less the behaviour's divergence from the reference."""
  rewards = gae_lib.place_terminal_reward(final, batch.trajectory_ids, batch.segment_ids, loss_mask)
  if kl_in_reward:
    drift = jnp.where(loss_mask, batch.behaviour_log_probs - batch.reference_log_probs, 0.0)
    rewards -= kl_in_reward * drift
  return rewards


@RATIOS.register('token')
def _token(log_probs, batch):
  return ratios.token(log_probs, batch.behaviour_log_probs, batch.loss_mask)


@RATIOS.register('off')
def _off(log_probs, batch):
  return ratios.off(log_probs, batch.behaviour_log_probs, batch.loss_mask)


@RATIOS.register('segment_geo')
def _segment_geo(log_probs, batch):
  return ratios.segment_geo(log_probs, batch.behaviour_log_probs, batch.loss_mask,
                            batch.segment_ids, batch.turn_ids)


@RATIOS.register('sequence_geo')
def _sequence_geo(log_probs, batch):
  return ratios.sequence_geo(log_probs, batch.behaviour_log_probs, batch.loss_mask,
                             batch.segment_ids)


@RATIOS.register('trajectory_prod')
def _trajectory_prod(log_probs, batch):
  return ratios.trajectory_prod(log_probs, batch.behaviour_log_probs, batch.loss_mask,
                                batch.segment_ids)


for _rule in (clips.none, clips.log_likelihood, clips.asym, clips.recip, clips.weight_sg,
              clips.one_sided_neg):
  CLIPS.register(_rule.__name__)(_rule)
for _rule in (aggregation_lib.tok_mean, aggregation_lib.seq_mean_tok_mean,
              aggregation_lib.seq_mean_tok_sum, aggregation_lib.sum_over_constant):
  AGGREGATIONS.register(_rule.__name__)(_rule)


def _bind(axis: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]):
  """Fixes a choice's options, refusing those it would not read."""
  known = [p.name for p in inspect.signature(function).parameters.values()
           if p.kind is inspect.Parameter.KEYWORD_ONLY]
  for option in options:
    if option not in known:
      raise ValueError(f'{axis} {name!r} cannot go with option {option!r}, which it would '
                       f'not read; it takes {", ".join(known) or "no options"}')
  return functools.partial(function, **options)


def _check_unit(**numbers):
  for name, number in numbers.items():
    if not 0.0 <= number <= 1.0:
      raise ValueError(f'{name}={number} must lie in [0, 1]')
