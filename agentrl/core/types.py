"""The records that travel the pipeline, from the task that is read to the batch that is trained on.

    Task -> Trajectory (of Segments and Turns) -> TrainBatch

Axes: B rows, T tokens, N trajectories. "Absent" is None or NaN, never 0. This module imports
neither jax nor any other package of agentrl, so that tools, rewards and environments can run on
machines without an accelerator.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Message:
  """One message of a chat.

  Attributes:
    role: 'system', 'user', 'assistant' or 'tool'.
    content: Its text.
    name: Of the tool whose result it is; None of other roles, and where it is no known tool's.
  """

  role: str
  content: str
  name: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
  """A question, as read from the data: a value, never changed.

  Attributes:
    id: Unique over the whole data set, stable between runs.
    environment: Name of the environment that poses it.
    messages: What the policy is shown first, without the system message.
    ground_truth: What the reward function needs; must survive a JSON round trip.
    metadata: Anything else, such as the family the question belongs to.
  """

  id: str
  environment: str
  messages: tuple[Message, ...]
  ground_truth: Any
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """A call as the policy wrote it.

  Attributes:
    name: Tool asked for; '' where the text could not be parsed that far.
    arguments: Arguments by name; empty where the text could not be parsed.
    error: Why the text is no valid call, worded for the policy; None if it is one.
  """

  name: str
  arguments: Mapping[str, Any]
  error: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a tool's result: kind 'text' with a str, or 'image' with PNG bytes."""

  kind: str
  data: str | bytes


@dataclasses.dataclass(frozen=True)
class ToolResult:
  """What a call gave back. Failures are results too.

  Attributes:
    parts: The content, in order; what the policy reads of a failed call is here as well.
    ok: Whether the tool did what was asked.
    error: Short machine-readable kind of the failure ('timeout', 'crash', 'malformed', 'unknown_tool',
      'raised', ...); None if ok.
    seconds: Wall time from the start of the call to its result, waiting included.
    cost: In the tool's own unit; None where it has none.
    truncated: Whether the output was cut to the tool's limit.
  """

  parts: tuple[Part, ...]
  ok: bool = True
  error: str | None = None
  seconds: float = 0.0
  cost: float | None = None
  truncated: bool = False

  @property
  def text(self) -> str:
    """All text parts joined; an image stands as '[image]'."""
    return ''.join(p.data if p.kind == 'text' else '[image]' for p in self.parts)


@dataclasses.dataclass(frozen=True)
class Iteration:
  """Where a run stands, for what changes over its course.

  Attributes:
    step: Steps of the stage done.
    steps: Steps of the stage in all.
    memory: What the reader wants to find again at the next step, of JSON types; saved with the run.
  """

  step: int
  steps: int
  memory: dict[str, Any] = dataclasses.field(default_factory=dict)


class Status(str, enum.Enum):
  """How a trajectory ended."""

  RUNNING = 'running'
  FINISHED = 'finished'  # the policy gave a final answer
  LENGTH = 'length'  # out of tokens: the turn's, the trajectory's or the context's
  TURN_LIMIT = 'turn_limit'
  CALL_LIMIT = 'call_limit'
  CUT = 'cut'  # the engine stopped it (straggler, budget of all spent, shutdown)
  TOOL_FAILURE = 'tool_failure'
  ENVIRONMENT_FAILURE = 'environment_failure'
  AGENT_FAILURE = 'agent_failure'


class Boundary(str, enum.Enum):
  """Whose fault an ending is."""

  POLICY = 'policy'
  TOOL = 'tool'
  ENVIRONMENT = 'environment'
  REWARD = 'reward'
  AGENT = 'agent'
  ENGINE = 'engine'


@dataclasses.dataclass
class Turn:
  """One stretch of sampling and what came of it.

  Attributes:
    index: Counted from 0 within the trajectory.
    segment: Index of the segment that holds its tokens.
    start: First token of the turn, an index into the segment.
    end: One past its last sampled token.
    text: The sampled tokens decoded, the stop included.
    stop_reason: 'stop' (a stop string or token), 'length' (the turn's budget) or 'context' (no room left).
    calls: The calls parsed from the text.
    results: Their results, in the order of the calls.
  """

  index: int
  segment: int
  start: int
  end: int
  text: str
  stop_reason: str
  calls: tuple[ToolCall, ...] = ()
  results: tuple[ToolResult, ...] = ()


