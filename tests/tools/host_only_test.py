"""Tools and environments run on machines that have no accelerator, and no jax."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = '''
import importlib.abc, pkgutil, sys

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'optax', 'tensorflow'):
      raise ImportError(f'{name} is not for host-only packages')

sys.meta_path.insert(0, Refuse())
import agentrl.core, agentrl.core.types, agentrl.core.registry
import agentrl.tools, agentrl.envs, agentrl.tokens.formats
print(*agentrl.tools.TOOLS.names())
print(*agentrl.envs.ENVIRONMENTS.names())
try:
  import jax
except ImportError:
  print('refused')
'''


def test_host_only_packages_import_without_jax():
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stderr
  tools, environments, jax = done.stdout.splitlines()
  assert {'calculator', 'python'} <= set(tools.split())
  assert 'tools' in environments.split()
  assert jax == 'refused'
