"""From a command line to a config and on to the program's main function.

    python -m agentrl.main --config=configs/quickstart.py --config.rl.steps=20

absl parses the flags; `--config.key=value` arguments are taken out first and become overrides of
the config file, see `agentrl.core.config`.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any, Callable, Sequence

from absl import app
from absl import flags
from ml_collections import ConfigDict

from agentrl.core import config as config_lib

_OVERRIDE = re.compile(r'--?config\.([^=\s]+)(?:=(.*))?', re.DOTALL)
_FLAG = re.compile(r'--$|--?[A-Za-z]')


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
  """Takes the `--config.key=value` arguments out of a command line.

  `--config.key value` and single dashes are understood too, as absl does; the last of several wins.

  Args:
    argv: Program name and arguments. Nothing after '--' is taken for an override.
  Returns:
    The other arguments in order, and text by dotted path, None where no text was given.
  Example:
    >>> split_overrides(['main', '--config=c.py', '--config.rl.steps=20', '--config.debug'])
    (['main', '--config=c.py'], {'rl.steps': '20', 'debug': None})
  """
  rest, overrides, i = [], {}, 0
  while i < len(argv):
    match = _OVERRIDE.fullmatch(argv[i])
    if argv[i] == '--':
      rest.extend(argv[i:])
      break
    if match is None:
      rest.append(argv[i])
    else:
      path, text = match.groups()
      if text is None and i + 1 < len(argv) and not _FLAG.match(argv[i + 1]):
        i += 1
        text = argv[i]
      overrides[path] = text
    i += 1
  return rest, overrides


def run(main: Callable[[ConfigDict], Any], config_flag: flags.FlagHolder,
        reference: ConfigDict | str | pathlib.Path | None = None,
        argv: Sequence[str] | None = None):
  """Runs `main(config)` under absl; mistakes of the command line end it with exit code 2.

  A `ConfigError` raised by `main` itself ends it in the same way: one line, no traceback.

  Args:
    main: Its result is the exit code.
    config_flag: The string flag with the config file, `--config`.
    reference: As in `config_lib.load`.
    argv: Program name and arguments; None for those of the process.
  Raises:
    SystemExit: always.
  """
  found = {}

  def parse(argv):
    rest, found['overrides'] = split_overrides(argv)
    try:
      return flags.FLAGS(rest)
    except flags.Error as error:
      raise _exit(f'{error}\nSee --help.') from None

  def call(argv):
    if len(argv) > 1:
      raise _exit(f'unexpected argument {argv[1]!r}; flags are written --name=value. See --help.')
    try:
      return main(config_lib.load(config_flag.value, found['overrides'], reference))
    except config_lib.ConfigError as error:
      raise _exit(str(error)) from error

  app.run(call, argv=None if argv is None else list(argv), flags_parser=parse)


def _exit(message: str) -> SystemExit:
  sys.stderr.write(f'agentrl: {message}\n')
  return SystemExit(2)