# What a segment's columns hold, by the kind of numpy's array of it.
_NARROW = {'b': np.bool_, 'i': np.int32, 'f': np.float32}


class Segment:
  """An append-only run of tokens that the policy saw as one context.

  `tokens`, `sampled`, `log_probs`, `entropies`, `turns` and `versions` are read-only [T] arrays of one length, `masks`
  a tuple of it.
  """

  def __init__(self):
    self._tokens: list[int] = []
    self._sampled: list[bool] = []
    self._log_probs: list[float] = []
    self._entropies: list[float] = []
    self._turns: list[int] = []
    self._versions: list[int] = []
    self._masks: list[bytes | None] = []

  def __len__(self) -> int:
    return len(self._tokens)

  def append_forced(self, tokens: Sequence[int], turn: int):
    """Appends tokens that the policy did not draw: a prompt, an observation.

    Args:
      tokens: [n] ids.
      turn: Index of the turn they belong to: the one that comes next.
    """
    n = len(tokens)
    self._extend(tokens, [False] * n, [float('nan')] * n, [float('nan')] * n, turn)

  def append_sampled(self, tokens: Sequence[int], log_probs: Sequence[float], entropies: Sequence[float],
                     turn: int, version: int | Sequence[int] = 0, masks: Sequence[bytes | None] = ()):
    """Appends tokens that the policy drew.

    Args:
      tokens: [n] ids.
      log_probs: [n] log-probabilities under the distribution drawn from, nats.
      entropies: [n] entropies of that distribution, nats.
      turn: Index of the turn they belong to.
      version: Of the policy that drew them, or [n] one each: see `versions`.
      masks: [n] what each was drawn from, see `masks`; () if all from the whole vocabulary.
    Raises:
      ValueError: if lengths differ, or a log-probability or entropy is not finite.
    """
    if not len(tokens) == len(log_probs) == len(entropies) or len(masks) not in (0, len(tokens)):
      raise ValueError(f'{len(tokens)} tokens came with {len(log_probs)} log-probs, '
                       f'{len(entropies)} entropies and {len(masks)} masks')
    if not (np.all(np.isfinite(log_probs)) and np.all(np.isfinite(entropies))):
      raise ValueError(f'sampled tokens {list(tokens)} have log-probs {list(log_probs)} and entropies '
                       f'{list(entropies)}; all must be finite')
    self._extend(tokens, [True] * len(tokens), log_probs, entropies, turn, version, masks)

  def append_revised(self, tokens: Sequence[int], turn: int, version: int | Sequence[int] = -1,
                     masks: Sequence[bytes | None] = ()):
    """Appends tokens in the policy's words that were drawn in another context: trained on, at unknown probability.

    Their log-probs and entropies are NaN, so that nothing can be learned from them before the learner has computed
    them anew.

    Args:
      tokens: [n] ids.
      turn: Index of the turn they belong to.
      version: As for `append_sampled`, where it is known.
      masks: As for `append_sampled`.
    """
    n = len(tokens)
    self._extend(tokens, [True] * n, [float('nan')] * n, [float('nan')] * n, turn, version, masks)

  def strip(self, start: int, end: int):
    """Takes tokens start to end out: what was drawn after them was drawn in another context than it now stands in.

    Raises:
      ValueError: if there are no such tokens, or the policy drew one of them.
    """
    if not 0 <= start < end <= len(self) or any(self._sampled[start:end]):
      raise ValueError(f'tokens {start} to {end} of a segment of {len(self)} are not all there, or not all forced')
    for column in self._columns:
      del column[start:end]
    for column in (self._log_probs, self._entropies):
      column[start:] = [float('nan')] * (len(self) - start)

  def truncate(self, length: int):
    """Drops every token from index `length` on: a rollback."""
    if not 0 <= length <= len(self):
      raise ValueError(f'cannot truncate a segment of {len(self)} tokens to {length}')
    for column in self._columns:
      del column[length:]

  def copy(self) -> Segment:
    """Returns an independent copy."""
    other = Segment()
    other._extend(self._tokens, self._sampled, self._log_probs, self._entropies, 0, self._versions, self._masks)
    other._turns = list(self._turns)
    return other

  @property
  def _columns(self) -> tuple[list, ...]:
    return (self._tokens, self._sampled, self._log_probs, self._entropies, self._turns, self._versions,
            self._masks)

  def __getstate__(self) -> dict[str, np.ndarray]:
    """Returns the columns as narrow arrays, which pickle small; masks stay as they are, since most are one object."""
    columns = {name: np.asarray(column) for name, column in vars(self).items() if name != '_masks'}
    narrow = {name: column.astype(_NARROW[column.dtype.kind]) for name, column in columns.items()}
    return {**narrow, '_masks': self._masks}

  def __setstate__(self, state: Mapping[str, np.ndarray]):
    vars(self).update({name: list(column) if name == '_masks' else column.tolist() for name, column in state.items()})

  def _extend(self, tokens, sampled, log_probs, entropies, turn, version=-1, masks=()):
    self._tokens.extend(int(t) for t in tokens)
    self._sampled.extend(sampled)
    self._log_probs.extend(float(x) for x in log_probs)
    self._entropies.extend(float(x) for x in entropies)
    self._turns.extend([turn] * len(tokens))
    self._versions.extend(np.broadcast_to(version, len(tokens)).tolist())
    self._masks.extend(masks or [None] * len(tokens))

  def tail(self, start: int) -> np.ndarray:
    """Returns the tokens from index `start` on, int32; cheaper than slicing `tokens`."""
    return np.asarray(self._tokens[start:], np.int32)

  @property
  def tokens(self) -> np.ndarray:
    """[T] int32."""
    return np.asarray(self._tokens, np.int32)

  @property
  def sampled(self) -> np.ndarray:
    """[T] bool. Whether the token is the policy's, to be trained on; False for prompts and observations."""
    return np.asarray(self._sampled, bool)

  @property
  def log_probs(self) -> np.ndarray:
    """[T] float32, nats. Behaviour log-probability; NaN where not sampled, or revised."""
    return np.asarray(self._log_probs, np.float32)

  @property
  def entropies(self) -> np.ndarray:
    """[T] float32, nats. Behaviour entropy; NaN where not sampled, or revised."""
    return np.asarray(self._entropies, np.float32)

  @property
  def turns(self) -> np.ndarray:
    """[T] int32. Index of the turn each token belongs to; an observation belongs to the turn it leads to."""
    return np.asarray(self._turns, np.int32)

  @property
  def versions(self) -> np.ndarray:
    """[T] int32. Steps of the stage done when the token was drawn; -1 where it was not drawn here."""
    return np.asarray(self._versions, np.int32)

  @property
  def masks(self) -> tuple[bytes | None, ...]:
    """[T] sets of tokens that the token was drawn from, a bit each, the lowest of the first byte for token 0.

    None is the whole vocabulary. Equal ones are usually one object.
    """
    return tuple(self._masks)


