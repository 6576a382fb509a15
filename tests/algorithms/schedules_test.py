"""Schedules: values at the ends and in the middle, from the formulas in their docstrings."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from agentrl.algorithms import schedules

HALF = {'start': 1.0, 'end': 3.0, 'steps': 4, 'after': 2}


@pytest.mark.parametrize('name, at, expected', [
    ('linear', 0, 1.0), ('linear', 2, 1.0), ('linear', 3, 1.5), ('linear', 6, 3.0), ('linear', 99, 3.0),
    ('cosine', 2, 1.0), ('cosine', 4, 2.0), ('cosine', 3, 1.0 + (1 - np.cos(np.pi / 4))), ('cosine', 9, 3.0),
])
def test_values(name, at, expected):
  value = schedules.make('x', {'schedule': name, **HALF})
  np.testing.assert_allclose(value(at), expected, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(value)(at), expected, rtol=1e-6)


def test_a_switch_changes_at_its_step():
  value = schedules.make('x', {'schedule': 'switch', 'before': 1.0, 'after': 2.0, 'at': 3})
  assert [float(value(step)) for step in (0, 2, 3, 4)] == [1, 1, 2, 2]


def test_numbers_stay_what_they_are():
  assert schedules.make('x', 0.5) == 0.5 and schedules.make('x', None) is None
  assert not schedules.is_schedule(0.5) and not schedules.is_schedule({'name': 'z'})


@pytest.mark.parametrize('value, message', [
    ({'start': 1.0}, "without 'schedule'.*linear"),
    ({'schedule': 'linear', 'start': 1.0}, 'x: missing a required'),
    ({'schedule': 'linaer', **HALF}, "did you mean 'linear'"),
])
def test_what_is_no_schedule_is_refused(value, message):
  with pytest.raises((ValueError, LookupError), match=message):
    schedules.make('x', value)
