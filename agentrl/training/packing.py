"""Sequences of many lengths into rows of one length, so that little padding is trained on."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from agentrl.core.types import TrainBatch, Trajectory


class TokenSequence(NamedTuple):
  """One context to train on.

  Attributes:
    tokens: [n] int32.
    loss_mask: [n] bool. Drawn by the policy, or written by the demonstrator. Never the first token, which nothing predicts.
    log_probs: [n] float32, nats. Behaviour log-probs; read only where masked in.
    turns: [n] int32.
    trajectory: Index of the trajectory it belongs to.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  log_probs: np.ndarray
  turns: np.ndarray
  trajectory: int


class Outcome(NamedTuple):
  """What is known of each trajectory besides its tokens; [N] each.

  Attributes:
    group_ids: int32, from 0.
    rewards: float32.
    weights: float32; 0 takes a trajectory out of the loss.
    baseline_mask: bool; whether it counts in its group's baseline.
  """

  group_ids: np.ndarray
  rewards: np.ndarray
  weights: np.ndarray
  baseline_mask: np.ndarray


def sequences_of(trajectories: Sequence[Trajectory]) -> list[TokenSequence]:
  """Returns the segments of the trajectories, in order, each exactly as it was recorded."""
  return [TokenSequence(s.tokens, s.sampled, s.log_probs, s.turns, i)
          for i, trajectory in enumerate(trajectories) for s in trajectory.segments if len(s)]


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """Returns, for each row, the indices of the sequences put there: longest first, each into the fullest row it fits.

  Raises:
    ValueError: if a sequence is longer than a row.
  """
  rows: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
  for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    need = lengths[i]
    if need > row_length:
      raise ValueError(f'sequence {i} has {need} tokens and rows only {row_length}; '
                       'raise train.row_length or lower the rollout limits')
    room = next((r for r in range(need, row_length + 1) if by_room[r]), None)
    if room is None:
      row, room = len(rows), row_length
      rows.append([])
    else:
      row = by_room[room].pop()
    rows[row].append(i)
    by_room[room - need].append(row)
  return rows


def pack(sequences: Sequence[TokenSequence], outcome: Outcome, *, rows: int, row_length: int, channels: int = 1,
         micro_batches: int = 1, plan: list[list[int]] | None = None) -> tuple[TrainBatch, int]:
  """Returns a batch of `rows` x `row_length` tokens, and how many of its micro-batches are used.

  Micro-batch m is rows m, m + micro_batches, ...; they are filled one after the other, and the rest is padding.

  Advantages, values, returns and reference log-probs are zeros, for the learner to fill in.

  Args:
    sequences: What to pack.
    outcome: Of their trajectories; N is its length.
    rows: B.
    row_length: T, tokens.
    channels: C, planes of advantages.
    micro_batches: Parts that the learner cuts the rows into; must divide them.
    plan: Indices of the sequences of each row; planned if None.
  Raises:
    ValueError: if the sequences do not fit, or the micro-batches do not divide the rows.
  """
  plan = plan_rows([len(s.tokens) for s in sequences], row_length) if plan is None else plan
  if len(plan) > rows:
    raise ValueError(f'{len(sequences)} sequences need {len(plan)} rows of {row_length} tokens, more than {rows}')
  if rows % micro_batches:
    raise ValueError(f'{micro_batches} micro-batches do not divide {rows} rows')
  part = rows // micro_batches
  shape = (rows, row_length)
  ints = {k: np.full(shape, fill, np.int32) for k, fill in
          (('tokens', 0), ('positions', 0), ('segment_ids', 0), ('turn_ids', -1), ('trajectory_ids', -1))}
  loss_mask, log_probs = np.zeros(shape, bool), np.zeros(shape, np.float32)
  for k, members in enumerate(plan):
    r, at = k % part * micro_batches + k // part, 0
    for number, i in enumerate(members, 1):
      s, where = sequences[i], (r, slice(at, at + len(sequences[i].tokens)))
      at += len(s.tokens)
      ints['tokens'][where] = s.tokens
      ints['positions'][where] = np.arange(len(s.tokens))
      ints['segment_ids'][where] = number
      ints['turn_ids'][where] = s.turns
      ints['trajectory_ids'][where] = s.trajectory
      loss_mask[where] = s.loss_mask & (outcome.weights[s.trajectory] > 0)
      log_probs[where] = np.where(loss_mask[where], s.log_probs, 0.0)
  zeros = lambda: np.zeros(shape, np.float32)
  batch = TrainBatch(
      **ints, loss_mask=loss_mask, behaviour_log_probs=log_probs, reference_log_probs=zeros(), values=zeros(),
      returns=zeros(), advantages=np.zeros((channels, *shape), np.float32), **outcome._asdict())
  return batch, max(1, -(-len(plan) // part))