@dataclasses.dataclass
class Trajectory:
  """All that happened to one sample of one task.

  Attributes:
    task: What was asked.
    sample: Index of the sample within its group.
    group_id: Trajectories compared with each other share it.
    seed: Of the run; with task, sample and path it fixes every draw.
    policy_version: Steps of the stage done when it was asked for; see `Segment.versions` for the tokens.
    path: Branch taken at each fork, () for a root.
    parent_path: Path of the trajectory it was forked from; None for a root.
    fork_point: Tokens of the last segment shared with the parent; None for a root.
    fork_points: For each fork on the path, how many segments there were and how many tokens the last one had.
    segments: Contexts, oldest first; one unless the context was edited.
    turns: Turns, oldest first.
    status: How it ended.
    boundary: Whose fault that is; None while running and when finished.
    detail: What went wrong, in words; '' otherwise.
    answer: The final answer; None if none was given.
    rewards: Named reward parts in each function's own unit, 'total' among them once scored.
    turn_rewards: Named reward parts that each turn has one of, in the order of `turns`.
    loss_from: Tokens of the last segment before this index are left out of the loss, as are all
      of earlier segments if it is above 0: what a fork shares with a trajectory that trains it.
    loss_segments: Indices of the segments in the loss; None for all of them.
    seconds: Wall time from start to end, waiting included.
  """

  task: Task
  sample: int
  group_id: str
  seed: int
  policy_version: int = 0
  path: tuple[int, ...] = ()
  parent_path: tuple[int, ...] | None = None
  fork_point: int | None = None
  fork_points: tuple[tuple[int, int], ...] = ()
  segments: list[Segment] = dataclasses.field(default_factory=lambda: [Segment()])
  turns: list[Turn] = dataclasses.field(default_factory=list)
  status: Status = Status.RUNNING
  boundary: Boundary | None = None
  detail: str = ''
  answer: str | None = None
  rewards: dict[str, float] = dataclasses.field(default_factory=dict)
  turn_rewards: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  loss_from: int = 0
  loss_segments: tuple[int, ...] | None = None
  seconds: float = 0.0

  @property
  def results(self) -> list[ToolResult]:
    """Every tool result, in order."""
    return [r for turn in self.turns for r in turn.results]

  def drawn_by(self, turn: Turn) -> tuple[int, ...]:
    """Returns the path of the trajectory that drew a turn: this one's, or that of an ancestor.

    Trajectories of one sample share a step if a turn of that index was drawn by the same one.
    """
    for depth, (segments, tokens) in enumerate(self.fork_points):
      if (turn.segment, turn.end) <= (segments - 1, tokens):
        return self.path[:depth]
    return self.path

  @property
  def num_sampled(self) -> int:
    """Tokens that the policy drew, over all segments."""
    return int(sum(s.sampled.sum() for s in self.segments))


