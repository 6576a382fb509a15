"""Puts an objective together from named choices: one for each axis of each channel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping

from agentrl.algorithms import OBJECTIVES, choices, schedules
from agentrl.algorithms.channel import Advantage, Channel, Choice, Regulariser
from agentrl.algorithms.objective import Objective
from agentrl.core import registry


@OBJECTIVES.register('compose')
def compose(*, channels: Mapping[str, Mapping[str, Any]] | None = None,
            regularisers: Mapping[str, Any] | None = None, aggregation: Any = 'tok_mean') -> Objective:
  """Returns the objective that a config spells out.

  A choice is a name, or a section with the name and the options of that choice; any of their
  numbers may be a schedule, see `schedules`. What is left out of a channel is GRPO's.

      channels = {'accuracy': {'advantage': {'name': 'z', 'part': 'accuracy'}},
                  'economy': {'advantage': 'cond_z', 'weight': .15, 'rows': 'right'}}
      regularisers = {'kl': .001, 'entropy': {'coef': .01, 'aggregation': 'seq_mean_tok_mean'}}

  Args:
    channels: By the name they have in the metrics. Keys of one: 'advantage' ('z'), 'ratio'
      ('token'), 'clip' ('asym'), 'aggregation', 'weight' (1), and 'rows', 'maps', 'filters', each a
      choice or a tuple of several. None is one channel 'policy' of GRPO.
    regularisers: Coefficient, or a section with 'coef', perhaps 'aggregation', and options, by
      name. A section's 'name' is the regulariser's, where it is listed under another. One that reads
      advantages has an option 'channel', the name of the one whose they are; without it, of the only one.
    aggregation: Of every term that names none.
  Raises:
    UnknownNameError: if there is no choice of a name; the known ones are listed.
    ValueError: if choices cannot go together, or one does not take an option.
  Example:
    >>> compose(channels={'policy': {'clip': {'name': 'asym', 'high': .28}}}).min_group
    2
  """
  made = tuple(registry.call(f'channel {name!r}', channel, {'name': name, 'default': aggregation, **parts})
               for name, parts in (channels or {'policy': {}}).items())
  names = [c.name for c in made]
  extra = (_regulariser(name, value, aggregation, names) for name, value in (regularisers or {}).items())
  return Objective('compose', made, tuple(r for r in extra if r is not None))


def channel(*, name: str, default: Any = 'tok_mean', advantage: Any = 'z', ratio: Any = 'token', clip: Any = 'asym',
            aggregation: Any = None, weight: Any = 1.0, rows: Any = (), maps: Any = (),
            filters: Any = ()) -> Channel:
  """Returns a channel; see `compose` for what its choices may be."""
  estimator = _make(choices.advantage, advantage)
  return Channel(
      estimator, choices.credit(estimator.level), _make(choices.ratio, ratio), _make(choices.clip, clip),
      _make(choices.aggregation, aggregation or default), schedules.make('weight', weight),
      _several(choices.rows, rows), _several(choices.credit_map, maps), _several(choices.channel_filter, filters),
      name)


def _make(factory, choice: Any):
  if isinstance(choice, str):
    return factory(choice)
  options = schedules.made('a choice', choice)
  return factory(registry.pop_name('a choice', options), **options)


def _several(factory, given: Any) -> tuple[Choice, ...]:
  """One choice, or several in order."""
  if isinstance(given, (str, Mapping)):
    given = (given,)
  return tuple(_make(factory, choice) for choice in given)


def _regulariser(label: str, value: Any, default: Any, channels: list[str]) -> Regulariser | None:
  if not isinstance(value, Mapping) or schedules.is_schedule(value):
    value = {'coef': value}
  options = schedules.made(label, value)
  coefficient = options.pop('coef', 1.0)
  aggregation = _make(choices.aggregation, options.pop('aggregation', default))
  name = options.pop('name', label)
  if choices.reads_a_channel(name):
    options['channel'] = _index(label, options.get('channel'), channels)
  made = choices.regulariser(name, **options)
  return _weighted(made, label, coefficient, aggregation)


def _index(label: str, channel: str | None, channels: list[str]) -> int:
  """Returns which of the channels has that name; the only one has it without being named."""
  if channel is None and len(channels) == 1:
    return 0
  if channel not in channels:
    raise ValueError(f'regulariser {label!r} reads the advantages of a channel and cannot go with channel={channel!r} '
                     f'where there are {", ".join(channels)}; name one of them')
  return channels.index(channel)


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
  one = Channel(advantage, choices.credit(advantage.level), ratio, clip, aggregation)
  return Objective(name, (one,), tuple(r for r in extra if r is not None))


def kl(coefficient: float, estimator: str, aggregation: Choice) -> Regulariser | None:
  """Returns the KL penalty to the reference; None if its coefficient is 0."""
  return _weighted(choices.regulariser('kl', estimator=estimator), 'kl', coefficient, aggregation)


def entropy(coefficient: float, aggregation: Choice) -> Regulariser | None:
  """Returns the entropy bonus; None if its coefficient is 0."""
  return _weighted(choices.regulariser('entropy'), 'entropy', coefficient, aggregation)


def value(coefficient: float, clip: float | None, aggregation: Choice) -> Regulariser | None:
  """Returns the value head's regression; None if its coefficient is 0."""
  return _weighted(choices.regulariser('value', clip=clip), 'value', coefficient, aggregation)


def _weighted(made: Regulariser, label: str, coefficient: Any, aggregation: Choice) -> Regulariser | None:
  if not callable(coefficient):
    if not (math.isfinite(coefficient) and coefficient >= 0):
      raise ValueError(f'{label}_coef={coefficient} must be finite and not negative')
    if not coefficient:
      return None
  return dataclasses.replace(made, name=label, coefficient=coefficient, aggregation=aggregation)
