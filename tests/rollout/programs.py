"""Random agent programs, and a slow session without engine or cache that runs them too.

A program is a tuple of operations, each a name and its arguments. `play` runs one on a session of the engine or on a
`Plain` one, which puts the whole context through the learner's network for each token that it draws.

A draw at position p is a function of the context, the trajectory's key and p, see `agentrl.sampling.draw`. The engine
adds in another order, so that its logits differ by some 1e-6, and a draw whose runners are that close may go either
way. `Reference.follows` tells such draws: the reference then goes on from the token that the engine drew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import Any, NamedTuple

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from agentrl.core.types import Boundary, Part, Status, ToolCall, ToolResult, Turn
from agentrl.models import transformer
from agentrl.rollout.budget import Limits
from agentrl.rollout.session import trajectory_seed
from agentrl.sampling.draw import BLOCK, SamplingParams, draw

LIMITS = Limits(turn_tokens=10, trajectory_tokens=44, context_tokens=96, turns=8, redraws=1_000, seconds=120.0)
STOPS = ((), ('e', '1'), ('<|end|>', 'th'), ('</python>', 't', 'o', 's'))
CLOSE = 1e-4  # in a logit


# ---- programs --------------------------------------------------------------------------------------

_SYSTEM = list(range(20, 60))
_few = st.lists(st.integers(60, 70), min_size=1, max_size=4)
# Most contexts begin alike, and part within blocks and at their ends.
PROMPTS = st.builds(lambda n, rest: _SYSTEM[:n] + rest, st.sampled_from([3, 15, 16, 20, 31, 32, 33]), _few)
_index = st.integers(0, 3)
_generate = st.tuples(st.just('generate'), st.sampled_from(STOPS), st.sampled_from([None, 1, 3, 6, 30]))
_call = st.tuples(st.just('call'), st.integers(0, 20))
_edits = st.one_of(
    st.tuples(st.just('append'), _few), st.tuples(st.just('mark')),
    st.tuples(st.just('rollback'), _index, st.booleans()),
    st.tuples(st.just('replace'), st.integers(0, 40), _few), st.tuples(st.just('revise'), _index, _few),
    st.tuples(st.just('strip'), st.integers(0, 30), st.integers(1, 3)),
    st.tuples(st.just('cancel'), st.integers(0, 8), st.sampled_from(STOPS), st.sampled_from([None, 3])))
_ends = st.sampled_from([
    *[('finish',)] * 9, ('discard',), ('raise',), ('return',), ('hang',), ('append', list(range(100))),
    ('generate', (), -3), ('generate', ('',), 3)])


def _sequences(forks, least=2):
  # An edit, a fork or nothing after a turn and what its tool says.
  step = st.tuples(_generate, _call, st.one_of(st.none(), _edits, _edits, _generate, *(6 * forks)))
  steps = st.lists(step, min_size=least, max_size=4)
  return st.tuples(steps, _ends).map(lambda p: (*(x for s in p[0] for x in s if x is not None), p[1]))


_leaves = _sequences([], 1)
_branches = st.tuples(st.just('fork'), st.lists(st.one_of(_leaves, _leaves, st.none()), max_size=3), st.booleans())
_forks = st.tuples(st.just('fork'), st.lists(st.one_of(_sequences([_branches], 1), _leaves, st.none()), max_size=3),
                   st.booleans())
PROGRAMS = st.builds(lambda prompt, rest: (('append', prompt), ('mark',), *rest), PROMPTS, _sequences([_forks]))
# Two samples of each task.
BATCHES = st.lists(PROGRAMS, min_size=2, max_size=6).map(lambda some: [p for p in some for _ in range(2)])


def with_others(program, place, asked, run):
  """Returns a program that at its `place`-th operation asks another policy and has it run a program; forks do too."""
  changed = tuple((name, [p and with_others(p, place, asked, run) for p in rest[0]], *rest[1:]) if name == 'fork'
                  else (name, *rest) for name, *rest in program)
  return (*changed[:place], ('ask', 'other', asked), ('open', 'other', run), *changed[place:])


def without(program, left_out):
  """Returns a program without the operations of a name, in its forks too."""
  return tuple((name, [p and without(p, left_out) for p in rest[0]], *rest[1:]) if name == 'fork' else (name, *rest)
               for name, *rest in program if name != left_out)


class Hang(asyncio.Event):
  """Set once a program has come to where it waits for ever."""


async def play(session, program, sleep, hang=None):
  """Runs a program on a session; `sleep` takes milliseconds."""
  marks, turn = [], None
  for name, *rest in program:
    if name == 'append':
      session.append(rest[0])
    elif name == 'generate':
      turn = await session.generate(stops=rest[0], max_tokens=rest[1])
    elif name == 'cancel':
      await _give_up(session, *rest, sleep)
    elif name == 'call':
      await sleep(rest[0])
      if turn is not None:
        # What a tool says follows from what it was asked.
        call, text = ToolCall('tool', {'ms': rest[0]}), str(turn.end - turn.start)
        session.observe(turn, [call], [ToolResult((Part('text', text),))])
        session.append([60 + int(text) % 7, int(session.context.tokens[-1])])
    elif name == 'mark':
      marks.append(session.mark())
    elif name == 'rollback' and marks:
      del marks[rest[0] % len(marks) + 1:]
      session.rollback(marks[-1])
      turn = None
      if rest[1]:
        session.append([77])
    elif name == 'replace':
      session.replace([*session.context.tokens[:rest[0]].tolist(), *rest[1]])
      turn = None
    elif name == 'revise' and marks:
      del marks[rest[0] % len(marks) + 1:]
      turn = session.revise(marks.pop(), rest[1])
    elif name == 'strip':
      start, end = rest[0], rest[0] + rest[1]
      if end < len(session.context) and not session.context.sampled[start:end].any():
        session.strip(start, end)
        marks, turn = [], None
    elif name == 'ask':
      # Another's words in this one's context: a judge's, or a user's.
      other = session.open(rest[0])
      other.append(rest[1])
      said = await other.generate(max_tokens=4)
      session.append(other.context.tokens[said.start:said.end].tolist())
    elif name == 'open':
      session.engine.adopt(session.open(rest[0]), functools.partial(play, program=rest[1], sleep=sleep))
    elif name == 'fork':
      await _fork(session, *rest, sleep)
    elif name == 'finish':
      session.finish(Status.FINISHED, answer=turn.text if turn else None)
    elif name == 'discard':
      session.discard()
    elif name == 'raise':
      raise KeyError('lost')
    elif name == 'hang' and hang is not None:
      hang.set()
      await asyncio.get_running_loop().create_future()


async def _give_up(session, milliseconds, stops, max_tokens, sleep):
  """Asks for a turn and takes the question back, or what came of it, if that was quicker."""
  mark = session.mark()
  turn = asyncio.ensure_future(session.generate(stops=stops, max_tokens=max_tokens))
  await sleep(milliseconds)
  turn.cancel()
  [outcome] = await asyncio.gather(turn, return_exceptions=True)
  if not isinstance(outcome, (asyncio.CancelledError, Exception)):
    session.rollback(mark)


async def _fork(session, programs, together, sleep):
  """Starts programs on forks; those that wait for ever are cancelled once the others have ended."""
  runs = []
  for fork, program in zip(session.fork(len(programs)), programs):
    if program is not None:
      hang = Hang()
      run = session.engine.adopt(fork, functools.partial(play, program=program, sleep=sleep, hang=hang))
      runs.append(asyncio.ensure_future(_ended(run, hang)))
  if together:
    await asyncio.gather(*runs)


async def _ended(run, hang):
  hanging = asyncio.ensure_future(hang.wait())
  await asyncio.wait({run, hanging}, return_when=asyncio.FIRST_COMPLETED)
  hanging.cancel()
  if not run.done():
    run.cancel()
    await asyncio.wait({run})


# ---- the reference ---------------------------------------------------------------------------------


class Drawn(NamedTuple):
  """A token with what is to be recorded of it."""

  token: int
  log_prob: float
  entropy: float


class Reference:
  """Draws tokens by the learner's network, the whole context for each."""

  def __init__(self, tiny, sampling=SamplingParams(), grammar=None):
    self.tiny, self.grammar, self.tokenizer = tiny, grammar, tiny.tokenizer
    self.length = tiny.context
    self._drawn: dict[Any, Drawn] = {}
    self._params = {'': tiny.params}

    def scores(params, tokens, count):
      ids = jnp.ones((1, self.length), jnp.int32)
      hidden = transformer.hidden_states(params, tiny.config, tokens[None], jnp.arange(self.length)[None], ids)
      return transformer.logits(params, hidden[:, count - 1], known=tiny.config.known_tokens)

    self._scores = jax.jit(scores)
    self._draw = jax.jit(lambda scores, seed, place, allowed: draw(
        scores, jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seed[None], impl='threefry2x32'), place[None]),
        sampling, allowed))

  @property
  def policies(self):
    return tuple(self._params)

  def set_params(self, params, policy):
    self._params[policy] = params

  def _asked(self, policy, context):
    row = np.zeros(self.length, np.int32)
    row[:len(context)] = context
    return self._scores(self._params[policy], row, np.int32(len(context)))

  def _take(self, scores, seed, context, allowed):
    # The pending token's position: it is what goes through the network at this draw.
    out = self._draw(scores, np.asarray(seed, np.uint32), np.int32(len(context) - 1), allowed)
    return Drawn(*(x[0].item() for x in out))

  def draw(self, seed, context, allowed=None, policy=''):
    key = seed, policy, tuple(context), allowed
    if key not in self._drawn:
      self._drawn[key] = self._take(self._asked(policy, context), seed, context, self._set(allowed))
    return self._drawn[key]

  def _set(self, mask):
    size = self.tiny.config.vocab_size
    if mask is None:
      return np.ones((1, size), bool)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder='little')
    return np.pad(bits, (0, max(0, size - len(bits))))[None, :size].astype(bool)

  def follows(self, seed, context, token, allowed=None, policy=''):
    """Returns whether `token` would be drawn were its logits a hair higher; if so, it is from now on."""
    scores = np.array(self._asked(policy, context))
    block = token // BLOCK * BLOCK
    scores[:, block:block + BLOCK] += CLOSE
    scores[:, token] += CLOSE
    found = self._take(scores, seed, context, self._set(allowed))
    if found.token == token:
      self._drawn[seed, policy, tuple(context), allowed] = found
    return found.token == token


