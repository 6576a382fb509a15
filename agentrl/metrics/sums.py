"""Metrics that carry their denominators, so that micro-batches and shards cannot change a mean."""

from __future__ import annotations

import functools
from typing import Any, Iterable, Mapping, NamedTuple

import numpy as np


class Sum(NamedTuple):
  """A mean that has not been divided yet. As a pytree of two arrays it passes through jit and scan.

  Attributes:
    numerator: Scalar, sum of the values.
    denominator: Scalar, their count or total weight; 0 where there were none.
  """

  numerator: Any
  denominator: Any = 1.0


class Max(NamedTuple):
  """A largest value; -inf where there were none."""

  value: Any


Metric = Any  # Sum, Max, or a plain number, which counts as Sum(number, 1).


def add(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> dict[str, Metric]:
  """Returns the metrics of two micro-batches as those of one; works under jit.

  Args:
    a: Metrics by name. A name may be missing on either side.
    b: Metrics by name.
  Returns:
    Sums added, maxima compared; plain numbers have become sums.
  Raises:
    TypeError: if a name is a sum on one side and a maximum on the other.
  Example:
    >>> add({'loss': Sum(6.0, 3.0)}, {'loss': Sum(0.0, 1.0)})
    {'loss': Sum(numerator=6.0, denominator=4.0)}
  """
  merged = {name: _lift(metric) for name, metric in a.items()}
  for name, metric in b.items():
    metric = _lift(metric)
    merged[name] = _add_one(name, merged[name], metric) if name in merged else metric
  return merged


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
  """Returns the metrics of all micro-batches as those of one batch; {} for none."""
  return functools.reduce(add, parts, {})


def finalize(metrics: Mapping[str, Metric]) -> dict[str, float]:
  """Divides at last, on the host: blocks until the values are there.

  Args:
    metrics: Metrics by name.
  Returns:
    Floats by name; NaN where a denominator is 0.
  Example:
    >>> finalize({'loss': Sum(6.0, 4.0), 'ratio_max': Max(1.25), 'lr': 0.5})
    {'loss': 1.5, 'ratio_max': 1.25, 'lr': 0.5}
  """
  return {name: _value(_lift(metric)) for name, metric in metrics.items()}


def _lift(metric: Metric) -> Sum | Max:
  return metric if isinstance(metric, (Sum, Max)) else Sum(metric, 1.0)


def _add_one(name: str, a: Sum | Max, b: Sum | Max) -> Sum | Max:
  if type(a) is not type(b):
    raise TypeError(
        f'metric {name!r} is a {type(a).__name__} in one part and a {type(b).__name__} in another')
  if isinstance(a, Sum):
    return Sum(a.numerator + b.numerator, a.denominator + b.denominator)
  if isinstance(a.value, (int, float)) and isinstance(b.value, (int, float)):
    return Max(max(a.value, b.value))
  import jax.numpy as jnp  # Only arrays need it; host tools that merge floats start faster.
  return Max(jnp.maximum(a.value, b.value))


def _value(metric: Sum | Max) -> float:
  if isinstance(metric, Max):
    return float(np.asarray(metric.value))
  numerator, denominator = (float(np.asarray(x)) for x in metric)
  return numerator / denominator if denominator else float('nan')
