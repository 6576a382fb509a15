"""Checkpoints of a whole run that survive kills, full disks and bit rot.

A checkpoint is a folder, `step_00000012`, made under another name and renamed once it is complete:

    arrays/         orbax, one entry a leaf
    host.json       the JSON part of the state
    manifest.json   step, leaves (path, shape, dtype), and size and CRC-32 of every file above

Orbax does not notice a flipped or missing byte in the middle of an array; the manifest does.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
from typing import Any, Mapping, NamedTuple
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from agentrl.sharding import exchange

_NAME = re.compile(r'step_(\d{8,})(?:\.(\d+))?')
_CORRUPT = 'corrupt_'
_TEMPORARY = 'unfinished_'
_BLOCK = 1 << 22  # Bytes read at once for a checksum.


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    step: Step it was saved at.
    arrays: As the template: same structure, kinds and shardings.
    host: The JSON part; tuples have become lists and the keys of dicts strings.
  """

  step: int
  arrays: Any
  host: dict[str, Any]


class CorruptCheckpointError(ValueError):
  """The files are not those that were written."""


class MismatchError(ValueError):
  """The checkpoint is sound but belongs to another architecture."""


class Checkpointer:
  """Saves and restores (arrays, host) under one folder, keeping the newest few.

  `save` copies the arrays to the host and returns; a thread writes them, checks in their checksums
  and renames. At every moment the folder holds the last complete checkpoint, so a kill costs what
  came after it and no more. Usable as a context manager, which waits for the last save at the end.

  Args:
    folder: Where checkpoints go; made at the first save. All processes of a run must see the same
      folder.
    keep: Complete checkpoints kept, at least 1. With 2 a corrupt one can be stepped over.
  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpointer:
    ...   checkpointer.save(3, {'w': np.ones(2, np.float32)}, {'cursor': 7}, wait=True)
    ...   checkpointer.restore({'w': np.zeros(2, np.float32)})
    Restored(step=3, arrays={'w': array([1., 1.], dtype=float32)}, host={'cursor': 7})
  """

  def __init__(self, folder: str | os.PathLike, keep: int = 2):
    if keep < 1:
      raise ValueError(f'keep={keep}: at least one checkpoint must be kept')
    self._folder = pathlib.Path(folder).absolute()
    self._keep = keep
    # Compression costs more CPU time than it saves in writing: float noise hardly shrinks.
    self._orbax = ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
    self._pending: concurrent.futures.Future | None = None

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused_exception):
    # Where this process has failed alone, the others are not waiting for it to say that it has saved.
    self._close(agreed=kind is None or exchange.count() == 1)

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first; looks at names only."""
    return [_step_of(path) for path in self._complete()]

  def save(self, step: int, arrays: Any, host: Mapping[str, Any], wait: bool = False):
    """Saves a state; call it on every process.

    Blocks while an earlier save is being written, then for the copy to the host. The arrays may be
    donated or changed in place as soon as it returns.

    Args:
      step: Number of the checkpoint. Saving a step again replaces it.
      arrays: Pytree of jax and numpy arrays. No random keys: compute those from the seed.
      host: Whatever else is needed; must survive a JSON round trip. That of process 0 is stored.
      wait: Whether to return only once it is safe on disk, as before exiting.
    Raises:
      TypeError: if a leaf is no array or a random key, or `host` is not JSON.
      OSError: if this save (when waiting) or the one before it could not be written. The folder
        still holds the last complete one.
    """
    host_text = json.dumps(host)
    leaves = _named_leaves(arrays)
    stored = {name: _storable(name, leaf) for name, leaf in leaves.items()}
    self.wait()
    final = self._folder / exchange.gather(self._free_name(step).encode())[0].decode()
    temporary = self._folder / (_TEMPORARY + final.name)
    with exchange.together():
      if exchange.is_first():
        self._clear_unfinished()
        temporary.mkdir(parents=True)
    self._orbax.save(temporary / 'arrays', args=ocp.args.PyTreeSave(stored))
    manifest = {
        'step': int(step),
        'leaves': {
            name: _signature(leaf) for name, leaf in leaves.items()
        }
    }
    self._pending = self._thread.submit(self._commit, temporary, final, host_text, manifest)
    if wait:
      self.wait()

  def wait(self):
    """Blocks until the last save is safe on disk; raises what it ran into, on whichever process."""
    pending, self._pending = self._pending, None
    if pending is not None:
      with exchange.together():
        pending.result()

  def close(self):
    """Waits for the last save and ends the thread."""
    self._close(agreed=True)

  def _close(self, agreed: bool):
    try:
      if agreed:
        self.wait()
    finally:
      self._thread.shutdown()
      self._orbax.close()

  def restore(self, template: Any, partial: bool = False) -> Restored | None:
    """Returns the newest sound checkpoint.

    One with damaged files is reported as an error, moved aside to `corrupt_...` and stepped over.

    Args:
      template: Pytree like the one saved, of arrays or `jax.ShapeDtypeStruct`s. Its jax leaves are
        restored to its shardings, whatever they were saved from, and its numpy leaves as numpy
        arrays.
      partial: Whether the checkpoint may hold more leaves than the template, as when only the
        parameters are wanted.
    Returns:
      The state, or None where the folder holds no checkpoint, not even a damaged one.
    Raises:
      MismatchError: if leaves are missing, extra, or of another shape or dtype.
      CorruptCheckpointError: if there are checkpoints but none is sound.
    """
    self.wait()
    with exchange.together():
      newest = self._newest_sound() if exchange.is_first() else None
    chosen = exchange.gather(newest.name.encode() if newest else b'')[0].decode()
    if not chosen:
      return None
    path = self._folder / chosen
    manifest = _read_manifest(path)
    wanted = _named_leaves(template)
    _check_same_leaves(path, manifest['leaves'], wanted, partial)
    leaves = [_like_template(value, leaf)
              for value, leaf in zip(self._read(path, wanted, partial), wanted.values())]
    arrays = jax.tree.unflatten(jax.tree.structure(template), leaves)
    host = json.loads((path / 'host.json').read_text(encoding='utf-8'))
    logging.info('restored %s', path)
    return Restored(manifest['step'], arrays, host)

  def _read(self, path: pathlib.Path, wanted: Mapping[str, Any], partial: bool) -> list[Any]:
    """Returns the wanted leaves, in order."""
    if not wanted:  # Orbax takes an empty template for a leaf.
      return []
    restored = self._orbax.restore(
        path / 'arrays',
        args=ocp.args.PyTreeRestore(
            item={name: 0 for name in wanted}, partial_restore=partial,
            restore_args={name: _restore_args(leaf) for name, leaf in wanted.items()}))
    return [restored[name] for name in wanted]

  def _commit(self, temporary: pathlib.Path, final: pathlib.Path, host_text: str,
              manifest: dict[str, Any]):
    """Runs on the thread: waits for orbax, seals the folder and renames it."""
    self._orbax.wait_until_finished()
    if not exchange.is_first():
      return
    (temporary / 'host.json').write_text(host_text, encoding='utf-8')
    files = sorted(p for p in temporary.rglob('*') if p.is_file())
    manifest['files'] = {str(p.relative_to(temporary)): _size_and_crc(p, sync=True) for p in files}
    _write_manifest(temporary, manifest)
    os.rename(temporary, final)
    _sync_folder(self._folder)
    newest_by_step = {_step_of(path): path for path in self._complete()}
    kept = sorted(newest_by_step)[-self._keep:]
    for path in self._complete():
      if path not in [newest_by_step[step] for step in kept]:
        shutil.rmtree(path)

  def _complete(self) -> list[pathlib.Path]:
    if not self._folder.is_dir():
      return []
    return sorted((p for p in self._folder.iterdir() if _NAME.fullmatch(p.name)), key=_order)

  def _free_name(self, step: int) -> str:
    """Never the name of a folder that exists: replacing one in place could not be atomic."""
    name = f'step_{step:08d}'
    versions = [_order(path)[1] for path in self._complete() if _step_of(path) == step]
    return f'{name}.{max(versions) + 1}' if versions else name

  def _clear_unfinished(self):
    for path in self._folder.glob(_TEMPORARY + '*'):
      logging.info('removing %s, left by a save that was killed', path)
      shutil.rmtree(path)

  def _newest_sound(self) -> pathlib.Path | None:
    complete = self._complete()
    for path in reversed(complete):
      try:
        _verify(path)
        return path
      except CorruptCheckpointError as error:
        aside = _move_aside(path)
        logging.error(
            'CHECKPOINT DAMAGED: %s: %s. Moved to %s; going back to the checkpoint before it.',
            path, error, aside)
    damaged = list(self._folder.glob(_CORRUPT + '*'))
    if damaged:
      raise CorruptCheckpointError(
          f'no checkpoint in {self._folder} can be restored: {sorted(p.name for p in damaged)} are '
          'damaged. To start '
          'from the beginning take another workdir or remove these folders.')
    return None


def _order(path: pathlib.Path) -> tuple[int, int]:
  step, version = _NAME.fullmatch(path.name).groups()
  return int(step), int(version or 0)


def _step_of(path: pathlib.Path) -> int:
  return _order(path)[0]


def _named_leaves(tree: Any) -> dict[str, Any]:
  """Leaves by path, in the order of jax.tree.leaves."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='.').replace('/', '|') or 'leaf'
    if name in leaves:
      raise ValueError(f'two leaves are called {name}; rename a key that holds a dot or a slash')
    leaves[name] = leaf
  return leaves


