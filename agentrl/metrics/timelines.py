"""The timeline of a run's last rollout on disk, and traces of chosen ones."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
from typing import Any, Mapping

FILE_NAME = 'timeline.json'
TRACES = 'trace'


def write(workdir: str | os.PathLike, step: int, stage: str, picture: Mapping[str, Any]):
  """Writes `workdir/timeline.json`, which is never seen unfinished.

  Args:
    workdir: The run's folder.
    step: Of the run.
    stage: Its name.
    picture: See `agentrl.rollout.stats.Timeline.picture`.
  """
  _replace(pathlib.Path(workdir) / FILE_NAME, json.dumps({'step': step, 'stage': stage, **picture}).encode())


def read(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns what `write` wrote last; {} if nothing.

  Raises:
    ValueError: if the file holds something else.
  """
  path = pathlib.Path(workdir) / FILE_NAME
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


def write_trace(workdir: str | os.PathLike, step: int, trace: Mapping[str, Any]) -> pathlib.Path:
  """Writes `workdir/trace/step-000012.json.gz`, which ui.perfetto.dev opens, and returns its path."""
  folder = pathlib.Path(workdir) / TRACES
  folder.mkdir(exist_ok=True)
  path = folder / f'step-{step:06d}.json.gz'
  _replace(path, gzip.compress(json.dumps(trace).encode(), compresslevel=5))
  return path


def _replace(path: pathlib.Path, data: bytes):
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_bytes(data)
  os.replace(temporary, path)
