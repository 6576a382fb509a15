"""Sequences of many lengths into rows of one length, so that little padding is trained on.

What sequences begin with alike, as the samples of a question do, a row can hold once: the first of them stands there whole,
and each of the others from the last token on that they have in common. `positions` say so: a segment that starts at
position P > 0 goes on from the first P tokens of the last one before it that starts at 0. It has a copy of the token before
the first one it trains on, so that all that a segment's tokens need of others but attention lies within the segment.
"""

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


class Plan(NamedTuple):
  """Which sequences stand in which row.

  Attributes:
    rows: For each row the indices of its sequences, in order.
    starts: For each sequence how many of its first tokens are left out, because the last sequence before it in its row
      that stands there whole begins with the same; () if all stand whole.
  """

  rows: list[list[int]]
  starts: Sequence[int] = ()


def plan_rows(sequences: Sequence[TokenSequence], row_length: int, share: bool = False) -> Plan:
  """Returns which sequences to put in which row: longest first, each into the fullest row it fits.

  With `share`, sequences that begin alike, such as the samples of one question, come one after the other, those that
  have most tokens together first. A row that has room has what they have in common once.

  Args:
    sequences: What to put into rows.
    row_length: T, tokens.
    share: Whether what a sequence begins with may be left out, see `attention.shares`.
  Raises:
    ValueError: if a sequence is longer than a row.
  """
  lengths = [len(s.tokens) for s in sequences]
  too_long = next((i for i, n in enumerate(lengths) if n > row_length), None)
  if too_long is not None:
    raise ValueError(f'sequence {too_long} has {lengths[too_long]} tokens and rows only {row_length}; '
                     'raise train.row_length or lower the rollout limits')
  families = _families(sequences) if share else [[(i, n)] for i, n in enumerate(lengths)]
  total = lambda family: family[0][1] + sum(lengths[i] - n for i, n in family)
  rooms = _Rooms(row_length)
  rows: list[list[list[int]]] = []  # of a row: each whole sequence, followed by those that go on from it
  starts = [0] * len(lengths)
  for family in sorted(families, key=lambda family: (-total(family), family[0][0])):
    homes: list[tuple[int, int, list[int]]] = []  # row, what is in common with who stands there whole, and all of them
    for i, common in family:
      # It has a token before those that it trains on.
      options = [(rooms.of[row], min(common, its) - 1, row, members) for row, its, members in homes]
      options = [x for x in options if x[1] > 0 and lengths[i] - x[1] <= x[0]]
      if options:
        _, starts[i], row, members = min(options, key=lambda x: x[0])
        members.append(i)
      else:
        row = rooms.find(lengths[i])
        if row == len(rows):
          rows.append([])
        rows[row].append([i])
        homes.append((row, common, rows[row][-1]))
      rooms.take(row, lengths[i] - starts[i])
  return Plan([[i for members in row for i in members] for row in rows], starts)


class _Rooms:
  """How many tokens each row still has room for."""

  def __init__(self, row_length: int):
    self.of: list[int] = []
    self._by_room: list[list[int]] = [[] for _ in range(row_length + 1)]

  def find(self, need: int) -> int:
    """Returns the fullest row with room for `need` tokens, a new one if there is none."""
    for rows in self._by_room[need:]:
      if rows:
        return rows[-1]
    self.of.append(len(self._by_room) - 1)
    self._by_room[-1].append(len(self.of) - 1)
    return len(self.of) - 1

  def take(self, row: int, tokens: int):
    """Notes that tokens of a row are taken."""
    self._by_room[self.of[row]].remove(row)
    self.of[row] -= tokens
    self._by_room[self.of[row]].append(row)


def _families(sequences: Sequence[TokenSequence]) -> list[list[tuple[int, int]]]:
  """Returns sequences that are equal up to where one of them is in the loss, as (index, tokens) in the order to place them.

  Tokens are those that it has in common with the first one and does not train on; any two have the smaller of their
  numbers in common. The first one is not to go on from another.
  """
  # Those that begin alike are neighbours, whatever the order of single tokens is.
  order = sorted(range(len(sequences)), key=lambda i: np.asarray(sequences[i].tokens, np.int32).tobytes())
  free = [_before_loss(s) for s in sequences]
  families: list[list[int]] = []
  for before, i in zip([None, *order], order):
    if before is not None and _common(sequences[before], sequences[i]) >= min(free[before], free[i]) > 0:
      families[-1].append(i)
    else:
      families.append([i])
  found = []
  for family in families:
    first = min(family, key=lambda i: (free[i], -len(sequences[i].tokens), i))  # nobody could leave out less
    rest = sorted({*family} - {first}, key=lambda i: (-len(sequences[i].tokens), i))
    found.append([(first, len(sequences[first].tokens)),
                  *((i, min(free[i], _common(sequences[first], sequences[i]))) for i in rest)])
  return found


