"""Runs the examples in the package's docstrings: what they print is what they say."""

from __future__ import annotations

import doctest
import importlib
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = [path for path in sorted((_ROOT / 'agentrl').rglob('*.py')) if '>>>' in path.read_text()]


@pytest.mark.parametrize('file', _FILES, ids=lambda f: str(f.relative_to(_ROOT)))
def test_examples_of(file):
  name = '.'.join(file.relative_to(_ROOT).with_suffix('').parts)
  module = importlib.import_module(name.removesuffix('.__init__'))
  result = doctest.testmod(module)
  assert result.attempted > 0 and result.failed == 0
