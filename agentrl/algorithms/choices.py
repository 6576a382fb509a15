"""Every choice by its name: what a config can write on an axis of a channel.

To add one, write the pure function and register it, here or in the file of the method that brings
it. Options are those of the function: one that it does not take is refused, so that no setting is
silently without effect.
"""

from __future__ import annotations

import dataclasses
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
from agentrl.algorithms import regularisers
from agentrl.algorithms import schedules
from agentrl.algorithms.channel import Advantage, Choice, Credit, Estimate, Regulariser
from agentrl.core.registry import Registry


_PACKAGE = 'agentrl.algorithms'
ADVANTAGES: Registry[Callable[..., Advantage]] = Registry('advantage', _PACKAGE)
MAPS: Registry[Callable[..., Any]] = Registry('credit map', _PACKAGE)
RATIOS: Registry[Callable[..., Any]] = Registry('ratio', _PACKAGE)
CLIPS: Registry[Callable[..., Any]] = Registry('clip', _PACKAGE)
AGGREGATIONS: Registry[Callable[..., Any]] = Registry('aggregation', _PACKAGE)
ROWS: Registry[Callable[..., Any]] = Registry('rows', _PACKAGE)
FILTERS: Registry[Callable[..., Any]] = Registry('filter', _PACKAGE)
REGULARISERS: Registry[Callable[..., Regulariser]] = Registry('regulariser', _PACKAGE)
# Of credit maps that have bounds: `rule(batch, loss_mask, **options of the map) -> [B, T] bool`, where one is reached.
MARKS: dict[str, Callable[..., Any]] = {}


def advantage(name: str, **options) -> Advantage:
  """Makes an advantage choice: 'z', 'center', 'loo', 'gae', 'reward_to_go', 'sum' or any other that is registered.

  Args:
    name: Which estimator.
    **options: Of the estimator; those left out keep its defaults.
  Raises:
    UnknownNameError: if there is none of that name; the known ones are listed.
    ValueError: if it does not take an option.
  Example:
    >>> advantage('z', ddof=1).min_group, advantage('gae').needs_values
    (2, True)
    >>> advantage('z', part='accuracy').reads
    ('accuracy',)
  """
  factory = ADVANTAGES.get(name)
  made = _bind('advantage', name, factory, options)()
  made = dataclasses.replace(made, reads=(*made.reads, *_reads(factory, options)))
  if not _scheduled(options):
    return made
  return dataclasses.replace(made, function=lambda batch, loss_mask: factory(
      **_at(options, batch.step)).function(batch, loss_mask))


def ratio(name: str, **options) -> Choice:
  """Makes a ratio choice: 'token', 'segment_geo', 'segment_prod', 'sequence_geo', 'trajectory_prod', 'off', ..."""
  return _choice('ratio', name, RATIOS, options, _of_part)


def clip(name: str, **options) -> Choice:
  """Makes a clip choice.

  Args:
    name: 'asym', 'recip', 'weight_sg', 'one_sided_neg', 'none', 'log_likelihood', or one registered.
    **options: Of the rule; those left out keep its defaults.
  """
  return _choice('clip', name, CLIPS, options, _of_part)


def aggregation(name: str, **options) -> Choice:
  """Makes an aggregation choice.

  Args:
    name: 'tok_mean', 'seq_mean_tok_mean', 'seq_mean_tok_sum' or 'sum_over_constant', or one registered.
    **options: `max_tokens` for 'sum_over_constant', which needs it.
  """
  rule = _choice('aggregation', name, AGGREGATIONS, options)
  if name == 'sum_over_constant' and 'max_tokens' not in options:
    raise ValueError("aggregation 'sum_over_constant' cannot go without max_tokens, the most "
                     "tokens a trajectory may sample; give it, or take aggregation "
                     "'seq_mean_tok_sum'")
  return rule


