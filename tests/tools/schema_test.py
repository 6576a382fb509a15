"""Tests of argument schemas. Expected schemas are written out by hand from the signatures."""

from __future__ import annotations

import doctest
from typing import Any, Literal, Optional

import pytest

from agentrl.tools import schema


def search(query: str, limit: int = 3, mode: Literal['fast', 'exact'] = 'fast',
           tags: list[str] | None = None, weights: Optional[dict[str, float]] = None,
           extra: Any = None):
  """Searches
  the index.

  More about it.

  Args:
    query: What to look for,
      in words.
    limit (int): Most hits.

  Returns:
    Hits.
  """


def test_schema_of_a_function():
  description, made = schema.from_function(search)
  assert description == 'Searches the index.'
  assert made == {
      'type': 'object',
      'properties': {
          'query': {'type': 'string', 'description': 'What to look for, in words.'},
          'limit': {'type': 'integer', 'description': 'Most hits.', 'default': 3},
          'mode': {'enum': ['fast', 'exact'], 'default': 'fast'},
          'tags': {'anyOf': [{'type': 'array', 'items': {'type': 'string'}}, {'type': 'null'}],
                   'default': None},
          'weights': {'anyOf': [{'type': 'object', 'additionalProperties': {'type': 'number'}},
                                {'type': 'null'}], 'default': None},
          'extra': {'default': None},
      },
      'required': ['query'],
      'additionalProperties': False,
  }


@pytest.mark.parametrize('arguments', [
    {'query': 'x'}, {'query': '', 'limit': 0}, {'query': 'x', 'mode': 'exact'},
    {'query': 'x', 'tags': ['a']}, {'query': 'x', 'tags': None},
    {'query': 'x', 'weights': {'a': 1, 'b': 2.5}}, {'query': 'x', 'extra': [{}]},
])
def test_arguments_that_fit(arguments):
  assert schema.problem(arguments, schema.from_function(search)[1]) is None


@pytest.mark.parametrize('arguments, expected', [
    ({}, "missing argument 'query'"),
    ({'query': 1}, "argument 'query' must be string, got 1"),
    ({'query': 'x', 'limit': '3'}, "argument 'limit' must be integer, got '3'"),
    ({'query': 'x', 'limit': 3.5}, "argument 'limit' must be integer, got 3.5"),
    ({'query': 'x', 'limit': True}, "argument 'limit' must be integer, got true"),
    ({'query': 'x', 'mode': 'slow'}, "argument 'mode' must be 'fast' or 'exact', got 'slow'"),
    ({'query': 'x', 'tags': 'a'}, "argument 'tags' must be array or null, got 'a'"),
    ({'query': 'x', 'nope': 1},
     "unknown argument 'nope', expected: query, limit, mode, tags, weights, extra"),
])
def test_arguments_that_do_not_fit(arguments, expected):
  assert schema.problem(arguments, schema.from_function(search)[1]) == expected


def test_what_the_policy_wrote_is_shown_cut():
  closed = {'type': 'object', 'additionalProperties': False}
  message = schema.problem({'x' * 500: 'y' * 500}, closed)
  assert len(message) < 100


def test_items_and_nested_objects_are_named():
  nested = {'type': 'object', 'properties': {
      'a': {'type': 'array', 'items': {'type': 'integer'}},
      'b': {'type': 'object', 'properties': {'c': {'type': 'string'}}, 'required': ['c']}}}
  assert schema.problem({'a': [1, 'x']}, nested) == "argument 'a[1]' must be integer, got 'x'"
  assert schema.problem({'b': {}}, nested) == "missing argument 'b.c'"


def untyped(a):
  """No annotation."""


def variadic(*a: int):
  """No names."""


def strange(a: complex):
  """No schema."""


@pytest.mark.parametrize('fn, message', [(untyped, 'no type annotation'), (variadic, 'by name'),
                                         (strange, 'no JSON schema')])
def test_functions_without_a_schema_are_refused(fn, message):
  with pytest.raises(TypeError, match=message):
    schema.from_function(fn)


def test_doctest():
  assert doctest.testmod(schema).failed == 0
