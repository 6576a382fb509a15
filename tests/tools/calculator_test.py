"""Tests of the calculator. Python is the oracle for values; refusals follow from the limits."""

from __future__ import annotations

import asyncio
import doctest
import time

import hypothesis
from hypothesis import strategies as st
import pytest

from agentrl.tools import calculator

NUMBERS = st.integers(-1000, 1000).map(str).map('({})'.format)
EXPRESSIONS = st.recursive(
    NUMBERS, lambda inner: st.tuples(inner, st.sampled_from(['+', '-', '*', '/', '//', '%']), inner)
    .map(lambda t: '({}{} {})'.format(*t)), max_leaves=6)


@hypothesis.given(EXPRESSIONS)
def test_agrees_with_python(expression):
  try:
    expected = eval(expression)
  except ZeroDivisionError:
    with pytest.raises(calculator.CalculatorError, match='division by zero'):
      calculator.evaluate(expression)
  else:
    assert calculator.evaluate(expression) == expected


@pytest.mark.parametrize('expression, expected', [
    ('-2 ** 2', -4), ('2 ** -1', 0.5), (' 1_000 + 1 ', 1001), ('+(-3)', -3), ('7 // -2', -4),
    ('2 ** 1023', 2 ** 1023), ('(-1) ** 3', -1), ('1 ** (10 ** 300)', 1),
])
def test_values(expression, expected):
  assert calculator.evaluate(expression) == expected


@pytest.mark.parametrize('expression, message', [
    ('9 ** 9 ** 9', 'number too large'), ('2 ** 1024', 'number too large'),
    ('1e308 * 10', 'number too large'), ('1e999', 'number too large'),
    ('2.0 ** 5000', 'number too large'), ('10**300 * 10**300', 'number too large'),
    ('9' * 400, 'number too large'), ('9' * 501, 'longer than 500'),
    ('(-1) ** 0.5', 'not a real number'), ('1 +', 'invalid expression'), ('', 'empty expression'),
    ('(' * 240 + '1' + ')' * 240, 'invalid expression'), ('2 ^ 3', r'a power is \*\*'),
    ('x + 1', "unknown name 'x'"), ('True', 'only numbers'), ('"a" * 3', 'only numbers'),
    ('__import__("os")', 'only numbers'), ('1, 2', 'only numbers'), ('1 << 5', 'only numbers'),
    ('1j * 1j', 'only numbers'), ('\ud800', 'invalid expression'), ('\x00', 'invalid expression'),
    ('0 ** -1', 'division by zero'), ('5 % 0', 'division by zero'),
])
def test_refusals_are_quick_and_say_why(expression, message):
  start = time.monotonic()
  with pytest.raises(calculator.CalculatorError, match=message):
    calculator.evaluate(expression)
  assert time.monotonic() - start < 0.5


def test_the_tool_answers_values_and_errors():
  tool = calculator.Calculator()
  good = asyncio.run(tool.call(None, {'expression': '6 / 2'}))
  bad = asyncio.run(tool.call(None, {'expression': '1 / 0'}))
  assert (good.text, good.ok) == ('3', True)
  assert (bad.text, bad.ok, bad.error) == ('error: division by zero', False, 'raised')


def test_doctest():
  assert doctest.testmod(calculator).failed == 0
