"""The timeline of a run's last rollout on disk, and traces of chosen ones, of each process its own."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
from typing import Any, Mapping

FILE_NAME = 'timeline.json'
TRACES = 'trace'


def write(workdir: str | os.PathLike, step: int, stage: str, picture: Mapping[str, Any], process: int = 0):
  """Writes `workdir/timeline.json`, or `workdir/timeline-1.json` of process 1, which is never seen unfinished.

  Args:
    workdir: The run's folder.
    step: Of the run.
    stage: Its name.
    picture: See `agentrl.rollout.stats.Timeline.picture`.
    process: Whose slots they are.
  """
  path = pathlib.Path(workdir) / _named(FILE_NAME, process)
  _replace(path, json.dumps({'step': step, 'stage': stage, **picture}).encode())


def read(workdir: str | os.PathLike, process: int = 0) -> dict[str, Any]:
  """Returns what `write` wrote last of a process; {} if nothing.

  Raises:
    ValueError: if the file holds something else.
  """
  path = pathlib.Path(workdir) / _named(FILE_NAME, process)
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    found = {'step': int(found['step']), 'stage': str(found['stage']), 'seconds': float(found['seconds']),
             'bins': int(found['bins']), 'rows': [(str(name), [(str(kind), int(first), int(last)) for kind, first, last in runs])
                                                  for name, runs in found['rows']]}
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{path.name} holds no timeline ({type(error).__name__}: {error})') from error
  return found


def write_trace(workdir: str | os.PathLike, step: int, trace: Mapping[str, Any], process: int = 0) -> pathlib.Path:
  """Writes `workdir/trace/step-000012.json.gz`, or `step-000012-1.json.gz` of process 1, and returns its path.

  Open it in ui.perfetto.dev.
  """
  folder = pathlib.Path(workdir) / TRACES
  folder.mkdir(exist_ok=True)
  path = folder / _named(f'step-{step:06d}.json.gz', process)
  _replace(path, gzip.compress(json.dumps(trace).encode(), compresslevel=5))
  return path


def _named(name: str, process: int) -> str:
  stem, dot, rest = name.partition('.')
  return f'{stem}-{process}{dot}{rest}' if process else name


def _replace(path: pathlib.Path, data: bytes):
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_bytes(data)
  os.replace(temporary, path)