def _before_loss(sequence: TokenSequence) -> int:
  """Returns how many of its first tokens others may have for it: those that it does not train on.

  Where steps of trees are told apart, those of the first turn alone: each of the others is looked for in every trajectory.
  """
  given = ~sequence.loss_mask
  if set(NODE_PARTS) & set(sequence.parts):
    given = given & (sequence.turns == sequence.turns[0])
  return len(given) if given.all() else int(np.argmin(given))


def _common(a: TokenSequence, b: TokenSequence) -> int:
  """Returns how many first tokens two sequences have in common."""
  n = min(len(a.tokens), len(b.tokens))
  differ = a.tokens[:n] != b.tokens[:n]
  return int(np.argmax(differ)) if differ.any() else n


def count_tokens(batch: TrainBatch) -> int:
  """Returns how many tokens the sequences of a batch of host arrays have, also those that stand there once for several."""
  ids = np.asarray(batch.segment_ids)
  last = (ids > 0) & (ids != np.pad(ids[:, 1:], ((0, 0), (0, 1))))
  return int(np.sum(np.asarray(batch.positions)[last] + 1))


def pack(sequences: Sequence[TokenSequence], outcome: Outcome, *, rows: int, row_length: int, channels: int = 1,
         micro_batches: int = 1, plan: Plan | None = None, share: bool = False, token_part_names: Sequence[str] = (),
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
    plan: What stands in which row; planned if None.
    share: Whether a plan may be made that leaves out what sequences begin with, see `plan_rows`.
    token_part_names: Further numbers of tokens that the sequences have.
    step: Updates made so far.
    masks: Where to put what tokens were drawn from; None where none was drawn from less than the vocabulary.
  Raises:
    ValueError: if the sequences do not fit, the micro-batches do not divide the rows, or a plan leaves out tokens that
      differ from those of the sequence before it, or are in the loss.
  """
  plan = plan_rows(sequences, row_length, share) if plan is None else plan
  if len(plan.rows) > rows:
    raise ValueError(f'{len(sequences)} sequences need {len(plan.rows)} rows of {row_length} tokens, more than {rows}')
  if rows % micro_batches:
    raise ValueError(f'{micro_batches} micro-batches do not divide {rows} rows')
  part = rows // micro_batches
  shape = (rows, row_length)
  mask_ids = None if masks is None else np.zeros(shape, np.int32)
  ints = {k: np.full(shape, fill, np.int32) for k, fill in
          (('tokens', 0), ('positions', 0), ('segment_ids', 0), ('turn_ids', -1), ('trajectory_ids', -1))}
  loss_mask, log_probs = np.zeros(shape, bool), np.zeros(shape, np.float32)
  token_parts = {name: np.full(shape, TOKEN_PARTS.get(name, np.float32(0))) for name in token_part_names}
  for k, members in enumerate(plan.rows):
    r, at, whole = k % part * micro_batches + k // part, 0, None
    for number, i in enumerate(members, 1):
      start = plan.starts[i] if plan.starts else 0
      whole = whole if start else sequences[i]  # that the next ones may go on from
      s, where = _from(sequences[i], start, whole), (r, slice(at, at + len(sequences[i].tokens) - start))
      at += len(s.tokens)
      ints['tokens'][where] = s.tokens
      ints['positions'][where] = np.arange(start, start + len(s.tokens))
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
  return batch, max(1, -(-len(plan.rows) // part))


def _from(s: TokenSequence, start: int, whole: TokenSequence | None) -> TokenSequence:
  """Returns a sequence without its first tokens, which are those of `whole`."""
  if not start:
    return s
  if whole is None or s.loss_mask[:start + 1].any() or not np.array_equal(s.tokens[:start], whole.tokens[:start]):
    raise ValueError(f'the plan leaves out {start} tokens of a sequence of trajectory {s.trajectory}, but the one before '
                     'it in its row does not begin with those, or they or the next one are in the loss; take plan_rows')
  return TokenSequence(s.tokens[start:], s.loss_mask[start:], s.log_probs[start:], s.turns[start:], s.trajectory,
                       {name: part[start:] for name, part in s.parts.items()}, s.masks[start:])
