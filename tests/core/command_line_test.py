"""Tests of what a program prints and returns for right and wrong command lines, as a process."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from agentrl.core import command_line

_ROOT = pathlib.Path(command_line.__file__).parents[2]
_PROGRAM = '''"""Trains a thing."""
import json
from absl import flags
from agentrl.core import command_line, config as config_lib
_CONFIG = flags.DEFINE_string('config', None, 'Config file.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
def main(config):
  if config.rl.steps < 0:
    raise config_lib.ConfigError(f'rl.steps is {config.rl.steps}')
  print(json.dumps([config.to_dict(), _WORKDIR.value]))
if __name__ == '__main__':
  command_line.run(main, _CONFIG, reference='base.py')
'''
_CONFIG = '''from ml_collections import ConfigDict
def get_config():
  return ConfigDict({'seed': 0, 'rl': {'steps': 20, 'debug': False}})
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('program')
  (folder / 'program.py').write_text(_PROGRAM)
  (folder / 'base.py').write_text(_CONFIG)
  (folder / 'typo.py').write_text(_CONFIG.replace("'seed'", "'sede'"))

  def call(*arguments):
    return subprocess.run([sys.executable, 'program.py', *arguments], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(_ROOT)})

  return call


def test_overrides_reach_main(run):
  done = run('--config.rl.steps=3', '--config=base.py', '--workdir', 'w', '--config.rl.debug',
             '--config.seed', '-4')
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[{"rl": {"debug": true, "steps": 3}, "seed": -4}, "w"]'


@pytest.mark.parametrize('arguments, words', [
    (['--config=base.py', '--config.rl.stpes=3'],
     "unknown config key 'rl.stpes'; the nearest is 'rl.steps'"),
    (['--config=base.py', '--config.rl.steps=x'], "'rl.steps' expects an int, such as 20; got 'x'"),
    (['--config=base.py', '--config.rl.steps=-1'], 'rl.steps is -1'),
    (['--config=bsae.py'], "no config file 'bsae.py'; the nearest is 'base.py'"),
    (['--config=typo.py'], "typo.py: unknown config key 'sede'; the nearest is 'seed'"),
    (['--config=base.py', '--wrokdir=x'], "Unknown command line flag 'wrokdir'"),
    (['--config=base.py', 'rl.steps=3'], "unexpected argument 'rl.steps=3'"),
    ([], '--config'),
])
def test_mistakes_end_with_code_2_and_no_traceback(run, arguments, words):
  done = run(*arguments)
  assert done.returncode == 2
  assert words in done.stderr and done.stderr.startswith('agentrl: ')
  assert 'Traceback' not in done.stderr and not done.stdout


def test_help_names_the_flags(run):
  done = run('--help')
  assert 'Trains a thing.' in done.stdout and '--workdir' in done.stdout


@pytest.mark.parametrize('argv, rest, overrides', [
    (['m', '--config.a=1', '--config.a=2'], ['m'], {'a': '2'}),
    (['m', '-config.a', '1', '--x'], ['m', '--x'], {'a': '1'}),
    (['m', '--config.a', '--config.b=x=y\nz'], ['m'], {'a': None, 'b': 'x=y\nz'}),
    (['m', '--config.a', '--', '--config.b=1'], ['m', '--', '--config.b=1'], {'a': None}),
    (['m', '--configure=1', '--config=c.py'], ['m', '--configure=1', '--config=c.py'], {}),
])
def test_overrides_are_taken_out_of_the_command_line(argv, rest, overrides):
  assert command_line.split_overrides(argv) == (rest, overrides)