class TrainBatch(NamedTuple):
  """Sequences packed into rows of one length: what an update step reads.

  Several sequences share a row; `segment_ids` tells them apart and 0 marks padding. A segment that starts at a position
  P > 0 goes on from the first P tokens of another, see `models.attention.visible`, and those are not repeated. Every [B, T]
  field speaks of the token at its own index: `log_probs[b, t]` is the log-probability of `tokens[b, t]` given the tokens
  before it.

  Attributes:
    tokens: [B, T] int32; 0 where padded.
    positions: [B, T] int32. Position within the sequence, from 0.
    segment_ids: [B, T] int32. From 1 within a row; 0 where padded.
    loss_mask: [B, T] bool. Drawn by the policy and in the loss.
    baseline_mask: [N] bool. Whether the trajectory counts in its group's baseline.
    advantages: [C, B, T] float32, one plane a channel; 0 outside the loss mask.
    behaviour_log_probs: [B, T] float32, nats; 0 outside the loss mask.
    reference_log_probs: [B, T] float32, nats; 0 where there is no reference.
    values: [B, T] float32, of the policy before the update; 0 without a value head.
    returns: [B, T] float32, targets of the value head; 0 without one.
    turn_ids: [B, T] int32. Turn index within the trajectory; -1 where padded.
    trajectory_ids: [B, T] int32. Index into the [N] fields; -1 where padded.
    group_ids: [N] int32.
    weights: [N] float32. 0 takes the trajectory out of the loss; padding of N has weight 0.
    rewards: [N] float32, total reward.
    step: int32 scalar. Updates made before this one, which schedules read.
    parts: Name to [N] float32: further numbers of trajectories that the objective asks for.
    token_parts: Name to [B, T]: further numbers of tokens. A reward part of turns stands on the
      last sampled token of its turn and is 0 elsewhere; see `training.packing.TOKEN_PARTS` for those
      that every trajectory has.
    masks: [R, V / 32] uint32. Sets of tokens, bit v % 32 of word v // 32 for token v, the first one the
      whole vocabulary; None where no token was drawn from less.
    mask_ids: [B, T] int32, into `masks`: what the token was drawn from; None without masks.
  """

  tokens: Any
  positions: Any
  segment_ids: Any
  loss_mask: Any
  baseline_mask: Any
  advantages: Any
  behaviour_log_probs: Any
  reference_log_probs: Any
  values: Any
  returns: Any
  turn_ids: Any
  trajectory_ids: Any
  group_ids: Any
  weights: Any
  rewards: Any
  step: Any = 0
  parts: Any = {}
  token_parts: Any = {}
  masks: Any = None
  mask_ids: Any = None
