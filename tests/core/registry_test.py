"""Tests of the registry. Expected values are names registered in the test itself."""

from __future__ import annotations

import doctest

import pytest

from agentrl.core import registry


def test_a_registered_value_is_found_and_handed_back():
  shapes = registry.Registry('shape')
  value = object()
  assert shapes.register('round')(value) is value
  assert shapes.get('round') is value


def test_an_unknown_name_lists_the_known_and_the_nearest():
  shapes = registry.Registry('shape')
  shapes.register('square')(1)
  shapes.register('circle')(2)
  with pytest.raises(registry.UnknownNameError) as error:
    shapes.get('circel')
  assert "unknown shape 'circel'" in str(error.value)
  assert "did you mean 'circle'" in str(error.value)
  assert 'circle, square' in str(error.value)


def test_a_second_registration_raises_and_keeps_the_first():
  shapes = registry.Registry('shape')
  shapes.register('square')(1)
  with pytest.raises(ValueError, match="'square' is registered already"):
    shapes.register('square')(2)
  assert shapes.get('square') == 1


def test_a_module_of_the_package_registers_itself_when_asked_for(tmp_path, monkeypatch):
  package = tmp_path / 'shapes_of_this_test'
  package.mkdir()
  (package / '__init__.py').write_text(
      'from agentrl.core.registry import Registry\n'
      "SHAPES = Registry('shape', package=__name__)\n")
  (package / 'oval.py').write_text(
      'from shapes_of_this_test import SHAPES\n'
      "SHAPES.register('oval')('an oval')\n")
  monkeypatch.syspath_prepend(tmp_path)
  import shapes_of_this_test
  assert shapes_of_this_test.SHAPES.get('oval') == 'an oval'
  with pytest.raises(registry.UnknownNameError, match='Known: oval'):
    shapes_of_this_test.SHAPES.get('../oval')


def test_doctest():
  assert doctest.testmod(registry).failed == 0
