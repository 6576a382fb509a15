"""Holds the level table of the package and reads every import, function-local ones too.

A package imports packages of lower levels and itself. Where two packages share a level, neither
imports the other. Host-only code imports no jax, directly or through what it imports.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_LEVELS = {
    'core': 0,
    'metrics': 1, 'sharding': 1, 'tokens': 1, 'tools': 1,
    'models': 2, 'data': 2, 'rewards': 2, 'algorithms': 2, 'experience': 2, 'checkpointing': 2,
    'sampling': 3, 'envs': 3,
    'rollout': 4,
    'agents': 5,
    'evaluation': 6, 'synthesis': 6,
    'training': 7,
    'viz': 8,
    'main': 9,
}
_HOST_ONLY = ('tools', 'rewards', 'experience', 'envs', 'core/types', 'core/config',
              'core/command_line', 'tokens/formats', 'tokens/call_formats')
_JAX = {'jax', 'jaxlib', 'flax', 'optax', 'chex', 'orbax'}
# These read only what a run left on disk: of agentrl they may import the two lowest levels and the
# modules that define what the files look like.
_READS_FOLDERS_ONLY = ('viz',)
_FILE_FORMATS = ('agentrl.rollout.store',)


def imports(source: str, module: str) -> set[str]:
  """Returns the full names that a module imports, wherever in it.

  Args:
    source: Text of the module.
    module: Its dotted name, against which relative imports are resolved; a package's own name ends
      in `.__init__`.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      parent = module.split('.')[:-node.level] if node.level else []
      base = '.'.join(parent + ([node.module] if node.module else []))
      found.update(f'{base}.{alias.name}' for alias in node.names)
  return found


def package_of(name: str) -> str | None:
  """Returns the subpackage of agentrl that a full name lies in; None if in none."""
  parts = name.split('.')
  return parts[1] if parts[0] == 'agentrl' and len(parts) > 1 else None


def violations(source: str, module: str) -> list[str]:
  """Returns the imports of a module that the level table forbids, in words."""
  own = package_of(module)
  bad = []
  for name in sorted(imports(source, module)):
    other = package_of(name)
    if name.partition('.')[0] != 'agentrl' or other == own:
      continue
    if other not in _LEVELS:
      bad.append(f'{module} imports {name}, which is in no package of the table')
    elif _LEVELS[other] >= _LEVELS[own]:
      bad.append(f'{module} (level {_LEVELS[own]}) imports {name} (level {_LEVELS[other]})')
    elif own in _READS_FOLDERS_ONLY and _LEVELS[other] > 1 and not name.startswith(_FILE_FORMATS):
      bad.append(f'{module} reads run folders only, yet imports {name}')
  return bad


def jax_imports(source: str, module: str) -> list[str]:
  """Returns what a module imports of jax and the libraries that need it."""
  return sorted(name for name in imports(source, module) if name.partition('.')[0] in _JAX)


def prints(source: str) -> list[int]:
  """Returns the lines that call the built-in print."""
  return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
          and isinstance(node.func, ast.Name) and node.func.id == 'print']


def _modules() -> dict[str, pathlib.Path]:
  files = sorted((_ROOT / 'agentrl').rglob('*.py'))
  return {'.'.join(path.relative_to(_ROOT).with_suffix('').parts): path for path in files}


def _is_host_only(module: str) -> bool:
  path = module.replace('.', '/').removeprefix('agentrl/')
  return any(path == entry or path.startswith(f'{entry}/') for entry in _HOST_ONLY)


_MODULES = _modules()
_HOST_MODULES = [module for module in _MODULES if _is_host_only(module)]


def test_every_module_lies_in_a_package_of_the_table():
  packages = {package_of(module) for module in _MODULES} - {'__init__'}
  assert packages <= set(_LEVELS)


def test_every_file_lies_in_an_importable_package():
  folders = {path.parent for path in _MODULES.values()}
  assert [str(folder) for folder in folders if not (folder / '__init__.py').exists()] == []


@pytest.mark.parametrize('module', [m for m in _MODULES if package_of(m) != '__init__'])
def test_imports_go_to_lower_levels(module):
  assert violations(_MODULES[module].read_text(), module) == []


def test_the_top_package_imports_nothing_of_itself():
  source = (_ROOT / 'agentrl' / '__init__.py').read_text()
  assert [name for name in imports(source, 'agentrl.__init__') if name.startswith('agentrl')] == []


@pytest.mark.parametrize('module', _HOST_MODULES)
def test_host_only_modules_do_not_import_jax(module):
  assert jax_imports(_MODULES[module].read_text(), module) == []


def test_host_only_modules_load_without_jax():
  # What they import of other packages counts as well: jax made unimportable, all of them must load.
  code = 'import importlib, sys\n'
  code += ''.join(f'sys.modules[{name!r}] = None\n' for name in sorted(_JAX))
  code += f'for name in {_HOST_MODULES!r}: importlib.import_module(name.removesuffix(".__init__"))'
  done = subprocess.run([sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('module', _MODULES)
def test_nothing_prints(module):
  assert prints(_MODULES[module].read_text()) == []


@pytest.mark.parametrize('source, module, count', [
    ('import agentrl.core.types', 'agentrl.tools.base', 0),
    ('from agentrl.tools import executor', 'agentrl.tools.base', 0),
    ('from agentrl.tokens import chat', 'agentrl.tools.base', 1),
    ('from agentrl import training', 'agentrl.models.layers', 1),
    ('def f():\n  import agentrl.rollout.engine', 'agentrl.sampling.decode', 1),
    ('from ..rollout import engine', 'agentrl.sampling.decode', 1),
    ('from . import logits', 'agentrl.sampling.decode', 0),
    ('from .. import rollout', 'agentrl.sampling.__init__', 1),
    ('from agentrl import nowhere', 'agentrl.sampling.decode', 1),
    ('from agentrl.training import loop', 'agentrl.viz.report', 1),
    ('from agentrl.models import layers', 'agentrl.viz.report', 1),
    ('from agentrl.core import types', 'agentrl.viz.report', 0),
    ('from agentrl.rollout import store', 'agentrl.viz.report', 0),
    ('from agentrl.rollout import engine', 'agentrl.viz.report', 1),
    ('import numpy as agentrl', 'agentrl.core.types', 0),
])
def test_the_check_sees_what_it_is_for(source, module, count):
  assert len(violations(source, module)) == count


def test_the_check_sees_jax_and_prints_inside_functions():
  source = 'def f():\n  from jax import numpy\n  print(1)\n'
  assert jax_imports(source, 'agentrl.tools.base') == ['jax.numpy']
  assert prints(source) == [3]
