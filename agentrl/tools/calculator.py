"""Arithmetic on numbers: the cheapest tool there is, a few microseconds a call."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any, Callable, Mapping

from agentrl.core import types
from agentrl.tools import base

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATORS = '+ - * / // % **'
# About 300 digits, so that integers and floats end at the same magnitude.
_MAX_BITS = 1024
_MAX_LENGTH = 500


class CalculatorError(ValueError):
  """An expression that has no value here, worded for the policy."""


def evaluate(expression: str) -> int | float:
  """Returns the value of an arithmetic expression: numbers, + - * / // % **, signs, parentheses.

  Integers are exact; `/` gives a float, as in Python. Bounded in time and memory for any text.

  Raises:
    CalculatorError: if it is something else, is too long, or its value or one on the way is not
      real, not finite or above 2**1024.
  Example:
    >>> evaluate('2 * (3 + 4) ** 2')
    98
  """
  if len(expression) > _MAX_LENGTH:
    raise CalculatorError(f'expression longer than {_MAX_LENGTH} characters')
  if not expression.strip():
    raise CalculatorError('empty expression')
  try:
    tree = ast.parse(expression.strip(), mode='eval')
    return _value(tree.body)
  except ZeroDivisionError:
    raise CalculatorError('division by zero') from None
  except OverflowError:
    raise CalculatorError('number too large') from None
  except (SyntaxError, UnicodeEncodeError, RecursionError, MemoryError):
    raise CalculatorError('invalid expression') from None


def _value(node: ast.expr) -> int | float:
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return _checked(node.value)
  if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
    return _UNARY[type(node.op)](_value(node.operand))
  if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow):
      _check_power(left, right)
    return _checked(_BINARY[type(node.op)](left, right))
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
    raise CalculatorError('unknown operator ^; a power is **')
  if isinstance(node, ast.Name):
    raise CalculatorError(f'unknown name {node.id[:20]!r}; numbers only')
  raise CalculatorError(f'only numbers, {_OPERATORS} and parentheses are allowed')


def _check_power(base_: int | float, exponent: int | float):
  """Refuses before the work: an integer power can take hours."""
  exact = isinstance(base_, int) and isinstance(exponent, int)
  if exact and exponent > 0 and (abs(base_).bit_length() - 1) * exponent >= _MAX_BITS:
    raise CalculatorError('number too large')


def _checked(value: Any) -> int | float:
  if isinstance(value, complex):
    raise CalculatorError('result is not a real number')
  if isinstance(value, int) and value.bit_length() > _MAX_BITS:
    raise CalculatorError('number too large')
  if isinstance(value, float) and not math.isfinite(value):
    raise CalculatorError('number too large')
  return value


def written(value: int | float) -> str:
  """Returns a number as a person writes it: at most 12 digits of a float, no '.0' at the end.

  Example:
    >>> written(6 / 2), written(0.1 + 0.2), written(1 / 3)
    ('3', '0.3', '0.333333333333')
  """
  return str(value) if isinstance(value, int) else f'{value:.12g}'


@base.TOOLS.register('calculator')
class Calculator(base.Tool):
  """Evaluates an arithmetic expression; see `evaluate` and `written`."""

  name = 'calculator'
  description = 'Evaluates an arithmetic expression.'
  parameters = {
      'type': 'object',
      'properties': {
          'expression': {'type': 'string', 'description': f'Numbers, {_OPERATORS}, ().'}},
      'required': ['expression'],
      'additionalProperties': False,
  }

  async def call(self, state: None, arguments: Mapping[str, Any]) -> types.ToolResult:
    """Returns the value, or why there is none."""
    try:
      return base.success(written(evaluate(arguments['expression'])))
    except CalculatorError as error:
      return base.failure('raised', str(error))
