"""Updates that were not applied because they were not finite: counted, and their batches kept."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np

from agentrl.core.types import TrainBatch
from agentrl.sharding import exchange
from agentrl.training.state import HostState

FOLDER = 'rejected'


def note(host: HostState, workdir: pathlib.Path, batch: TrainBatch, applied: Any, index: int | str = 0):
  """Counts an update in `host.rejected_in_a_row`; saves the batch of one that was refused.

  Args:
    host: Of the run, at the step in progress.
    workdir: The run's folder; batches go to `rejected/step_00000012_0.npz`, an array a
      field of `TrainBatch`, with a dot before the name of a part.
    batch: Of the update, of arrays of host or device.
    applied: Whether it was applied.
    index: Of the update within the step, or what was updated.
  """
  if applied:
    host.rejected_in_a_row = 0
    return
  host.rejected_in_a_row += 1
  arrays = jax.tree_util.tree_leaves_with_path(exchange.to_host(batch)._asdict())
  if not exchange.is_first():
    return
  folder = workdir / FOLDER
  folder.mkdir(exist_ok=True)
  path = folder / f'step_{host.step:08d}_{index}.npz'
  np.savez_compressed(path, **{jax.tree_util.keystr(key, simple=True, separator='.'): x for key, x in arrays})
  logging.error('An update of step %d is not finite and was not applied; its batch is in %s',
                host.step, path)