def _storable(name: str, leaf: Any) -> Any:
  if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
    raise TypeError(
        f'leaf {name} is a {type(leaf).__name__}, not an array; numbers and text belong into host')
  if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
    raise TypeError(
        f'leaf {name} is a random key; keys are computed from (seed, purpose, step), never stored')
  # Orbax reads numpy arrays later, on its own thread: the caller may have changed them by then. It
  # refuses arrays without elements, which have nothing to store but their shape.
  if leaf.size == 0:
    return np.zeros((), leaf.dtype)
  return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _signature(leaf: Any) -> list[Any]:
  return [list(leaf.shape), np.dtype(leaf.dtype).name]


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  sharding = None if isinstance(leaf, (np.ndarray, np.generic)) else leaf.sharding
  if sharding is None or leaf.size == 0 or _is_uncommitted(leaf):
    return ocp.RestoreArgs(restore_type=np.ndarray)
  return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _is_uncommitted(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and not leaf.committed


def _like_template(value: Any, leaf: Any) -> Any:
  """Gives a numpy value the template's kind: a jax array stays committed, or not, to its device.

  Were that different after a resume, the first step would compile other programs than the run that
  was killed.
  """
  if isinstance(value, jax.Array):
    return value
  if leaf.size == 0:
    value = np.zeros(leaf.shape, leaf.dtype)
  if isinstance(leaf, (np.ndarray, np.generic)):
    return np.asarray(value)
  if _is_uncommitted(leaf) or leaf.sharding is None:
    return jnp.array(value)
  return jax.device_put(value, leaf.sharding)


def _check_same_leaves(path: pathlib.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any],
                       partial: bool):
  mend = ('Take another workdir, or the config this checkpoint was made with (config.json in its '
          'workdir).')
  for name, leaf in wanted.items():
    if name not in saved:
      raise MismatchError(
          f'{path} is of another architecture: it has no leaf {name}; this run has one of shape '
          f'{tuple(leaf.shape)}. {mend}')
    shape, dtype = saved[name]
    if tuple(shape) != tuple(leaf.shape):
      raise MismatchError(
          f'{path} is of another architecture: leaf {name} has shape {tuple(shape)} there and '
          f'{tuple(leaf.shape)} in this run. {mend}')
    if dtype != np.dtype(leaf.dtype).name:
      raise MismatchError(
          f'{path} has leaf {name} in {dtype}; this run has it in '
          f'{np.dtype(leaf.dtype).name}. {mend}'
      )
  extra = next((name for name in saved if name not in wanted), None)
  if extra is not None and not partial:
    raise MismatchError(f'{path} is of another architecture: it has a leaf {extra} of shape '
                        f'{tuple(saved[extra][0])}; this run has none. {mend}')