class PlainContext:
  """A segment, column by column."""

  def __init__(self, rows=()):
    self.rows = list(rows)  # (token, sampled, log-prob, entropy, turn)

  def __len__(self):
    return len(self.rows)

  tokens = property(lambda self: np.asarray([r[0] for r in self.rows], np.int32))
  sampled = property(lambda self: np.asarray([r[1] for r in self.rows], bool))
  log_probs = property(lambda self: np.asarray([r[2] for r in self.rows], np.float32))
  entropies = property(lambda self: np.asarray([r[3] for r in self.rows], np.float32))
  turns = property(lambda self: np.asarray([r[4] for r in self.rows], np.int32))


class PlainEnd(Exception):
  """A trajectory has no room for what was asked."""


class Plain:
  """A session as its documentation has it, on plain lists."""

  def __init__(self, reference, runs, task, sample, seed=0, path=()):
    self.reference, self.runs, self.engine = reference, runs, self
    self.task, self.sample, self.seed, self.path = task, sample, seed, path
    self.segments, self.turns, self.fork_points = [PlainContext()], [], ()
    self.status, self.boundary, self.answer, self.discarded = Status.RUNNING, None, None, False
    self.key = trajectory_seed(seed, task.id, sample, path)
    self.forks, self.grammar, self.policy = 0, reference.grammar, ''

  context = property(lambda self: self.segments[-1])

  def finish(self, status, answer=None, boundary=None):
    self.status, self.answer, self.boundary = status, answer, boundary

  def discard(self):
    self.discarded = True
    self.finish(Status.CUT, boundary=Boundary.AGENT)

  def append(self, tokens, sampled=False):
    self._open()
    if len(tokens) > LIMITS.context_tokens - len(self.context):
      raise PlainEnd(Status.LENGTH, Boundary.AGENT if sampled else Boundary.ENVIRONMENT)
    self.context.rows += [(t, sampled, np.nan, np.nan, len(self.turns)) for t in tokens]

  def _open(self):
    if self.status is not Status.RUNNING:
      raise RuntimeError('ended')

  async def generate(self, *, stops=(), max_tokens=None):
    self._open()
    if max_tokens is not None and max_tokens < 1:
      raise ValueError('too few')
    if len(self.turns) == LIMITS.turns:
      raise PlainEnd(Status.TURN_LIMIT, Boundary.POLICY)
    drawn = sum(int(s.sampled.sum()) for s in self.segments)
    left = min(LIMITS.trajectory_tokens - drawn, LIMITS.context_tokens - len(self.context))
    wanted = min(LIMITS.turn_tokens, max_tokens or LIMITS.turn_tokens)
    if left < 1:
      raise PlainEnd(Status.LENGTH, Boundary.POLICY)
    if '' in stops:
      raise ValueError('no stop')
    start, reason, tokens = len(self.context), None, []
    cursor = self.grammar.start() if self.grammar else None
    while reason is None:
      one = self.reference.draw(self.key, self.context.tokens.tolist(), cursor.mask() if cursor else None, self.policy)
      if cursor:
        cursor.take(one.token)
      tokens.append(one.token)
      self.context.rows.append((one.token, True, one.log_prob, one.entropy, len(self.turns)))
      if any(s in self.reference.tokenizer.decode(tokens) for s in stops):
        reason = 'stop'
      elif len(tokens) == min(wanted, left):
        reason = 'length' if wanted <= left else 'context'
    turn = Turn(len(self.turns), len(self.segments) - 1, start, len(self.context),
                     self.reference.tokenizer.decode(tokens), reason)
    self.turns.append(turn)
    return turn

  def observe(self, turn, calls, results):
    turn.calls, turn.results = tuple(calls), tuple(results)

  def mark(self):
    return len(self.segments), len(self.context), len(self.turns)

  def rollback(self, mark):
    segments, length, turns = mark
    del self.segments[segments:], self.turns[turns:]
    del self.context.rows[length:]
    self._shared_no_more()

  def _shared_no_more(self):
    self.fork_points = tuple(min(p, (len(self.segments), len(self.context))) for p in self.fork_points)

  def replace(self, tokens):
    self.segments.append(PlainContext())
    try:
      self.append(tokens)
    except PlainEnd:
      self.segments.pop()
      raise
    self._shared_no_more()

  def revise(self, mark, tokens):
    self.rollback(mark)
    start = len(self.context)
    self.append(tokens, sampled=True)
    turn = Turn(len(self.turns), len(self.segments) - 1, start, len(self.context),
                     self.reference.tokenizer.decode(tokens), 'stop')
    self.turns.append(turn)
    return turn

  def strip(self, start, end):
    rows, last = self.context.rows, len(self.segments)
    # Index i of the longer context is index new[i] of the shorter one.
    new = [i - max(0, min(i, end) - start) for i in range(len(rows) + 1)]
    self.context.rows = rows[:start] + [(t, s, np.nan, np.nan, k) for t, s, _, _, k in rows[end:]]
    for turn in self.turns:
      if turn.segment == last - 1:
        turn.start, turn.end = new[turn.start], new[turn.end]
    self.fork_points = tuple((n, new[at] if n == last else at) for n, at in self.fork_points)

  def fork(self, n):
    forks = []
    for _ in range(n):
      fork = Plain(self.reference, self.runs, self.task, self.sample, self.seed, (*self.path, self.forks))
      self.forks += 1
      fork.segments = [PlainContext(s.rows) for s in self.segments]
      fork.turns = [dataclasses.replace(t) for t in self.turns]
      fork.fork_points = (*self.fork_points, self.mark()[:2])
      fork.grammar, fork.policy = self.grammar, self.policy
      forks.append(fork)
    return forks

  def open(self, policy):
    other = Plain(self.reference, self.runs, self.task, self.sample, self.seed, (*self.path, self.forks))
    self.forks += 1
    other.fork_points, other.policy = ((1, 0),) * len(other.path), policy
    return other

  def adopt(self, fork, program):
    self.runs.append(fork)
    return asyncio.ensure_future(fork.run(program))

  async def run(self, program):
    try:
      await program(self)
      if self.status is Status.RUNNING:
        self.finish(Status.AGENT_FAILURE, boundary=Boundary.AGENT)
    except PlainEnd as end:
      status, boundary = end.args
      self.finish(status, boundary=boundary)
    except asyncio.CancelledError:
      self.finish(Status.CUT, boundary=Boundary.ENGINE)
    except Exception:  # pylint: disable=broad-except  # a mistake of the program
      self.finish(Status.AGENT_FAILURE, boundary=Boundary.AGENT)


