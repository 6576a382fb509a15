"""Runs a config: `python -m agentrl.main --config=configs/quickstart.py --workdir=runs/quickstart`.

Single settings are overridden by `--config.section.key=value`. Starting again with the same workdir goes on where the
last checkpoint was made. configs/base.py lists every setting. Of a run of several processes each is started so; see
docs/pods.md.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags
from absl import logging
from ml_collections import ConfigDict
import rich.console
import rich.table

from agentrl.core import command_line
from agentrl.sharding import exchange
from agentrl.sharding import processes
from agentrl.training import loop
from agentrl.viz import report

_CONFIG = flags.DEFINE_string('config', None, 'Config file; --config.section.key=value overrides one of its keys. '
                              'configs/base.py lists all keys.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, trajectories, report.html. '
                               'A run that was stopped goes on.', required=True)
_STOPPED = flags.DEFINE_integer('stopped_exit_code', 0, 'Exit code after SIGTERM or Ctrl-C, the state being saved; '
                                'other than 0 for schedulers that start again only what has failed.')
_TRACE = flags.DEFINE_string('trace', '', 'Steps whose rollouts are written as WORKDIR/trace/step-000012.json.gz, for '
                             'https://ui.perfetto.dev: what the device and each slot did when. "all", or steps of the '
                             'run such as 5,100-120.')
_PROFILE = flags.DEFINE_integer('profile', 0, 'Steps of each stage, from the second on that this start does, that jax '
                                'profiles into WORKDIR/profile, for TensorBoard or XProf: what the device computed when.')
processes.define_flags()

_BASE = pathlib.Path(__file__).resolve().parent.parent / 'configs' / 'base.py'


def main(config: ConfigDict) -> int:
  """Runs the config and prints the summary; returns the exit code."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # the libraries below say much at INFO
  console = rich.console.Console()
  try:
    processes.start_from_flags()
    summary = loop.run(config, _WORKDIR.value, on_stage_end=report.write_report, trace=_TRACE.value,
                       profile=_PROFILE.value)
  except loop.Interrupted as stopped:
    console.print(f'agentrl: {stopped}')
    return _STOPPED.value
  except (loop.RunError, processes.StartError) as error:
    logging.debug('Refused', exc_info=True)
    sys.stderr.write(f'agentrl: {error}\n')
    return 2
  if exchange.is_first():
    console.print(summary_table(summary))
    console.print(f'Report: {pathlib.Path(_WORKDIR.value) / "report.html"}')
  return 0


def summary_table(summary: dict) -> rich.table.Table:
  """Returns the summary as a table of one line a figure."""
  table = rich.table.Table('figure', 'value', title='Summary')
  for section, content in summary.items():
    if isinstance(content, dict):
      for key, value in content.items():
        if not isinstance(value, dict):
          table.add_row(f'{section}.{key}', _text(value))
    else:
      table.add_row(section, _text(content))
  return table


def _text(value) -> str:
  if isinstance(value, list):
    return ' to '.join(_text(v) for v in value)
  return f'{value:.4g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
  command_line.run(main, _CONFIG, reference=_BASE)
