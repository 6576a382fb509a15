"""Starting a run from the policy that another run ended with: `checkpoint.init_from`."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax

from agentrl.checkpointing.checkpoints import Checkpointer, MismatchError, Restored
from agentrl.training.state import LearnerState

# What a policy may have on top of the one it starts from; it starts anew.
_ADDED = ('value',)


def copy_tokenizer(folder: str, path: pathlib.Path):
  """Copies the tokenizer of another run, unless there is one already.

  Args:
    folder: The other run's workdir.
    path: Where this run keeps its tokenizer.
  Raises:
    ValueError: if the folder has none.
  """
  source = pathlib.Path(folder) / path.name
  if path.exists():
    return
  if not source.exists():
    raise ValueError(f'checkpoint.init_from={folder!r} has no {path.name}: it must be the workdir of a run')
  temporary = path.with_suffix('.tmp')
  shutil.copyfile(source, temporary)
  temporary.rename(path)


def check_tokenizer(folder: str, path: pathlib.Path, key: str):
  """Refuses a run that has another tokenizer than this one.

  Args:
    folder: The other run's workdir.
    path: This run's tokenizer; one that is not there is the checkpoint's, which says enough.
    key: Of the config, for messages.
  Raises:
    ValueError: if they differ.
  """
  other = pathlib.Path(folder) / path.name
  if path.exists() and not (other.exists() and other.read_bytes() == path.read_bytes()):
    raise ValueError(f'{key}={folder!r} has not the tokenizer of this run, {path}: it must be the workdir of a run that this '
                     'one began from, or that began from the same, see checkpoint.init_from')


def load_params(folder: str, params: Any, key: str = 'checkpoint.init_from') -> Any:
  """Returns the parameters that another run ended with, in the places of this run's.

  The value head is not taken over: a policy without one can be given one so, and keeps everything else. One whose
  output layer is tied to its embedding can be untied so: the output layer begins as a copy.

  Args:
    folder: The other run's workdir.
    params: New parameters, sharded; a dict.
    key: Of the config, for messages.
  Raises:
    ValueError: if the folder holds no checkpoint, or one of another architecture.
  """
  checkpoints = pathlib.Path(folder) / 'checkpoints'
  kept = {name: leaf for name, leaf in params.items() if name not in _ADDED}
  with Checkpointer(checkpoints) as checkpointer:
    try:
      found = checkpointer.restore(LearnerState(kept, {}, ()), partial=True)
    except MismatchError as error:
      found = _untied(checkpointer, kept)
      if found is None:
        raise ValueError(f'{key}={folder!r}: {error}') from error
  if found is None:
    raise ValueError(f'{key}={folder!r} holds no checkpoint: it must be the workdir of a run')
  return {**params, **found.arrays.params}


def _untied(checkpointer: Checkpointer, kept: dict[str, Any]) -> Restored | None:
  """Returns what a policy without an output layer of its own ended with, and a copy of its embedding as one."""
  if 'head' not in kept:
    return None
  tied = {name: leaf for name, leaf in kept.items() if name != 'head'}
  try:
    found = checkpointer.restore(LearnerState(tied, {}, ()), partial=True)
  except MismatchError:
    return None
  params = found.arrays.params
  head = jax.device_put(params['embedding'].copy(), kept['head'].sharding)
  return found._replace(arrays=found.arrays._replace(params={**params, 'head': head}))
