"""JSON schemas of tool arguments: made from a Python signature, checked against a call."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from typing import Any, Callable, Mapping

_TYPES = {str: 'string', int: 'integer', float: 'number', bool: 'boolean', list: 'array',
          dict: 'object', type(None): 'null'}


def from_function(fn: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
  """Returns the description and the argument schema of a typed function with a Google docstring.

  Understood annotations: str, int, float, bool, None, list, list[T], dict, dict[str, T], Literal,
  unions of these, and Any.

  Returns:
    The docstring's first paragraph on one line, and a JSON schema of type 'object'.
  Raises:
    TypeError: if a parameter has no annotation or one that is not understood, or cannot be given by
      name.
  Example:
    >>> def add(a: int, b: int = 1) -> int:
    ...   '''Adds two integers.
    ...
    ...   Args:
    ...     a: The first.
    ...   '''
    >>> description, schema = from_function(add)
    >>> description, schema['properties']['a'], schema['required']
    ('Adds two integers.', {'type': 'integer', 'description': 'The first.'}, ['a'])
  """
  doc = inspect.getdoc(fn) or ''
  described = _described_arguments(doc)
  hints = typing.get_type_hints(fn)
  properties, required = {}, []
  for name, parameter in inspect.signature(fn).parameters.items():
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
      raise TypeError(f'tool {fn.__name__}: {parameter} cannot be given by name')
    if name not in hints:
      raise TypeError(f'tool {fn.__name__}: parameter {name!r} has no type annotation')
    properties[name] = _from_annotation(hints[name], f'tool {fn.__name__}: parameter {name!r}')
    if name in described:
      properties[name]['description'] = described[name]
    if parameter.default is parameter.empty:
      required.append(name)
    else:
      properties[name]['default'] = parameter.default
  schema = {'type': 'object', 'properties': properties, 'required': required,
            'additionalProperties': False}
  return ' '.join(doc.split('\n\n')[0].split()), schema


def _from_annotation(annotation: Any, where: str) -> dict[str, Any]:
  origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return {}
  if annotation in _TYPES:
    return {'type': _TYPES[annotation]}
  if origin is typing.Literal:
    return {'enum': list(inner)}
  if origin in (typing.Union, types.UnionType):
    return {'anyOf': [_from_annotation(a, where) for a in inner]}
  if origin is list:
    return {'type': 'array', 'items': _from_annotation(inner[0], where)}
  if origin is dict and inner[0] is str:
    return {'type': 'object', 'additionalProperties': _from_annotation(inner[1], where)}
  raise TypeError(f'{where}: annotation {annotation} has no JSON schema')


def _described_arguments(doc: str) -> dict[str, str]:
  """Reads the Args section of a cleaned docstring: name to description, on one line."""
  section = re.search(r'^Args:\n((?:[ \t]+\S.*\n?|\n)+)', doc, re.MULTILINE)
  if not section:
    return {}
  body = inspect.cleandoc(section.group(1))
  entries = re.findall(r'^(\w+)(?: \([^)]*\))?:[ \t]*(.*(?:\n[ \t]+.*)*)', body, re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in entries}


def problem(value: Any, schema: Mapping[str, Any], name: str = '') -> str | None:
  """Returns what is wrong with a JSON value, worded for the policy, or None if it fits.

  Reads the keywords that `from_function` writes (type, enum, anyOf, items, properties, required,
  additionalProperties); others are not checked.

  Args:
    value: A JSON value; for a call, its arguments by name.
    schema: JSON schema.
    name: How to call the value in the message; '' for the arguments of a call.
  Example:
    >>> schema = {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'required': ['a']}
    >>> problem({'a': 'x'}, schema)
    "argument 'a' must be integer, got 'x'"
    >>> problem({}, schema)
    "missing argument 'a'"
  """
  if 'anyOf' in schema:
    if any(problem(value, option, name) is None for option in schema['anyOf']):
      return None
    allowed = ' or '.join(_kind(option) for option in schema['anyOf'])
    return f'{_called(name)} must be {allowed}, got {_short(value)}'
  if 'enum' in schema and not any(type(value) is type(e) and value == e for e in schema['enum']):
    return f'{_called(name)} must be {_kind(schema)}, got {_short(value)}'
  if 'type' in schema and not _is_type(value, schema['type']):
    return f'{_called(name)} must be {schema["type"]}, got {_short(value)}'
  if isinstance(value, Mapping):
    return _object_problem(value, schema, name)
  if isinstance(value, list) and 'items' in schema:
    found = (problem(v, schema['items'], f'{name}[{i}]') for i, v in enumerate(value))
    return next((p for p in found if p), None)
  return None


def _object_problem(value: Mapping[str, Any], schema: Mapping[str, Any], name: str) -> str | None:
  properties = schema.get('properties', {})
  prefix = f'{name}.' if name else ''
  for key in schema.get('required', ()):
    if key not in value:
      return f'missing {_called(prefix + key)}'
  for key, item in value.items():
    other = schema.get('additionalProperties', True)
    if key in properties:
      found = problem(item, properties[key], prefix + key)
    elif other is False:
      known = ', '.join(properties) or 'no arguments'
      return f'unknown {_called(prefix + str(key))}, expected: {known}'
    else:
      found = problem(item, other, prefix + str(key)) if isinstance(other, Mapping) else None
    if found:
      return found
  return None


def _is_type(value: Any, kind: str) -> bool:
  if kind == 'number':
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if kind == 'integer':
    return isinstance(value, int) and not isinstance(value, bool)
  python = {'string': str, 'boolean': bool, 'array': list, 'object': Mapping, 'null': type(None)}
  return isinstance(value, python[kind])


def _called(name: str) -> str:
  return f"argument '{_short(name)[1:-1]}'" if name else 'arguments'


def _kind(schema: Mapping[str, Any]) -> str:
  return ' or '.join(repr(e) for e in schema['enum']) if 'enum' in schema else schema.get(
      'type', 'any')


def _short(value: Any) -> str:
  """Shows a value the policy wrote; long ones are cut, because observations cost tokens."""
  text = value if isinstance(value, str) else json.dumps(value, default=str)
  text = text if len(text) <= 40 else text[:37] + '...'
  return repr(text) if isinstance(value, str) else text