def run_plainly(reference, jobs, seed=0):
  """Returns what (task, sample, program) come to: of each, its session and then its forks."""
  async def one(task, sample, program):
    root = Plain(reference, [], task, sample, seed)
    root.runs.append(root)

    async def sleep(_):
      await asyncio.sleep(0)

    await root.run(functools.partial(play, program=program, sleep=sleep))
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
      await asyncio.wait(others)
    return sorted((r for r in root.runs if not r.discarded), key=lambda r: r.path)

  return [session for job in jobs for session in asyncio.run(one(*job))]


# ---- comparison ------------------------------------------------------------------------------------


def first_difference(reference, expected, got):
  """Returns (plain session, segment, index) of the first token drawn otherwise; None if there is none."""
  by_path = {(s.task.id, s.sample, s.path): s for s in expected}
  for t in got:
    plain = by_path.get((t.task.id, t.sample, t.path))
    for i, (a, b) in enumerate(zip(plain.segments, t.segments) if plain else ()):
      n = min(len(a), len(b))
      [*differ] = np.flatnonzero(a.tokens[:n] != b.tokens[:n])
      if differ:
        return (plain, b, int(differ[0])) if a.sampled[differ[0]] and b.sampled[differ[0]] else None
  return None


def check(reference, jobs, got, seed=0):
  """Fails unless trajectories are what the reference comes to, taking their side where a draw might go either way."""
  for _ in range(8):
    expected = run_plainly(reference, jobs, seed)
    differ = first_difference(reference, expected, got)
    if differ is None:
      break
    plain, segment, at = differ
    context, mask = segment.tokens[:at].tolist(), segment.masks[at]
    assert any(reference.follows(plain.key, context, int(segment.tokens[at]), mask, policy)
               for policy in reference.policies), (plain.path, at, plain.context.tokens, segment.tokens)
  name = lambda s: (s.task.id, s.sample, s.path)
  assert [name(t) for t in got] == [name(s) for s in expected]
  for t, s in zip(got, expected):
    check_one(t, s)


def check_one(t, s):
  """Compares a trajectory with a plain session."""
  words = t.task.id, t.path, t.detail
  assert (t.status, t.boundary, t.answer) == (s.status, s.boundary, s.answer), words
  assert t.fork_points == s.fork_points, words
  assert t.fork_point == (s.fork_points[-1][1] if s.path else None), words
  assert len(t.segments) == len(s.segments), words
  for a, b in zip(t.segments, s.segments):
    for name in ('tokens', 'sampled', 'turns'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name), str(words))
    for name in ('log_probs', 'entropies'):
      np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4, rtol=0, err_msg=str(words))
  assert [vars(x) for x in t.turns] == [vars(x) for x in s.turns], words
