"""The environment all tests run in: CPU, eight devices, no silent broadcasting between ranks.

XLA reads its flags when jax starts, so they are set before anything imports it. Setting
JAX_PLATFORMS=cuda or tpu in the environment runs the tests there instead.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# As an environment variable rather than jax.config, so that host-only tests need not import jax and
# the processes that tests start inherit it.
os.environ.setdefault('JAX_NUMPY_RANK_PROMOTION', 'raise')

import hypothesis  # noqa: E402  (the variables above come first)
import pytest  # noqa: E402

# Compiling and shrinking take longer than any deadline; the seed is fixed so that a run repeats.
hypothesis.settings.register_profile('ci', deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile('thorough', deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))

_ROOT = pathlib.Path(__file__).resolve().parents[1]


# Linux gives a process 65,530 memory mappings, a compiled program takes several, and XLA crashes where
# there is none left.
_MOST_MAPPINGS = 20_000


@pytest.fixture(scope='module', autouse=True)
def _bounded_mappings():
  """Forgets all compiled programs after a file of tests that leaves many."""
  yield
  mappings = pathlib.Path('/proc/self/maps')
  if 'jax' in sys.modules and mappings.exists() and mappings.read_bytes().count(b'\n') > _MOST_MAPPINGS:
    sys.modules['jax'].clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def tiny_config():
  """Returns a function from overrides to the config of tests/training/tiny.py."""
  from agentrl.core import config

  def load(overrides=None):
    return config.load(_ROOT / 'tests' / 'training' / 'tiny.py', overrides,
                       _ROOT / 'configs' / 'base.py')

  return load


@pytest.fixture(scope='session')
def tiny_folder(tiny_config, tmp_path_factory):
  """A workdir with the tiny config's data set, demonstrations and tokenizer, and nothing else."""
  from agentrl.training import build

  folder = tmp_path_factory.mktemp('tiny') / 'run'
  folder.mkdir()
  build.build(tiny_config(), folder).close()
  return folder


@pytest.fixture
def tiny_workdir(tiny_folder, tmp_path):
  """A copy of `tiny_folder` for one test."""
  return pathlib.Path(shutil.copytree(tiny_folder, tmp_path / 'run'))


@pytest.fixture(scope='session')
def _compiled_folder(tmp_path_factory):
  folder = tmp_path_factory.getbasetemp()
  # The processes of one run share it; each has a folder of its own below that of the run.
  folder = (folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder) / 'compiled'
  folder.mkdir(exist_ok=True)
  return str(folder)


@contextlib.contextmanager
def _jax_settings(settings):
  """Sets jax up, here and in the processes started meanwhile."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  before = {name: jax.config.values[name] for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      patch.setenv(name.upper(), str(value))
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def compile_cache(_compiled_folder):
  """Compiles each program once a session."""
  with _jax_settings({'jax_compilation_cache_dir': _compiled_folder,
                      'jax_persistent_cache_min_compile_time_secs': 0,
                      'jax_persistent_cache_min_entry_size_bytes': -1}):
    yield


@pytest.fixture(scope='module')
def quick_compile(compile_cache):
  """Compiles each program once a session, and in a hurry: for tests that run little."""
  with _jax_settings({'jax_disable_most_optimizations': True}):
    yield


@pytest.fixture(scope='session', name='tiny')
def tiny_policy():
  """A random policy of two layers with its tokenizer and compiled samplers; see
  tests/tiny_policy.py."""
  # By path and on first use: tests are no package, and host-only tests need not import jax.
  spec = importlib.util.spec_from_file_location(
      'tiny_policy', pathlib.Path(__file__).with_name('tiny_policy.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.TinyPolicy()


class _Process(subprocess.Popen):
  """A process of a run, with what it has said."""

  def __init__(self, command, log, **settings):
    self._log = log
    with open(log, 'w', encoding='utf-8') as file:
      super().__init__(command, stdout=file, stderr=subprocess.STDOUT, **settings)

  def said(self):
    return self._log.read_text(encoding='utf-8', errors='replace')


@pytest.fixture(scope='module')
def start_processes(tmp_path_factory):
  """Returns a function that starts the processes of one run on fake CPU devices; none outlives its tests."""
  started = []

  def start(count, command, *, devices):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    shared = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'{_DEVICES}={devices}', 'PYTHONUNBUFFERED': '1',
              'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count)}
    logs = tmp_path_factory.mktemp('processes')
    fresh = [_Process(command, logs / f'{i}.log', cwd=_ROOT, env={**shared, 'JAX_PROCESS_ID': str(i)})
             for i in range(count)]
    started.extend(fresh)
    return fresh

  yield start
  for process in started:
    process.kill()
    process.wait()
