"""What an agent program holds: one trajectory, to append to and to sample from."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from typing import TYPE_CHECKING, Sequence

import numpy as np

from agentrl.core.types import Boundary, Status, ToolCall, ToolResult, Trajectory, Turn
from agentrl.rollout.budget import Limits

if TYPE_CHECKING:
  from agentrl.rollout.engine import Engine


class TrajectoryEnded(Exception):
  """A program asked for something its trajectory has no room for.

  The engine records status, boundary and the message.
  """

  def __init__(self, status: Status, boundary: Boundary, message: str):
    super().__init__(message)
    self.status = status
    self.boundary = boundary


def trajectory_seed(seed: int, task_id: str, sample: int, path: Sequence[int] = ()) -> tuple[int, int]:
  """Returns the sampling key of a trajectory, two uint32, a function of these arguments alone."""
  text = repr((seed, task_id, sample, tuple(path))).encode()
  words = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32)
  return int(words[0]), int(words[1])


class Request:
  """A turn being sampled: what is left of it, and the future that its session awaits."""

  def __init__(self, budget: int, stop_ids: tuple[int, ...], stop_texts: tuple[str, ...], start: int):
    self.budget = budget
    self.stop_ids = stop_ids
    self.stop_texts = stop_texts
    self.start = start
    self.future: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class Session:
  """One trajectory of one task, driven by an agent program.

  Its slot in the cache is the engine's business: a session may lose it while it waits, and gets its context
  recomputed, without its program noticing.
  """

  def __init__(self, engine: Engine, trajectory: Trajectory, limits: Limits):
    self.engine = engine
    self.trajectory = trajectory
    self.limits = limits
    self.seed = trajectory_seed(trajectory.seed, trajectory.task.id, trajectory.sample, trajectory.path)
    self.slot: int | None = None
    self.cached = 0  # tokens of the context that the slot holds
    self.request: Request | None = None
    self.waiting_since = 0.0  # when the program last took over, for the engine's scheduling
    self._forks = 0

  @property
  def context(self):
    """The current segment."""
    return self.trajectory.segments[-1]

  @property
  def num_turns(self) -> int:
    """Turns sampled so far."""
    return len(self.trajectory.turns)

  @property
  def tokens_left(self) -> int:
    """Tokens the policy may still draw, by the trajectory's and the context's limit."""
    return max(0, min(self.limits.trajectory_tokens - self.trajectory.num_sampled,
                      self.limits.context_tokens - len(self.context)))

  def append(self, tokens: Sequence[int]):
    """Forces tokens into the context: a prompt, an observation. They are never trained on.

    Args:
      tokens: [n] ids. They enter the cache with the next turn.
    Raises:
      TrajectoryEnded: if the context has no room for them.
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
    """
    self._check_open()
    room = self.limits.context_tokens - len(self.context)
    if len(tokens) > room:
      raise TrajectoryEnded(Status.LENGTH, Boundary.ENVIRONMENT,
                            f'{len(tokens)} tokens were appended where {room} of the '
                            f'{self.limits.context_tokens} tokens of the context were left')
    self.context.append_forced(tokens, self.num_turns)

  async def generate(self, *, stops: Sequence[str] = (), max_tokens: int | None = None) -> Turn:
    """Samples one turn and returns it, recorded. Cancelled, it leaves the context as it was.

    Args:
      stops: Strings that end the turn; kept in it. One that is a single piece stops on the device, another is found
        in the decoded text, and what was drawn past it is rolled back.
      max_tokens: Budget of the turn; the limits' if None.
    Raises:
      TrajectoryEnded: if no turn or no token is left to sample, or nothing was appended yet.
      ValueError: if max_tokens is below 1, or a stop is empty, or too many stops are single pieces.
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
    """
    self._check_open()
    if max_tokens is not None and max_tokens < 1:
      raise ValueError(f'max_tokens={max_tokens} must be at least 1')
    if not len(self.context):
      raise TrajectoryEnded(Status.AGENT_FAILURE, Boundary.AGENT, 'generate() before any append()')
    if self.num_turns >= self.limits.turns:
      raise TrajectoryEnded(Status.TURN_LIMIT, Boundary.POLICY, f'no turn left of {self.limits.turns}')
    turn_budget = min(self.limits.turn_tokens, max_tokens or self.limits.turn_tokens)
    budget = min(turn_budget, self.tokens_left)
    if budget < 1:
      raise TrajectoryEnded(Status.LENGTH, Boundary.POLICY, 'no token left to draw')
    stop_ids, stop_texts = self.engine.split_stops(tuple(stops))
    start = len(self.context)
    self.request = Request(budget, stop_ids, stop_texts, start)
    self.engine.submit(self)
    try:
      reason = await self.request.future
    except asyncio.CancelledError:
      self.engine.withdraw(self)
      self._cut(start)
      raise
    finally:
      self.request = None
    if reason == 'length' and budget < turn_budget:
      reason = 'context'
    text = self.engine.tokenizer.decode(self.context.tail(start).tolist())
    turn = Turn(index=self.num_turns, segment=len(self.trajectory.segments) - 1, start=start,
                end=len(self.context), text=text, stop_reason=reason)
    self.trajectory.turns.append(turn)
    return turn

  def observe(self, turn: Turn, calls: Sequence[ToolCall], results: Sequence[ToolResult]):
    """Records what came of a turn."""
    turn.calls, turn.results = tuple(calls), tuple(results)

  def finish(self, status: Status, answer: str | None = None, boundary: Boundary | None = None, detail: str = ''):
    """Ends the trajectory."""
    self.trajectory.status = status
    self.trajectory.answer = answer
    self.trajectory.boundary = boundary
    self.trajectory.detail = detail

  @property
  def finished(self) -> bool:
    """Whether the trajectory has ended."""
    return self.trajectory.status is not Status.RUNNING

  def mark(self) -> tuple[int, int]:
    """Returns the present place, for `rollback`."""
    return len(self.context), self.num_turns

  def rollback(self, mark: tuple[int, int]):
    """Forgets every token and turn since `mark`; nothing is recomputed.

    The same tokens are drawn again from there unless something else is appended first.

    Raises:
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
    """
    self._check_open()
    length, turns = mark
    del self.trajectory.turns[turns:]
    self._cut(length)

  def _check_open(self):
    if self.finished:
      raise RuntimeError(f'the trajectory has ended ({self.trajectory.status.value})')
    if self.request is not None:
      raise RuntimeError('a turn is being sampled; await it first')

  def _cut(self, length: int):
    self.context.truncate(length)
    self.cached = min(self.cached, max(0, length - 1))
    self.engine.rolled_back(self)

  def fork(self, n: int) -> list[Session]:
    """Returns n sessions that go on from here, each with draws of its own; the prefix is copied, not recomputed.

    Each is a trajectory of the same group; run programs on them with `engine.adopt`.
    """
    forks = []
    for _ in range(n):
      t = self.trajectory
      path = (*t.path, self._forks)
      self._forks += 1
      forks.append(Session(self.engine, Trajectory(
          task=t.task, sample=t.sample, group_id=t.group_id, seed=t.seed, policy_version=t.policy_version, path=path,
          parent_path=t.path, fork_point=len(self.context), segments=[s.copy() for s in t.segments],
          turns=[dataclasses.replace(turn) for turn in t.turns]), self.limits))
    return forks
