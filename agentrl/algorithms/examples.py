"""A random batch of tool-using trajectories, to try or test an objective without a policy."""

from __future__ import annotations

import numpy as np

from agentrl.algorithms.objective import PolicyOutputs
from agentrl.core.types import TrainBatch

_PLANES = {  # name: value where padded
    'tokens': 0, 'positions': 0, 'segment_ids': 0, 'turn_ids': -1, 'trajectory_ids': -1,
    'loss_mask': False, 'behaviour_log_probs': 0.0, 'reference_log_probs': 0.0, 'values': 0.0,
    'log_probs': 0.0, 'entropies': 0.0, 'new_values': 0.0,
}


def example_batch(seed: int = 0, *, groups: int = 3, group_size: int = 4, length: int = 48,
                  packed: bool = True, min_rows: int = 0,
                  spare: int = 2) -> tuple[TrainBatch, PolicyOutputs]:
  """Returns a batch of random numbers with the structure of a real one, and a policy's outputs.

  Each trajectory is a prompt, then one to three turns with observations between them. The same seed
  gives the same trajectories packed and unpacked.

  Args:
    seed: Of the numbers.
    groups: Questions.
    group_size: Samples a question.
    length: Tokens a row, at least 25: the longest trajectory.
    packed: Whether trajectories share rows.
    min_rows: Rows of padding are added up to this number.
    spare: Padding of the [N] fields, of weight 0.
  Returns:
    A TrainBatch without advantages, and outputs of a policy that has moved on a little: numpy
    arrays.
  Example:
    >>> from agentrl.algorithms import make
    >>> objective, (batch, outputs) = make('grpo'), example_batch()
    >>> loss, metrics = objective.loss(outputs, objective.prepare(batch))
    >>> bool(np.isfinite(loss))
    True
  """
  rng = np.random.default_rng(seed)
  count = groups * group_size
  rows = _place([_trajectory(rng, i) for i in range(count)], length, packed)
  rows += [[]] * (min_rows - len(rows))
  planes = {name: np.stack([_row(row, name, length) for row in rows]) for name in _PLANES}
  outputs = PolicyOutputs(*(planes.pop(n) for n in ('log_probs', 'entropies', 'new_values')))
  real = np.arange(count + spare) < count
  rewards = np.where(real, rng.choice([0.0, 0.5, 1.0], size=count + spare), 0.0)
  batch = TrainBatch(
      **planes, baseline_mask=real, weights=real.astype(np.float32),
      rewards=rewards.astype(np.float32),
      group_ids=np.where(real, np.arange(count + spare) // group_size, 0).astype(np.int32),
      advantages=None, returns=None)
  return batch, outputs


def _trajectory(rng, index):
  """One trajectory: a dict of [T] arrays."""
  turns, mask = [0] * int(rng.integers(2, 5)), []
  mask += [False] * len(turns)
  for turn in range(int(rng.integers(1, 4))):
    if turn:
      observation = int(rng.integers(1, 4))
      turns, mask = turns + [turn] * observation, mask + [False] * observation
    drawn = int(rng.integers(1, 6))
    turns, mask = turns + [turn] * drawn, mask + [True] * drawn
  mask, size = np.array(mask), len(mask)

  def plane(x):
    return np.where(mask, x, 0.0).astype(np.float32)

  behaviour = -rng.exponential(size=size)
  return {
      'tokens': rng.integers(1, 99, size=size).astype(np.int32),
      'positions': np.arange(size, dtype=np.int32),
      'segment_ids': np.ones(size, np.int32),
      'turn_ids': np.array(turns, np.int32),
      'trajectory_ids': np.full(size, index, np.int32),
      'loss_mask': mask,
      'behaviour_log_probs': plane(behaviour),
      'reference_log_probs': plane(behaviour + 0.2 * rng.normal(size=size)),
      'values': rng.normal(size=size).astype(np.float32),
      'log_probs': (behaviour + 0.3 * rng.normal(size=size)).astype(np.float32),
      'entropies': rng.uniform(0.1, 2.0, size=size).astype(np.float32),
      'new_values': rng.normal(size=size).astype(np.float32),
  }


def _place(trajectories, length, packed):
  """Groups trajectories into rows, in order, opening a row where one does not fit."""
  rows, room = [], 0
  for trajectory in trajectories:
    size = len(trajectory['tokens'])
    if size > length:
      raise ValueError(f'a trajectory of {size} tokens does not fit rows of {length}; take '
                       'length=25 or more')
    if not packed or size > room:
      rows.append([])
      room = length
    rows[-1].append(trajectory)
    room -= size
  return rows


def _row(row, name, length):
  """Joins one plane of the trajectories of a row and pads it."""
  pieces = [(i + 1) * t[name] if name == 'segment_ids' else t[name] for i, t in enumerate(row)]
  filled = sum(len(p) for p in pieces)
  dtype = np.asarray(_PLANES[name]).dtype
  dtype = {'i': np.int32, 'f': np.float32}.get(dtype.kind, bool)
  return np.concatenate([*pieces, np.full(length - filled, _PLANES[name], dtype)]).astype(dtype)
