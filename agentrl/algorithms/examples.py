"""A random batch of tool-using trajectories, to try or test an objective without a policy."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.algorithms.objective import PolicyOutputs
from agentrl.core.types import TrainBatch

_PLANES = {  # name: value where padded
    'tokens': 0, 'positions': 0, 'segment_ids': 0, 'turn_ids': -1, 'trajectory_ids': -1,
    'loss_mask': False, 'behaviour_log_probs': 0.0, 'reference_log_probs': 0.0, 'values': 0.0,
    'log_probs': 0.0, 'entropies': 0.0, 'new_values': 0.0,
}
_PARTS = {'entropy': 0.0, 'node': -1, 'node_parent': -1, 'call': 0.0, 'state': -1, 'history': -1,
          'sampler_log_prob': 0.0, 'lag': 0.0}


def example_batch(seed: int = 0, *, groups: int = 3, group_size: int = 4, length: int = 48,
                  packed: bool = True, min_rows: int = 0, spare: int = 2,
                  reads: Sequence[str] = ()) -> tuple[TrainBatch, PolicyOutputs]:
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
    reads: Names of further parts, as `Objective.reads` gives them: numbers in [0, 1], of trajectories
      and, under the same name, of turns; those of `training.packing.TOKEN_PARTS` are what they are
      in a real batch, where the second of two trajectories shares the first turn of the first.
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
  trajectories = [_trajectory(rng, i) for i in range(count)]
  for name in reads:
    for trajectory in trajectories:
      trajectory.setdefault(name, _turn_numbers(rng, trajectory))
  rows = _place(trajectories, length, packed)
  rows += [[]] * (min_rows - len(rows))
  names = {**_PLANES, **{name: _PARTS.get(name, 0.0) for name in (*_PARTS, *reads)}}
  planes = {name: np.stack([_row(row, name, length, padding) for row in rows])
            for name, padding in names.items()}
  outputs = PolicyOutputs(*(planes.pop(n) for n in ('log_probs', 'entropies', 'new_values')))
  real = np.arange(count + spare) < count
  rewards = np.where(real, rng.choice([0.0, 0.5, 1.0], size=count + spare), 0.0)
  # A part may be of trajectories or of turns: here each is both.
  parts = {name: np.where(real, rng.choice([0.0, 0.5, 1.0], size=count + spare), 0.0).astype(np.float32)
           for name in reads if name not in _PARTS}
  token_parts = {name: planes.pop(name) for name in {*_PARTS, *reads}}
  batch = TrainBatch(
      **planes, baseline_mask=real, weights=real.astype(np.float32),
      rewards=rewards.astype(np.float32),
      group_ids=np.where(real, np.arange(count + spare) // group_size, 0).astype(np.int32),
      advantages=None, returns=None, step=np.int32(0),
      parts=parts, token_parts={name: token_parts[name] for name in reads})
  return batch, outputs


def _turn_numbers(rng, trajectory):
  """A number at the last sampled token of each turn."""
  mask, turns = trajectory['loss_mask'], trajectory['turn_ids']
  last = mask & np.append((turns[1:] != turns[:-1]) | ~mask[1:], True)
  return np.where(last, rng.choice([0.0, 0.5, 1.0], size=len(mask)), 0.0).astype(np.float32)


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
  turns = np.array(turns, np.int32)
  owner = np.where(turns == 0, index - index % 2, index)
  before = np.where(turns == 1, index - index % 2, index)
  return {
      'tokens': rng.integers(1, 99, size=size).astype(np.int32),
      'positions': np.arange(size, dtype=np.int32),
      'segment_ids': np.ones(size, np.int32),
      'turn_ids': turns,
      'trajectory_ids': np.full(size, index, np.int32),
      'loss_mask': mask,
      'behaviour_log_probs': plane(behaviour),
      'reference_log_probs': plane(behaviour + 0.2 * rng.normal(size=size)),
      'values': rng.normal(size=size).astype(np.float32),
      'log_probs': (behaviour + 0.3 * rng.normal(size=size)).astype(np.float32),
      'entropies': rng.uniform(0.1, 2.0, size=size).astype(np.float32),
      'new_values': rng.normal(size=size).astype(np.float32),
      'entropy': plane(rng.uniform(0.1, 2.0, size=size)),
      'node': (4 * owner + turns).astype(np.int32),
      'node_parent': np.where(turns > 0, 4 * before + turns - 1, -1).astype(np.int32),
      'lag': plane(turns[-1] - turns),
      'call': (turns < turns[-1]).astype(np.float32),
      'state': (turns % 2 + 10).astype(np.int32),
      'history': (turns + 20).astype(np.int32),
      'sampler_log_prob': plane(behaviour + 0.1 * np.sin(np.arange(size))),
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


def _row(row, name, length, padding):
  """Joins one plane of the trajectories of a row and pads it."""
  pieces = [(i + 1) * t[name] if name == 'segment_ids' else t[name] for i, t in enumerate(row)]
  filled = sum(len(p) for p in pieces)
  dtype = np.asarray(padding).dtype
  dtype = {'i': np.int32, 'f': np.float32}.get(dtype.kind, bool)
  return np.concatenate([*pieces, np.full(length - filled, padding, dtype)]).astype(dtype)
