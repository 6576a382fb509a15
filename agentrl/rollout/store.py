"""Trajectories on disk: one compressed file a step, exact, read without tokenizer or jax."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import re
import zlib
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from absl import logging
import numpy as np

from agentrl.core import types

SUFFIX = '.json.gz'
_FORMAT = 1
_TAG = '__kind__'


class StoredStep(NamedTuple):
  """What a trajectory file holds.

  Attributes:
    step: Updates made before these trajectories were sampled.
    trajectories: As they were written.
    extra: As it was written: arrays come back as arrays, tuples as tuples.
    pieces: Token id to the text of that single piece, for the ids that occur; {} if written
      without.
  """

  step: int
  trajectories: list[types.Trajectory]
  extra: dict[str, Any]
  pieces: dict[int, str]


class TrajectoryStore:
  """Writes and lists `folder/step_00000012.json.gz`.

  Args:
    folder: Usually `workdir/trajectories`; made at the first write.
    piece: Text of a single token id, by which a viewer can show tokens without the tokenizer.
    writes: Whether this process writes; where another one does, `write` and `keep_last` do nothing.
  Example:
    >>> import tempfile
    >>> task = types.Task('t', 'math', (), 3)
    >>> trajectory = types.Trajectory(task, sample=0, group_id='t', seed=1)
    >>> trajectory.segments[0].append_sampled([7], [-0.5], [0.25], turn=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = TrajectoryStore(folder, piece='abcdefgh'.__getitem__).write(2, [trajectory], {})
    ...   stored = read(path)
    >>> stored.step, stored.trajectories[0].segments[0].log_probs, stored.pieces
    (2, array([-0.5], dtype=float32), {7: 'h'})
  """

  def __init__(self, folder: str | os.PathLike, piece: Callable[[int], str] | None = None, writes: bool = True):
    self._folder = pathlib.Path(folder)
    self._piece, self._writes = piece, writes

  def write(self,
            step: int,
            trajectories: Sequence[types.Trajectory],
            extra: Mapping[str, Any] | None = None) -> pathlib.Path:
    """Writes a step's trajectories; replaces the step's file if there is one.

    The file appears at once and whole. Blocks for about 1 microsecond a token.

    Args:
      step: Updates made before they were sampled.
      trajectories: In any order, finished or not.
      extra: More about them, of JSON types, tuples, bytes and arrays. The viewer knows
        `advantages`: for each trajectory a number, or a list with an array [T] for each of its
        segments.
    Returns:
      Path of the file.
    """
    if not self._writes:
      return self._path(step)
    ids = sorted(
        {int(t) for trajectory in trajectories for s in trajectory.segments for t in s.tokens})
    document = {
        'format': _FORMAT,
        'step': int(step),
        'pieces': {
            str(i): self._piece(i) for i in ids
        } if self._piece else {},
        'extra': encode(dict(extra or {})),
        **encode_trajectories(trajectories),
    }
    return self._replace(self._path(step), json.dumps(document))

  def paths(self) -> list[pathlib.Path]:
    """Returns the files, earliest step first."""
    return list_paths(self._folder)

  def read_step(self, step: int) -> list[types.Trajectory]:
    """Returns the trajectories of a step; [] if it has no file."""
    path = self._path(step)
    return read(path).trajectories if path.exists() else []

  def keep_last(self, count: int):
    """Removes all files but the latest `count`."""
    for path in self.paths()[:-count] if self._writes else ():
      path.unlink()

  def _path(self, step: int) -> pathlib.Path:
    return self._folder / f'step_{step:08d}{SUFFIX}'

  def _replace(self, path: pathlib.Path, text: str) -> pathlib.Path:
    self._folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    # A fixed time in the header: the same trajectories make the same bytes.
    temporary.write_bytes(gzip.compress(text.encode(), compresslevel=4, mtime=0))
    os.replace(temporary, path)
    return path


def list_paths(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the trajectory files of a folder, earliest step first; [] where there is none."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return []
  return sorted((p for p in folder.iterdir() if re.fullmatch(r'step_\d+\.json\.gz', p.name)),
                key=step_of)


def step_of(path: str | os.PathLike) -> int:
  """Returns the step that a trajectory file's name tells."""
  return int(pathlib.Path(path).name.removesuffix(SUFFIX).removeprefix('step_'))


def read(path: str | os.PathLike) -> StoredStep:
  """Returns what was written, exactly: NaN, dtypes and tuples included.

  Args:
    path: A file that `TrajectoryStore.write` made.
  Raises:
    ValueError: if it is damaged, or of a later format.
  """
  try:
    document = json.loads(gzip.decompress(pathlib.Path(path).read_bytes()))
  except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
    raise ValueError(f'{path} is damaged or no trajectory file ({error})') from error
  if document.get('format') != _FORMAT:
    raise ValueError(
        f'{path} has format {document.get("format")}; this version of agentrl reads {_FORMAT}')
  pieces = {int(i): piece for i, piece in document['pieces'].items()}
  return StoredStep(document['step'], decode_trajectories(document), decode(document['extra']), pieces)


def encode_trajectories(trajectories: Sequence[types.Trajectory]) -> dict[str, Any]:
  """Returns trajectories as JSON types, for `decode_trajectories`."""
  tasks, encoded = {}, []
  masks: dict[bytes, int] = {}  # most tokens share theirs with others
  for trajectory in trajectories:
    task = json.dumps(encode_task(trajectory.task))
    index = tasks.setdefault(task, len(tasks))  # The samples of a group share their task.
    encoded.append({'task': index, **_encode_trajectory(trajectory, masks)})
  out = {'tasks': [json.loads(task) for task in tasks], 'trajectories': encoded}
  if masks:
    out['masks'] = encode(list(masks))
  return out


def decode_trajectories(encoded: Mapping[str, Any]) -> list[types.Trajectory]:
  """Returns what `encode_trajectories` was given."""
  tasks = [decode_task(task) for task in encoded['tasks']]
  masks = decode(encoded.get('masks', []))
  return [_decode_trajectory(t, tasks, masks) for t in encoded['trajectories']]


def encode_task(task: types.Task) -> Any:
  """Returns a task as JSON types, for `decode_task`."""
  return encode(dataclasses.asdict(task))


def decode_task(encoded: Mapping[str, Any]) -> types.Task:
  """Returns what `encode_task` was given."""
  fields = decode(encoded)
  return types.Task(**{**fields, 'messages': tuple(types.Message(**m) for m in fields['messages'])})


def encode(value: Any) -> Any:
  """Turns a value into JSON types; kinds that JSON lacks are tagged."""
  if value is None or isinstance(value,
                                 (str, bool, int, float)) and not isinstance(value, np.generic):
    return value
  if isinstance(value, Mapping) and all(isinstance(k, str) for k in value) and _TAG not in value:
    return {k: encode(v) for k, v in value.items()}
  if isinstance(value, Mapping):
    return {_TAG: 'dict', 'items': [[encode(k), encode(v)] for k, v in value.items()]}
  if isinstance(value, list):
    return [encode(v) for v in value]
  if isinstance(value, tuple):
    return {_TAG: 'tuple', 'items': [encode(v) for v in value]}
  if isinstance(value, bytes):
    return {_TAG: 'bytes', 'data': base64.b64encode(value).decode()}
  if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
    return {
        _TAG: 'array',
        'dtype': value.dtype.str,
        'shape': list(value.shape),
        'scalar': isinstance(value, np.generic),
        'data': base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    }
  # A run must not end because somebody's metadata holds an object; what is kept of it says what it
  # was.
  logging.log_first_n(logging.WARNING, 'a %s in a trajectory cannot be stored; its repr is', 3,
                      type(value).__name__)
  return {_TAG: 'repr', 'data': repr(value)}


def decode(value: Any) -> Any:
  """Returns what `encode` was given."""
  if isinstance(value, list):
    return [decode(v) for v in value]
  if not isinstance(value, dict):
    return value
  kind = value.get(_TAG)
  if kind is None:
    return {k: decode(v) for k, v in value.items()}
  if kind == 'dict':
    return {decode(k): decode(v) for k, v in value['items']}
  if kind == 'tuple':
    return tuple(decode(v) for v in value['items'])
  if kind == 'bytes':
    return base64.b64decode(value['data'])
  if kind == 'array':
    flat = np.frombuffer(base64.b64decode(value['data']), np.dtype(value['dtype']))
    return flat[0] if value['scalar'] else flat.reshape(value['shape']).copy()
  if kind == 'repr':
    return value['data']
  raise ValueError(f'unknown kind {kind!r}')


def _encode_trajectory(trajectory: types.Trajectory, masks: dict[bytes, int]) -> dict[str, Any]:
  fields = {f.name: getattr(trajectory, f.name) for f in dataclasses.fields(trajectory)}
  del fields['task']
  fields['segments'] = [{
      'tokens': s.tokens,
      'sampled': s.sampled,
      'log_probs': s.log_probs,
      'entropies': s.entropies,
      'turns': s.turns,
      'versions': s.versions,
      **_mask_ids(s, masks)
  } for s in trajectory.segments]
  fields['turns'] = [dataclasses.asdict(turn) for turn in trajectory.turns]
  fields['status'] = trajectory.status.value
  fields['boundary'] = trajectory.boundary and trajectory.boundary.value
  return encode(fields)


def _mask_ids(segment: types.Segment, masks: dict[bytes, int]) -> dict[str, np.ndarray]:
  """Returns where each token's mask stands among `masks`, -1 for none; {} without any. Adds what is not there."""
  if not any(segment.masks):
    return {}
  ids = [-1 if m is None else masks.setdefault(m, len(masks)) for m in segment.masks]
  return {'mask_ids': np.array(ids, np.int32)}


def _decode_trajectory(encoded: Mapping[str, Any], tasks: Sequence[types.Task],
                       masks: Sequence[bytes]) -> types.Trajectory:
  encoded = dict(encoded)
  task = tasks[encoded.pop('task')]
  fields = decode(encoded)
  fields['segments'] = [_decode_segment(s, fields['policy_version'], masks) for s in fields['segments']]
  fields['turns'] = [_decode_turn(t) for t in fields['turns']]
  fields['status'] = types.Status(fields['status'])
  fields['boundary'] = fields['boundary'] and types.Boundary(fields['boundary'])
  return types.Trajectory(task=task, **fields)


def _decode_segment(columns: Mapping[str, np.ndarray], version: int, masks: Sequence[bytes]) -> types.Segment:
  segment = types.Segment()
  sampled, turns = columns['sampled'], columns['turns']
  known = np.isfinite(columns['log_probs'])
  # Files from before tokens had versions.
  versions = columns.get('versions', np.full(len(turns), version, np.int32))
  mask_ids = columns.get('mask_ids', np.full(len(turns), -1))
  drawn_from = [None if i < 0 else masks[i] for i in mask_ids]
  key = lambda i: (bool(sampled[i]), bool(known[i]), int(turns[i]))
  for (is_sampled, is_known, turn), run in itertools.groupby(range(len(sampled)), key):
    run = list(run)
    rows = slice(run[0], run[-1] + 1)
    if is_sampled and not is_known:
      segment.append_revised(columns['tokens'][rows], turn, versions[rows], drawn_from[rows])
    elif is_sampled:
      segment.append_sampled(columns['tokens'][rows], columns['log_probs'][rows],
                             columns['entropies'][rows], turn, versions[rows], drawn_from[rows])
    else:
      segment.append_forced(columns['tokens'][rows], turn)
  return segment


def _decode_turn(fields: Mapping[str, Any]) -> types.Turn:
  calls = tuple(types.ToolCall(**call) for call in fields['calls'])
  results = tuple(
      types.ToolResult(**{
          **result, 'parts': tuple(types.Part(**part) for part in result['parts'])
      }) for result in fields['results'])
  return types.Turn(**{**fields, 'calls': calls, 'results': results})