def credit(level: str) -> Credit:
  """Makes the plain credit map for advantages of a level: 'broadcast', or 'per_token'."""
  if level == 'trajectory':
    return Credit('broadcast', credit_lib.broadcast, level=level)
  return Credit('per_token', credit_lib.per_token, level=level)


def credit_map(name: str, **options) -> Choice:
  """Makes a change of the tokens' advantages: `rule(batch, advantages [B, T], loss_mask, **options)`."""
  made = _choice('credit map', name, MAPS, options, _of_batch)
  mark = MARKS.get(name)
  if mark is None:
    return made
  return dataclasses.replace(made, marks=lambda batch, loss_mask: mark(batch, loss_mask, **_at(options, batch.step)))


def marks(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Registers the function it decorates as the one that says where the credit map of that name reaches a bound."""
  def decorate(function):
    MARKS[name] = function
    return function
  return decorate


def rows(name: str, **options) -> Choice:
  """Makes a choice of a channel's trajectories: `rule(batch, **options) -> [N]`."""
  return _choice('rows', name, ROWS, options, _of_batch)


def channel_filter(name: str, **options) -> Choice:
  """Makes a choice of a channel's trajectories by advantage: `rule(batch, advantages [B, T], **options) -> [N]`."""
  return _choice('filter', name, FILTERS, options, _of_batch)


def regulariser(name: str, **options) -> Regulariser:
  """Makes a regulariser of coefficient 1: 'kl', 'entropy', 'value', or one registered."""
  factory = REGULARISERS.get(name)
  made = _bind('regulariser', name, factory, options)()
  made = dataclasses.replace(made, reads=(*made.reads, *_reads(factory, options)))
  if not _scheduled(options):
    return made
  function = lambda outputs, batch: factory(**_at(options, batch.steps[0])).function(outputs, batch)
  where = lambda batch: factory(**_at(options, batch.step)).where(batch)
  return dataclasses.replace(made, function=function, where=made.where and where)


def reads_a_channel(name: str) -> bool:
  """Whether a regulariser reads the advantages of a channel, whose index its option 'channel' is."""
  return 'channel' in inspect.signature(REGULARISERS.get(name)).parameters


def reward_of(batch: Any, part: str) -> Any:
  """Returns [N] float32: the total reward, or the part of that name; zeros for ''."""
  if not part:
    return jnp.zeros_like(batch.rewards)
  return batch.rewards if part == 'total' else batch.parts[part]


def _choice(axis, name, registry, options, step_of=None):
  """Binds a rule; `step_of` finds the step in its arguments, where its numbers may depend on that."""
  rule = registry.get(name)
  bound = _bind(axis, name, rule, options)
  if _scheduled(options):
    if step_of is None:
      raise ValueError(f'{axis} {name!r} cannot go with a schedule; give it a number')
    bound = lambda *given: rule(*given, **_at(options, step_of(given)))
  return Choice(name, bound, _reads(rule, options))


def _of_batch(given):
  """Of a rule that gets a whole batch first."""
  return given[0].step


def _of_part(given):
  """Of a rule that gets a micro-batch last."""
  return given[-1].steps[0]


def _scheduled(options):
  return any(callable(value) for value in options.values())


def _at(options, step):
  """Options as they are at a step."""
  return {name: value(step) if callable(value) else value for name, value in options.items()}


def _reads(function, options):
  """The parts that a choice reads: the values of its options named 'part' or '..._part'."""
  defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()
              if p.kind is inspect.Parameter.KEYWORD_ONLY}
  values = (options.get(name, default) for name, default in defaults.items()
            if name == 'part' or name.endswith('_part'))
  return tuple(value for value in values if value and value != 'total')


def _group_advantage(name, rule, options, part):
  rule = functools.partial(rule, **options)

  def estimate(batch, loss_mask):
    del loss_mask
    rewards = reward_of(batch, part)
    return Estimate(rule(rewards, advantages_lib.dense_groups(batch.group_ids),
                         batch.baseline_mask, rewards.shape[0]))

  # A group of one has a signal only where its raw reward is taken for the advantage.
  min_group = 1 if options['singleton'] == 'raw' else 2
  return Advantage(name, estimate, level='trajectory', min_group=min_group)


