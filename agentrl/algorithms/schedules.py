"""Numbers that change: of an objective over the updates of a stage, of selectors and rewards over its steps.

In a config a schedule is a section instead of a number:

    {'schedule': 'cosine', 'start': 0.0, 'end': 1.0, 'steps': 200}
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

import jax.numpy as jnp

from agentrl.core import registry

Scalar = Any  # a number, or a function of the step
SCHEDULES: registry.Registry[Callable[..., Any]] = registry.Registry('schedule', package='agentrl.algorithms')


def make(section: str, value: Any) -> Scalar:
  """Returns a number as it is, and a section as the function of the step that it describes.

  Args:
    section: Where it stands, for messages.
    value: A number, None, a function, or a mapping with 'schedule' and the options of that one.
  Raises:
    ValueError: if the mapping has no 'schedule', or options that do not fit.
  Example:
    >>> make('weight', 0.5)
    0.5
    >>> float(make('weight', {'schedule': 'linear', 'start': 0.0, 'end': 1.0, 'steps': 4})(1))
    0.25
  """
  if not isinstance(value, Mapping):
    return value
  options = dict(value)
  if 'schedule' not in options:
    raise ValueError(f"{section} is a section without 'schedule'; write a number, or name one of "
                     f'{", ".join(SCHEDULES.names())}')
  return registry.call(section, SCHEDULES.get(options.pop('schedule')), options)


def made(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns options in which each schedule has become a function of the step; others, sections too, stay as they are.

  Example:
    >>> sorted(made('clip', {'low': .2, 'high': {'schedule': 'switch', 'before': .2, 'after': .3, 'at': 5}}))
    ['high', 'low']
  """
  return {key: make(f'{section}, {key}', value) if is_schedule(value) else value for key, value in options.items()}


def on_host(options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns options in which each schedule has become a function from the step of a stage to a Python number.

  Example:
    >>> on_host({'share': {'schedule': 'linear', 'start': 0.0, 'end': 1.0, 'steps': 4}})['share'](1)
    0.25
  """
  found = made('options', options)
  return {key: (lambda step, f=value: float(f(step))) if is_schedule(options[key]) else value
          for key, value in found.items()}


def is_schedule(value: Any) -> bool:
  """Whether a config's value describes a schedule."""
  return isinstance(value, Mapping) and 'schedule' in value


@SCHEDULES.register('linear')
def linear(*, start: float, end: float, steps: int, after: int = 0) -> Callable[[Any], Any]:
  """Goes from `start` at step `after` to `end`, `steps` later, and stays there.

      value = start + (end - start) clip((step - after) / steps, 0, 1)
  """
  return lambda step: start + (end - start) * _progress(step, after, steps)


@SCHEDULES.register('cosine')
def cosine(*, start: float, end: float, steps: int, after: int = 0) -> Callable[[Any], Any]:
  """Goes from `start` to `end` along half a cosine, flat at both ends.

      value = start + (end - start) (1 - cos(pi p)) / 2,    p = clip((step - after) / steps, 0, 1)
  """
  return lambda step: start + (end - start) * (1.0 - jnp.cos(jnp.pi * _progress(step, after, steps))) / 2.0


@SCHEDULES.register('switch')
def switch(*, before: float, after: float, at: int) -> Callable[[Any], Any]:
  """Is `before` at the steps below `at` and `after` from there on."""
  return lambda step: jnp.where(jnp.asarray(step) < at, jnp.float32(before), jnp.float32(after))


def _progress(step, after, steps):
  if steps < 1:
    raise ValueError(f'steps={steps} of a schedule must be at least 1')
  return jnp.clip((jnp.asarray(step, jnp.float32) - after) / steps, 0.0, 1.0)
