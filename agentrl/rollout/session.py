"""What an agent program holds: one trajectory, to append to and to sample from."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import operator
import time
from typing import TYPE_CHECKING, NamedTuple, Sequence

import numpy as np

from agentrl.core.types import Boundary, Segment, Status, ToolCall, ToolResult, Trajectory, Turn
from agentrl.rollout.budget import Limits
from agentrl.rollout.journal import Draw, Journal, drawn, terms
from agentrl.sampling.constrain import Cursor, Grammar

if TYPE_CHECKING:
  from agentrl.rollout.engine import Engine
  from agentrl.sampling.contexts import Parked
  from agentrl.sampling.sampler import Sampler


class TrajectoryEnded(Exception):
  """A program asked for something its trajectory has no room for.

  The engine records status, boundary and the message.
  """

  def __init__(self, status: Status, boundary: Boundary, message: str):
    super().__init__(message)
    self.status = status
    self.boundary = boundary


class Mark(NamedTuple):
  """A place in a trajectory: how many segments, tokens of the last one, and turns there were."""

  segments: int
  length: int
  turns: int


def trajectory_seed(seed: int, task_id: str, sample: int, path: Sequence[int] = ()) -> tuple[int, int]:
  """Returns the sampling key of a trajectory, two uint32, a function of these arguments alone."""
  text = repr((seed, task_id, sample, tuple(path))).encode()
  words = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32)
  return int(words[0]), int(words[1])


def check_context(limits: Limits, sampler: Sampler):
  """Refuses limits that a sampler has no room for.

  Raises:
    ValueError: if their context is longer than the sampler's.
  """
  if limits.context_tokens > sampler.context:
    raise ValueError(f'context_tokens={limits.context_tokens} is above the sampler\'s longest context of '
                     f'{sampler.context} tokens')


class Request:
  """A turn being sampled: what is left of it, and the future that its session awaits."""

  def __init__(self, budget: int, stop_ids: tuple[int, ...], stop_texts: tuple[str, ...], start: int,
               grammar: Grammar | None = None, asked: int = 0):
    self.budget = budget
    self.stop_ids = stop_ids
    self.stop_texts = stop_texts
    self.start = start
    self.asked = asked  # for the journal
    self._cursor = grammar.start() if grammar else None
    self.future: asyncio.Future[str] = asyncio.get_running_loop().create_future()


  def cursor(self, context: Segment) -> Cursor | None:
    """Returns where the turn stands in its grammar; None without one."""
    if self._cursor:
      for token in context.tail(self.start + self._cursor.taken).tolist():
        self._cursor.take(token)
    return self._cursor


class Session:
  """One trajectory of one task, driven by an agent program.

  Its seat in the cache is the engine's business: a session may lose it while it waits, and gets its context
  recomputed, without its program noticing.

  Attributes:
    grammar: What its turns may be; None to draw freely. The engine's, unless a program sets another for the turns to
      come. A turn begins a message, whatever the one before it ended in.
  """

  def __init__(self, engine: Engine, trajectory: Trajectory, limits: Limits, root: Session | None = None,
               journals: dict[tuple[int, ...], Journal] | None = None):
    self.engine = engine
    self.root = root or self  # the job's session that this one descends from
    self.journals = journals  # by path; None where nobody will run the program again
    self.journal = None if journals is None else journals.setdefault(trajectory.path, Journal())
    self.trajectory = trajectory
    self._limits = limits
    self.grammar = engine.grammar
    self.seed = trajectory_seed(trajectory.seed, trajectory.task.id, trajectory.sample, trajectory.path)
    self.seat: int | None = None
    self.cached = 0  # tokens of the context that the seat holds
    self.request: Request | None = None
    self.discarded = False  # left out of what is collected
    self._drawn = 0  # tokens, those forgotten since included
    self._descendants = 0  # of a root: sessions forked from it and from its forks
    self.parked: Parked | None = None  # what left the cache with the seat
    self.policy = ''  # of those that the engine's sampler has, the one that draws
    self.waiting_since = 0.0  # when the program last took over, for the engine's scheduling
    self.asked_at = 0.0  # when it last asked for a turn
    self.queued_at: float | None = None  # since when it waits to draw it; None once it draws
    self._forks = 0
    self.opened: list[Session] = []  # sessions of other roles, of this one's program
    self.adopted = False  # whether a program of its own drives it

  @property
  def limits(self) -> Limits:
    """What the trajectory may use; the engine's, unless its program sets others.

    Raises:
      ValueError: if set to a longer context than the sampler has.
    """
    return self._limits

  @limits.setter
  def limits(self, limits: Limits):
    check_context(limits, self.engine.sampler)
    self._limits = limits

  @property
  def label(self) -> str:
    """Names the session in the timeline."""
    t = self.trajectory
    return '/'.join((t.task.id, str(t.sample), *map(str, t.path)))

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
      ValueError: if the policy knows no such tokens.
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
    """
    self._check_open()
    self._check_known(tokens)
    self._check_room(tokens, Boundary.ENVIRONMENT)
    self.context.append_forced(tokens, self.num_turns)

  async def generate(self, *, stops: Sequence[str] = (), max_tokens: int | None = None) -> Turn:
    """Samples one turn and returns it, recorded. Cancelled, it leaves the context as it was.

    Args:
      stops: Strings that end the turn; kept in it. One that is a single piece stops on the device, another is found
        in the decoded text, and what was drawn past it is rolled back.
      max_tokens: Budget of the turn; the limits' if None.
    Raises:
      TrajectoryEnded: if no turn, call or token is left, nothing was appended yet, or far more was drawn and
        rolled back than a trajectory may hold.
      ValueError: if max_tokens is below 1, or a stop is empty, or too many stops are single pieces, or the sampler was not
        made for grammars, or does not have the policy.
      TypeError: if max_tokens is no whole number, or the stops are one string.
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
    """
    self._check_open()
    if max_tokens is not None and operator.index(max_tokens) < 1:
      raise ValueError(f'max_tokens={max_tokens} must be at least 1')
    if isinstance(stops, str):
      raise TypeError(f'stops={stops!r} is one string, which is not taken for its letters; give a list of strings')
    self._check_policy(self.policy)
    if self.grammar and not self.engine.sampler.masks:
      raise ValueError('a session has a grammar, and its sampler was not made with constrained=True')
    if not len(self.context):
      raise TrajectoryEnded(Status.AGENT_FAILURE, Boundary.AGENT, 'generate() before any append()')
    if self.num_turns >= self.limits.turns:
      raise TrajectoryEnded(Status.TURN_LIMIT, Boundary.POLICY, f'no turn left of {self.limits.turns}')
    if len(self.trajectory.results) >= self.limits.calls:
      raise TrajectoryEnded(Status.CALL_LIMIT, Boundary.POLICY, f'no call left of {self.limits.calls}')
    turn_budget = min(self.limits.turn_tokens, max_tokens or self.limits.turn_tokens)
    budget = min(turn_budget, self.tokens_left)
    if budget < 1:
      raise TrajectoryEnded(Status.LENGTH, Boundary.POLICY, 'no token left to draw')
    if self._drawn >= self.limits.redraws * self.limits.trajectory_tokens:
      raise TrajectoryEnded(Status.AGENT_FAILURE, Boundary.AGENT,
                            f'{self._drawn} tokens drawn in all, most of them rolled back again')
    stop_ids, stop_texts = self.engine.split_stops(tuple(stops))
    start = len(self.context)
    self.request = Request(budget, stop_ids, stop_texts, start, self.grammar,
                           terms(budget, stops, self.grammar, self.policy))
    reason = self._replay()
    try:
      if reason is None:
        self.engine.submit(self)
        reason = await self.request.future
        if self.journal:
          self.journal.note(self.context, start, reason, self.request.asked)
    except asyncio.CancelledError:
      self.engine.withdraw(self)
      self._forget_turn()
      raise
    finally:
      self.request = None
    self._drawn += len(self.context) - start
    if reason == 'length' and budget < turn_budget:
      reason = 'context'
    text = self.engine.tokenizer.decode(self.context.tail(start).tolist())
    turn = Turn(index=self.num_turns, segment=len(self.trajectory.segments) - 1, start=start,
                end=len(self.context), text=text, stop_reason=reason)
    self.trajectory.turns.append(turn)
    return turn

  def _replay(self) -> str | None:
    """Appends what the journal has of the turn asked for, and returns why it ended; None if it has to go on."""
    draw = self.journal.ask(self.context, self.request.asked) if self.journal else None
    if draw is None:
      return None
    self.context.append_sampled(draw.tokens, draw.log_probs, draw.entropies, self.num_turns, draw.versions,
                                self._masks(draw.tokens))
    self.request.budget -= len(draw.tokens)
    return draw.reason

  def _masks(self, tokens: Sequence[int]) -> Sequence[bytes | None]:
    """Returns what the tokens of a turn are drawn from, as `Segment.append_sampled` takes it."""
    return self.grammar.masks(tokens) if self.grammar else ()

  def under_way(self) -> list[Draw]:
    """Returns the turn that is being sampled, as far as it is drawn; [] if none is."""
    request = self.request
    return [] if request is None else [drawn(self.context, request.start, None, request.asked)]

  def observe(self, turn: Turn, calls: Sequence[ToolCall], results: Sequence[ToolResult]):
    """Records what came of a turn."""
    turn.calls, turn.results = tuple(calls), tuple(results)
    self.engine.spend(calls=len(results))

  def finish(self, status: Status, answer: str | None = None, boundary: Boundary | None = None, detail: str = ''):
    """Ends the trajectory.

    Raises:
      ValueError: if there is no such status.
    """
    self.trajectory.status = Status(status)
    self.trajectory.answer = answer
    self.trajectory.boundary = boundary
    self.trajectory.detail = detail

  @property
  def finished(self) -> bool:
    """Whether the trajectory has ended."""
    return self.trajectory.status is not Status.RUNNING

  def mark(self) -> Mark:
    """Returns the present place, for `rollback` and `revise`."""
    return Mark(len(self.trajectory.segments), len(self.context), self.num_turns)

  def rollback(self, mark: Mark):
    """Forgets every token, turn and context since `mark`; within a context nothing is recomputed.

    The same tokens are drawn again from there unless something else is appended first.

    Raises:
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
      ValueError: if the mark is not of this session's past.
    """
    self._check_open()
    t = self.trajectory
    if mark.segments < 1 or mark.length < 0 or mark.turns < 0:
      raise ValueError(f'{mark} is no place')
    if mark.segments > len(t.segments) or mark.length > len(t.segments[mark.segments - 1]) or mark.turns > len(t.turns):
      raise ValueError(f'{mark} lies ahead of {self.mark()}: what was there is forgotten')
    del t.turns[mark.turns:]
    before = self.context
    del t.segments[mark.segments:]
    self.context.truncate(mark.length)
    self._note_changed(before)

  def replace(self, tokens: Sequence[int]):
    """Goes on in another context: a new segment of forced tokens, recomputed only past the common prefix.

    What was drawn stays in the segments it was drawn in, to be trained on once: nothing of the new context is, before
    the policy draws there.

    Args:
      tokens: [n] ids of the whole new context; they enter the cache with the next turn.
    Raises:
      TrajectoryEnded: if the context has no room for them.
      ValueError: if there are none, or the policy knows no such tokens.
      RuntimeError: if the trajectory has ended, or a turn is being sampled.
    """
    self._check_open()
    if not len(tokens):
      raise ValueError('a context must not be empty')
    before = self.context
    self.trajectory.segments.append(Segment())
    try:
      self.append(tokens)
    except (TrajectoryEnded, ValueError):
      self.trajectory.segments.pop()
      raise
    self._note_changed(before)

  def revise(self, mark: Mark, tokens: Sequence[int]) -> Turn:
    """Puts a turn in the policy's words in place of everything since `mark`, and returns it.

    For a turn mended with a later one: its tokens were drawn, but not here, so that they are trained on with log-probs
    unknown (NaN) until the learner recomputes them.

    Args:
      mark: The place where the turn begins.
      tokens: [n] ids.
    Raises:
      ValueError: if there are no tokens, or none that the policy knows, or see `rollback`.
      TrajectoryEnded: if the context has no room for them.
    """
    if not len(tokens):
      raise ValueError('a turn must not be empty')
    self._check_known(tokens)
    self.rollback(mark)
    self._check_room(tokens, Boundary.AGENT)
    start = len(self.context)
    self.context.append_revised(tokens, self.num_turns, masks=self._masks(tokens))
    text = self.engine.tokenizer.decode([int(t) for t in tokens])
    turn = Turn(index=self.num_turns, segment=len(self.trajectory.segments) - 1, start=start, end=len(self.context),
                text=text, stop_reason='stop')
    self.trajectory.turns.append(turn)
    return turn

  def strip(self, start: int, end: int):
    """Takes forced tokens out of the current context, as if they had never been shown: a hint.

    What was drawn after them is trained on in the shorter context, with log-probs unknown (NaN) until the learner
    recomputes them.

    Args:
      start: Index of the first token taken out.
      end: One past the last.
    Raises:
      ValueError: if there are no such tokens, or the policy drew one of them.
      RuntimeError: if a turn is being sampled. The trajectory may have ended.
    """
    self._check_idle()
    self.context.strip(start, end)
    t, last = self.trajectory, len(self.trajectory.segments)
    shifted = lambda at: max(start, at - (end - start)) if at > start else at
    for turn in t.turns:
      if turn.segment == last - 1:
        turn.start, turn.end = shifted(turn.start), shifted(turn.end)
    t.fork_points = tuple((n, shifted(at) if n == last else at) for n, at in t.fork_points)
    if t.fork_points:
      t.fork_point = t.fork_points[-1][1]
    t.loss_from = shifted(t.loss_from)
    self.cached = min(self.cached, start, max(0, len(self.context) - 1))

  def discard(self):
    """Leaves the trajectory out of what is collected: others go on in its place. Its program should return."""
    self.discarded = True
    self.finish(Status.CUT, boundary=Boundary.AGENT, detail='discarded')

  def _check_open(self):
    if self.finished:
      raise RuntimeError(f'the trajectory has ended ({self.trajectory.status.value})')
    self._check_idle()

  def _check_idle(self):
    if self.request is not None:
      raise RuntimeError('a turn is being sampled; await it first')

  def _check_known(self, tokens: Sequence[int]):
    ids, known = np.asarray(tokens), self.engine.sampler.config.vocab_size
    if ids.size and not (ids.ndim == 1 and ids.dtype.kind in 'iu' and 0 <= ids.min() and ids.max() < known):
      raise ValueError(f'tokens must be whole numbers from 0 to {known - 1} in a row, got {ids.dtype} of shape {ids.shape}'
                       + (f' from {ids.min()} to {ids.max()}' if ids.dtype.kind in 'iuf' else ''))

  def _check_policy(self, policy: str):
    known = self.engine.sampler.policies
    if policy not in known:
      raise ValueError(f'policy {policy!r} is unknown; known: {", ".join(map(repr, known))}; see rollout.policies, or '
                       'engine.sampler.set_params')

  def _check_room(self, tokens: Sequence[int], boundary: Boundary):
    room = self.limits.context_tokens - len(self.context)
    if len(tokens) > room:
      raise TrajectoryEnded(Status.LENGTH, boundary,
                            f'{len(tokens)} tokens were appended where {room} of the '
                            f'{self.limits.context_tokens} tokens of the context were left')

  def _note_changed(self, before: Segment):
    """The context is no longer `before`, which the seat holds: keeps what they have in common."""
    t = self.trajectory
    if before is self.context:
      common = len(before)
    else:
      n = min(len(before), len(self.context), self.cached)
      differ = np.flatnonzero(before.tail(0)[:n] != self.context.tail(0)[:n])
      common = int(differ[0]) if len(differ) else n
    self.cached = min(self.cached, common, max(0, len(self.context) - 1))
    here = len(t.segments), len(self.context)
    t.fork_points = tuple(min(point, here) for point in t.fork_points)
    if t.fork_points:
      t.fork_point = t.fork_points[-1][1]

  def _forget_turn(self):
    """Takes what was drawn of the turn under way out of the context; it has been drawn all the same."""
    start = self.request.start
    self._drawn += len(self.context) - start
    self.context.truncate(start)
    self._note_changed(self.context)

  def give_up(self):
    """Cancels the turn that is being sampled, if one is, in whatever task awaits it: its program has ended."""
    if self.request is not None:
      self._forget_turn()
      self.request.future.cancel()

  def fork(self, n: int) -> list[Session]:
    """Returns n sessions that go on from here, each with draws of its own; the prefix is copied, not recomputed.

    Each is a trajectory of the same group; run programs on them with `engine.adopt`. The environment's side is the
    program's to copy, see `agentrl.agents.player`. One that has ended may be forked too: its forks go on.

    Raises:
      ValueError: if n is negative.
      RuntimeError: if a turn is being sampled. The trajectory may have ended.
      TrajectoryEnded: if the job has as many descendants as the limits allow.
    """
    self._check_idle()
    if n < 0:
      raise ValueError(f'cannot fork {n} sessions')
    self._count_descendants(n)
    forks = []
    for _ in range(n):
      t = self.trajectory
      path = (*t.path, self._forks)
      self._forks += 1
      fork = Session(self.engine, Trajectory(
          task=t.task, sample=t.sample, group_id=t.group_id, seed=t.seed, policy_version=t.policy_version, path=path,
          parent_path=t.path, fork_point=len(self.context),
          fork_points=(*t.fork_points, (len(t.segments), len(self.context))), segments=[s.copy() for s in t.segments],
          turns=[dataclasses.replace(turn) for turn in t.turns]), self.limits, self.root, self.journals)
      fork.grammar, fork.policy = self.grammar, self.policy
      forks.append(fork)
    self.engine.forked(self, forks)
    return forks

  def open(self, policy: str | None = None) -> Session:
    """Returns a session with a context of its own that is empty yet: a judge, a simulated user, a part of a team.

    Whose program opened it drives it: it appends to it, has it generate, and reads what was said. It ends when that
    program does, and is then forgotten. To have it trained on, start a program on it with `engine.adopt`: it is a
    trajectory of the same group then, collected as forks are.

    Args:
      policy: Who draws its words, one of `engine.sampler.policies`; None for who draws this one's. Tokens of another
        policy than the learner's, '', have version -1.
    Raises:
      ValueError: if there is no such policy.
      TrajectoryEnded: if the job has as many descendants as the limits allow.
    """
    policy = self.policy if policy is None else policy
    self._check_policy(policy)
    self._count_descendants(1)
    t = self.trajectory
    path = (*t.path, self._forks)
    self._forks += 1
    other = Session(self.engine, Trajectory(
        task=t.task, sample=t.sample, group_id=t.group_id, seed=t.seed, policy_version=t.policy_version, path=path,
        parent_path=t.path, fork_point=0, fork_points=((1, 0),) * len(path)), self.limits, self.root, self.journals)
    other.policy, other.waiting_since = policy, time.perf_counter()
    self.opened.append(other)
    return other

  def _count_descendants(self, n: int):
    count = self.root._descendants + n
    if count > self.limits.forks:
      raise TrajectoryEnded(Status.AGENT_FAILURE, Boundary.AGENT,
                            f'{count} forks of one sample, where {self.limits.forks} are allowed')
    self.root._descendants = count