@ADVANTAGES.register('z')
def _z(*, ddof: int = 0, eps: float = 1e-6, singleton: str = 'zero', part: str = 'total') -> Advantage:
  options = {'ddof': ddof, 'eps': eps, 'singleton': singleton}
  return _group_advantage('z', advantages_lib.group_z, options, part)


@ADVANTAGES.register('center')
def _center(*, singleton: str = 'zero', part: str = 'total') -> Advantage:
  return _group_advantage('center', advantages_lib.group_center, {'singleton': singleton}, part)


@ADVANTAGES.register('loo')
def _loo(*, singleton: str = 'zero', part: str = 'total') -> Advantage:
  return _group_advantage('loo', advantages_lib.group_leave_one_out, {'singleton': singleton}, part)


@ADVANTAGES.register('sum')
def _sum(*, terms: Mapping[str, Mapping[str, Any]]) -> Advantage:
  """Adds advantages of any level on the tokens; each term is an advantage's name and options, and a 'weight'."""
  made, weights = [], []
  for label, term in terms.items():
    options = schedules.made(f'advantage sum, {label}', term)
    weights.append(options.pop('weight', 1.0))
    made.append(advantage(**options))

  def estimate(batch, loss_mask):
    total, returns = jnp.zeros(loss_mask.shape, jnp.float32), None
    for part, weight in zip(made, weights):
      given = part.function(batch, loss_mask)
      plane = credit(part.level).function(given.advantages, batch.trajectory_ids, loss_mask)
      total += (weight(batch.step) if callable(weight) else weight) * plane
      returns = given.returns if returns is None else returns
    return Estimate(total, returns)

  return Advantage('sum', estimate, reads=tuple(name for part in made for name in part.reads), level='token',
                   needs_values=any(part.needs_values for part in made),
                   needs_reference=any(part.needs_reference for part in made),
                   gives_returns=any(part.gives_returns for part in made),
                   min_group=max((part.min_group for part in made), default=1))


@ADVANTAGES.register('gae')
def _gae(*, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True, kl_in_reward: float = 0.0,
         part: str = 'total', turn_part: str = '') -> Advantage:
  check_unit(gamma=gamma, lam=lam)

  def estimate(batch, loss_mask):
    rewards = _token_rewards(batch, reward_of(batch, part), loss_mask, kl_in_reward, turn_part)
    raw, returns = gae_lib.gae(rewards, batch.values, loss_mask, batch.segment_ids, gamma=gamma,
                               lam=lam)
    return Estimate(advantages_lib.global_whiten(raw, loss_mask) if whiten else raw, returns)

  return Advantage('gae', estimate, level='token', needs_values=True,
                   needs_reference=not is_off(kl_in_reward), gives_returns=True)


@ADVANTAGES.register('reward_to_go')
def _reward_to_go(*, gamma: float = 1.0, whiten: bool = True, group_baseline: bool = False,
                  kl_in_reward: float = 0.0, part: str = 'total', turn_part: str = '') -> Advantage:
  check_unit(gamma=gamma)

  def estimate(batch, loss_mask):
    final = reward_of(batch, part)
    if group_baseline:
      groups = advantages_lib.dense_groups(batch.group_ids)
      final = advantages_lib.group_center(final, groups, batch.baseline_mask, final.shape[0])
    rewards = _token_rewards(batch, final, loss_mask, kl_in_reward, turn_part)
    raw, _ = gae_lib.gae(rewards, jnp.zeros_like(rewards), loss_mask, batch.segment_ids,
                         gamma=gamma)
    return Estimate(advantages_lib.global_whiten(raw, loss_mask) if whiten else raw)

  return Advantage('reward_to_go', estimate, level='token', needs_reference=not is_off(kl_in_reward),
                   min_group=2 if group_baseline else 1)