def _size_and_crc(path: pathlib.Path, sync: bool = False) -> list[int]:
  size = crc = 0
  with open(path, 'rb') as f:
    if sync:
      os.fsync(f.fileno())
    while block := f.read(_BLOCK):
      size += len(block)
      crc = zlib.crc32(block, crc)
  return [size, crc]


def _write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]):
  body = json.dumps(manifest)
  with open(folder / 'manifest.json', 'w', encoding='utf-8') as f:
    f.write(json.dumps({'crc32': zlib.crc32(body.encode()), 'manifest': body}))
    f.flush()
    os.fsync(f.fileno())
  for path in [folder, *(p for p in folder.rglob('*') if p.is_dir())]:
    _sync_folder(path)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  try:
    sealed = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
    body = sealed['manifest']
    if zlib.crc32(body.encode()) != sealed['crc32']:
      raise ValueError('its checksum is wrong')
    return json.loads(body)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise CorruptCheckpointError(f'manifest.json cannot be read ({error})') from error


def _verify(folder: pathlib.Path):
  """Raises CorruptCheckpointError unless every file is as it was written."""
  for name, (size, crc) in _read_manifest(folder)['files'].items():
    try:
      found_size, found_crc = _size_and_crc(folder / name)
    except OSError as error:
      raise CorruptCheckpointError(f'{name} cannot be read ({error})') from error
    if found_size != size:
      raise CorruptCheckpointError(f'{name} has {found_size} bytes instead of {size}')
    if found_crc != crc:
      raise CorruptCheckpointError(f'{name} has another checksum than when it was written')


def _move_aside(path: pathlib.Path) -> pathlib.Path:
  aside = path.with_name(_CORRUPT + path.name)
  number = 1
  while aside.exists():
    number += 1
    aside = path.with_name(f'{_CORRUPT}{path.name}.again{number}')
  os.rename(path, aside)
  return aside


def _sync_folder(path: pathlib.Path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
