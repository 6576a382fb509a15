"""Sequences of many lengths into rows of one length, so that little padding is trained on."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence
import zlib

import numpy as np

from agentrl.core.types import Segment, TrainBatch, Trajectory


# What the objective may read of each token besides its reward parts.
TOKEN_PARTS = {
    'entropy': np.float32(0),  # that it was drawn at, nats
    'sampler_log_prob': np.float32(0),  # that it was drawn at, nats, also where the learner computes its own; NaN unknown
    'lag': np.float32(0),  # steps of the stage between its drawing and now, see `sequences_of`
    'call': np.float32(0),  # 1 in turns that call a tool
    # Step of the group's tree, and the one before it: forked trajectories have equal ids in steps that they share.
    'node': np.int32(-1),
    'node_parent': np.int32(-1),
    # Checksum of what the turn was shown: the observation before it, or all of them so far, the prompt included.
    'state': np.int32(-1),
    'history': np.int32(-1),
}
# Those that number steps, from 0 in each batch.
NODE_PARTS = ('node', 'node_parent')


class TokenSequence(NamedTuple):
  """One context to train on.

  Attributes:
    tokens: [n] int32.
    loss_mask: [n] bool. Drawn by the policy, or written by the demonstrator. Never the first token, which nothing predicts.
    log_probs: [n] float32, nats. Behaviour log-probs; read only where masked in.
    turns: [n] int32.
    trajectory: Index of the trajectory it belongs to.
    parts: Name to [n]: further numbers of its tokens.
    masks: [n] what each was drawn from, see `Segment.masks`; () if all from the whole vocabulary.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  log_probs: np.ndarray
  turns: np.ndarray
  trajectory: int
  parts: Mapping[str, np.ndarray] = {}
  masks: Sequence[bytes | None] = ()


class Outcome(NamedTuple):
  """What is known of each trajectory besides its tokens; [N] each.

  Attributes:
    group_ids: int32, from 0.
    rewards: float32.
    weights: float32; 0 takes a trajectory out of the loss.
    baseline_mask: bool; whether it counts in its group's baseline.
    parts: Name to [N] float32: further numbers of trajectories.
  """

  group_ids: np.ndarray
  rewards: np.ndarray
  weights: np.ndarray
  baseline_mask: np.ndarray
  parts: Mapping[str, np.ndarray] = {}


def sequences_of(trajectories: Sequence[Trajectory], token_parts: Sequence[str] = (),
                 step: int = 0) -> list[TokenSequence]:
  """Returns the segments of the trajectories, in order, each exactly as it was recorded.

  Args:
    trajectories: What was collected.
    token_parts: Names of further numbers of tokens: of `TOKEN_PARTS`, or reward parts of turns, which stand on the
      last sampled token of their turn.
    step: Steps of the stage done.
  Raises:
    KeyError: if a trajectory has no such part.
  """
  nodes = _Nodes() if set(NODE_PARTS) & set(token_parts) else None
  return [TokenSequence(s.tokens, _in_loss(t, s), s.log_probs, s.turns, i,
                        {name: _token_part(t, s, name, nodes, step) for name in token_parts}, s.masks)
          for i, t in enumerate(trajectories) for s in t.segments if len(s)]


def _in_loss(trajectory: Trajectory, segment: Segment) -> np.ndarray:
  if trajectory.loss_segments is not None:
    where = next(i for i, s in enumerate(trajectory.segments) if s is segment)
    if where not in trajectory.loss_segments:
      return np.zeros(len(segment), bool)
  if not trajectory.loss_from:
    return segment.sampled
  if segment is not trajectory.segments[-1]:
    return np.zeros(len(segment), bool)
  return segment.sampled & (np.arange(len(segment)) >= trajectory.loss_from)


def _token_part(trajectory: Trajectory, segment: Segment, name: str, nodes: _Nodes | None,
                step: int) -> np.ndarray:
  if name == 'entropy':
    return np.where(segment.sampled & np.isfinite(segment.entropies), segment.entropies, np.float32(0))
  if name == 'sampler_log_prob':
    return np.where(segment.sampled, segment.log_probs, np.float32(0))
  if name == 'lag':
    return np.where(segment.versions >= 0, np.maximum(0, step - segment.versions), 0).astype(np.float32)
  if name == 'call':
    calling = [turn.index for turn in trajectory.turns if turn.calls]
    return np.isin(segment.turns, calling).astype(np.float32)
  if name in ('state', 'history'):
    return _shown(segment, whole=name == 'history')
  if name in TOKEN_PARTS:
    return nodes.of(trajectory, segment)[name]
  part = np.zeros(len(segment), np.float32)
  where = next(i for i, s in enumerate(trajectory.segments) if s is segment)
  for turn in trajectory.turns:
    if turn.segment == where and turn.end > turn.start:
      part[turn.end - 1] = trajectory.turn_rewards[name][turn.index]
  return part