def is_off(number: Any) -> bool:
  """Whether a number is 0, once and for all: what a schedule gives may be 0 for now."""
  return isinstance(number, (int, float)) and number == 0


def _token_rewards(batch, final, loss_mask, kl_in_reward, turn_part):
  """The final and the turns' rewards on their tokens, less the behaviour's divergence from the reference."""
  rewards = gae_lib.place_terminal_reward(final, batch.trajectory_ids, batch.segment_ids, loss_mask)
  if turn_part:
    rewards += jnp.where(loss_mask, batch.token_parts[turn_part], 0.0)
  if not is_off(kl_in_reward):
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


@RATIOS.register('segment_prod')
def _segment_prod(log_probs, batch):
  return ratios.segment_prod(log_probs, batch.behaviour_log_probs, batch.loss_mask,
                             batch.segment_ids, batch.turn_ids)


@RATIOS.register('sequence_geo')
def _sequence_geo(log_probs, batch):
  return ratios.sequence_geo(log_probs, batch.behaviour_log_probs, batch.loss_mask,
                             batch.segment_ids)


@RATIOS.register('trajectory_prod')
def _trajectory_prod(log_probs, batch):
  return ratios.trajectory_prod(log_probs, batch.behaviour_log_probs, batch.loss_mask,
                                batch.segment_ids)


def _without_batch(rule):
  """A clip rule that reads nothing of the batch, as one that could."""
  @functools.wraps(rule)
  def clip_rule(ratio, advantages, log_probs, batch, **bounds):
    del batch
    return rule(ratio, advantages, log_probs, **bounds)
  return clip_rule


for _rule in (clips.none, clips.log_likelihood, clips.asym, clips.recip, clips.weight_sg,
              clips.one_sided_neg):
  CLIPS.register(_rule.__name__)(_without_batch(_rule))
for _rule in (aggregation_lib.tok_mean, aggregation_lib.seq_mean_tok_mean,
              aggregation_lib.seq_mean_tok_sum, aggregation_lib.sum_over_constant):
  AGGREGATIONS.register(_rule.__name__)(_rule)


@REGULARISERS.register('kl')
def _kl(*, estimator: str = 'k3') -> Regulariser:
  """KL penalty to the reference."""
  regularisers.check_estimator(estimator)

  def function(outputs, batch):
    return regularisers.kl(outputs.log_probs, batch.reference_log_probs, batch.loss_mask, estimator=estimator)

  return Regulariser('kl', function, needs_reference=True)


@REGULARISERS.register('entropy')
def _entropy() -> Regulariser:
  """Entropy bonus."""
  def function(outputs, batch):
    return regularisers.entropy(outputs.entropies, batch.loss_mask)

  return Regulariser('entropy', function, needs_entropies=True, maximised=True)


@REGULARISERS.register('value')
def _value(*, clip: float | None = 0.5) -> Regulariser:
  """Regression of the value head."""
  def function(outputs, batch):
    return regularisers.value_loss(outputs.values, batch.values, batch.returns, batch.loss_mask, clip=clip)

  return Regulariser('value', function, needs_values=True)


def _bind(axis: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]):
  """Fixes a choice's options, refusing those it would not read."""
  known = [p.name for p in inspect.signature(function).parameters.values()
           if p.kind is inspect.Parameter.KEYWORD_ONLY]
  for option in options:
    if option not in known:
      raise ValueError(f'{axis} {name!r} cannot go with option {option!r}, which it would '
                       f'not read; it takes {", ".join(known) or "no options"}')
  return functools.partial(function, **options)


def check_unit(**numbers: Any):
  """Raises a ValueError that names the first number outside [0, 1]; what a schedule gives is not looked at."""
  for name, number in numbers.items():
    if isinstance(number, (int, float)) and not 0.0 <= number <= 1.0:
      raise ValueError(f'{name}={number} must lie in [0, 1]')
