"""Metrics on disk: metrics.jsonl always, TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from typing import Any, Mapping

from absl import logging
import numpy as np

FILE_NAME = 'metrics.jsonl'
RESERVED = ('step', 'stage', 'time')


class MetricsWriter:
  """Appends one JSON object a step to `workdir/metrics.jsonl`, and writes TensorBoard events.

  A line holds `step`, `stage`, `time` (Unix seconds), `seconds` (wall seconds of the step) and the
  values by name, flat. It is on its way to the disk when `write` returns, so a kill loses at most
  the line being written.

  Args:
    workdir: The run's folder; made if missing.
    start_step: First step that this process will write. Lines of it and later ones, left by a
      killed process, are dropped, so that the file of a resumed run equals that of an uninterrupted
      one.
    tensorboard: Whether to write TensorBoard events; skipped with a log line where tensorboardX is
      missing.
  Raises:
    ValueError: if metrics.jsonl holds something else than metrics.
  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   with MetricsWriter(folder, tensorboard=False) as writer:
    ...     writer.write(0, 'rl', {'success': 0.5, 'seconds': 2.0})
    ...   [(line['step'], line['success']) for line in read_metrics(folder)]
    [(0, 0.5)]
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int = 0, tensorboard: bool = True):
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / FILE_NAME
    if self._path.exists():
      _drop_from(self._path, start_step)
    self._file = open(self._path, 'a', encoding='utf-8')
    self._tensorboard = _open_tensorboard(folder /
                                          'tensorboard', start_step) if tensorboard else None
    self._last_write = time.monotonic()
    self._warned: set[str] = set()

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *unused_exception):
    self.close()

  def write(self, step: int, stage: str, values: Mapping[str, Any]):
    """Writes one line; returns once it is handed to the operating system.

    Args:
      step: Updates made before this step, counted over all stages.
      stage: Name of the stage, such as 'rl'. One step may have a line of each of several stages.
      values: Scalars by name, in any numeric type. NaN and infinities become null, with a warning
        for each name. `seconds` is filled in with the time since the previous line where it is
        missing.
    Raises:
      ValueError: if a name is reserved.
    """
    taken = [name for name in values if name in RESERVED]
    if taken:
      raise ValueError(
          f'{taken} cannot be names of metrics: every line has fields of these names already')
    now = time.monotonic()
    values = {'seconds': now - self._last_write, **values}
    self._last_write = now
    numbers = {name: self._number(name, value, step) for name, value in values.items()}
    line = {'step': int(step), 'stage': stage, 'time': round(time.time(), 3), **numbers}
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
    self._file.flush()
    if self._tensorboard:
      for name, number in numbers.items():
        if number is not None:
          self._tensorboard.add_scalar(f'{stage}/{name}', number, int(step))

  def close(self):
    """Closes the files; nothing can be written afterwards."""
    self._file.close()
    if self._tensorboard:
      self._tensorboard.close()

  def _number(self, name: str, value: Any, step: int) -> int | float | None:
    if isinstance(value, (bool, int, np.integer)):
      return int(value)
    number = float(np.asarray(value))
    if math.isfinite(number):
      return number
    if name not in self._warned:
      self._warned.add(name)
      logging.warning('metric %r is %s at step %d; written as null, here and from now on', name,
                      number, step)
    return None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl, oldest first.

  Args:
    path: The file, or the run's folder.
  Returns:
    One dict a line; a last line torn by a kill is left out. [] where there is no file.
  Raises:
    ValueError: if another line is not a JSON object with a step.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / FILE_NAME
  if not path.exists():
    return []
  lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
  # Every complete line ends in a newline: what follows the last one is empty or torn.
  return [_parse(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _parse(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
        f'{path}:{number} is not JSON ({error}); mend or remove the line, or take another '
        'workdir') from error
  if not isinstance(record, dict) or 'step' not in record:
    raise ValueError(f'{path}:{number} is no line of metrics: it has no "step"')
  return record


def _drop_from(path: pathlib.Path, start_step: int):
  """Rewrites the file without a torn last line and without steps from `start_step` on."""
  records = read_metrics(path)
  kept = [record for record in records if record['step'] < start_step]
  text = ''.join(json.dumps(record) + '\n' for record in kept)
  if text.encode() == path.read_bytes():
    return
  if len(kept) < len(records):
    logging.info('%s: dropped %d lines of steps from %d on; they will be written again', path,
                 len(records) - len(kept), start_step)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


def _open_tensorboard(folder: pathlib.Path, start_step: int):
  try:
    import tensorboardX
  except ImportError:
    logging.info(
        'tensorboardX is not installed: no TensorBoard events; pip install tensorboardX for them')
    return None
  return tensorboardX.SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)