def _shown(segment: Segment, whole: bool) -> np.ndarray:
  """Returns a checksum of what stands before each token's turn and was not drawn: since the turn before, or all."""
  out, turns, forced = np.full(len(segment), -1, np.int32), segment.turns, ~segment.sampled
  seen = b''
  for turn in np.unique(turns):
    own = turns == turn
    new = segment.tokens[own & forced].tobytes()
    # A mark between observations, so that two short ones are not one long one.
    seen = seen + b'|' + new if whole else new
    out[own] = zlib.crc32(seen) >> 1
  return out


class _Nodes:
  """Numbers the steps of the groups' trees: a step is a turn, and what was appended before it."""

  def __init__(self):
    self._numbers: dict[Any, int] = {}

  def of(self, trajectory: Trajectory, segment: Segment) -> dict[str, np.ndarray]:
    """Returns the number of each token's step, and of the step before it."""
    turns = segment.turns
    per_turn = {int(k): self._number(trajectory, int(k)) for k in np.unique(turns)}
    parents = {k: self._number(trajectory, k - 1) if k else -1 for k in per_turn}
    return {'node': np.array([per_turn[k] for k in turns], np.int32),
            'node_parent': np.array([parents[k] for k in turns], np.int32)}

  def _number(self, trajectory: Trajectory, turn: int) -> int:
    t = trajectory
    path = t.drawn_by(t.turns[turn]) if turn < len(t.turns) else t.path
    return self._numbers.setdefault((t.group_id, t.sample, path, turn), len(self._numbers))


class MaskRows:
  """The distinct sets of tokens that a batch's tokens were drawn from, the first of them the whole vocabulary."""

  def __init__(self, vocab_size: int, size: int):
    """Makes a table of one shape.

    Args:
      vocab_size: V.
      size: R, sets that it has room for, at least 2; where more are needed it doubles.
    """
    self._width = -(-vocab_size // 32)
    self._numbers: dict[bytes, int] = {}
    self.size = size

  def ids(self, masks: Sequence[bytes | None], used: np.ndarray) -> np.ndarray:
    """Returns [n] int32: the row of each token's set; 0, the whole vocabulary, where `used` ([n] bool) is False."""
    number = lambda m: 0 if m is None else self._numbers.setdefault(m, 1 + len(self._numbers))
    return np.array([number(m) if use else 0 for m, use in zip(masks, used.tolist())], np.int32)

  def table(self) -> np.ndarray:
    """Returns [R, V / 32] uint32."""
    while self.size <= len(self._numbers):
      self.size *= 2
    out = np.zeros((self.size, self._width), np.uint32)
    out[0] = 0xFFFFFFFF
    for mask, number in self._numbers.items():
      row = np.frombuffer(mask, np.uint32)
      out[number, :len(row)] = row
    return out


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
         micro_batches: int = 1, plan: list[list[int]] | None = None, token_part_names: Sequence[str] = (),
         step: int = 0, masks: MaskRows | None = None) -> tuple[TrainBatch, int]:
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
    token_part_names: Further numbers of tokens that the sequences have.
    step: Updates made so far.
    masks: Where to put what tokens were drawn from; None where none was drawn from less than the vocabulary.
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
  mask_ids = None if masks is None else np.zeros(shape, np.int32)
  ints = {k: np.full(shape, fill, np.int32) for k, fill in
          (('tokens', 0), ('positions', 0), ('segment_ids', 0), ('turn_ids', -1), ('trajectory_ids', -1))}
  loss_mask, log_probs = np.zeros(shape, bool), np.zeros(shape, np.float32)
  token_parts = {name: np.full(shape, TOKEN_PARTS.get(name, np.float32(0))) for name in token_part_names}
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
      for name, plane in token_parts.items():
        plane[where] = s.parts[name]
      if masks is not None and s.masks:
        mask_ids[where] = masks.ids(s.masks, loss_mask[where])
  zeros = lambda: np.zeros(shape, np.float32)
  batch = TrainBatch(
      **ints, loss_mask=loss_mask, behaviour_log_probs=log_probs, reference_log_probs=zeros(), values=zeros(),
      returns=zeros(), advantages=np.zeros((channels, *shape), np.float32), step=np.int32(step),
      token_parts=token_parts, masks=None if masks is None else masks.table(), mask_ids=mask_ids, **outcome._asdict())
  return batch, max(1, -(-len(plan) // part))
