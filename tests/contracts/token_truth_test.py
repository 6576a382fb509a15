"""Token truth: what was sampled is what is recorded is what the learner sees, whatever programs do.

Random programs append, generate with stops, wait for tools, roll back and fork; each keeps books of
its own, from what it passed in and got back, that the recorded trajectory must match.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from agentrl.core.types import Status, Trajectory
from agentrl.rollout.engine import LINGER_SECONDS, Job

# Each is one letter that bytes and longer pieces hold as well, so turns often stop in mid-chunk.
STOPS = ('e', 't', '1', ' ', 'i', '<|end|>')


class Books:
  """What a program says its trajectory must be."""

  def __init__(self):
    self.tokens, self.sampled = [], []
    self.forced_cost = 0  # tokens that had to be written into the cache
    self.shortest = 0  # the shortest the context has been since the last turn
    self.session = None

  def copy(self):
    other = Books()
    other.tokens, other.sampled = list(self.tokens), list(self.sampled)
    return other


def random_program(seed, books, forks, width=24, depth=1):
  """A program that draws its operations from `seed` until its context is nearly full."""
  rng = np.random.default_rng(seed)

  async def program(session):
    books.session = session
    if not books.tokens:
      # A first token of its own, so that no cache is shared.
      append(session, [10 + seed % 300, *rng.integers(2, 300, 4)])
    marks = []
    while session.tokens_left > width:
      operation = rng.choice(['append', 'generate', 'generate', 'wait', 'mark', 'rollback', 'fork'])
      if operation == 'append':
        append(session, rng.integers(2, 300, rng.integers(1, 20)))
      elif operation == 'generate':
        await generate(session)
      elif operation == 'wait':
        # Sometimes longer than the engine lingers for, so that slots are taken away.
        await asyncio.sleep(rng.choice([0.0, 0.003, 1.4 * LINGER_SECONDS[1]]))
      elif operation == 'mark':
        marks.append((session.mark(), len(books.tokens)))
      elif operation == 'rollback' and marks:
        mark, length = marks[rng.integers(len(marks))]
        marks = [m for m in marks if m[1] <= length]
        session.rollback(mark)
        del books.tokens[length:], books.sampled[length:]
        books.shortest = min(books.shortest, length)
        # Else the same tokens would be drawn again, for ever.
        append(session, rng.integers(2, 300, 2))
      elif operation == 'fork' and depth and forks is not None:
        for i, other in enumerate(session.fork(2)):
          child = books.copy()
          forks.append((other.trajectory, child))
          twin = random_program(seed * 7 + i + 1, child, forks, width, depth - 1)
          session.engine.adopt(other, twin)
    session.finish(Status.FINISHED)

  def append(session, ids):
    ids = [int(i) for i in ids]
    session.append(ids)
    books.tokens += ids
    books.sampled += [False] * len(ids)

  async def generate(session):
    seen = session.context.tokens.tolist()
    # Cached is all but the pending token.
    books.forced_cost += len(seen) - max(1, books.shortest)
    stops = [STOPS[i] for i in rng.permutation(len(STOPS))[:rng.integers(0, len(STOPS))]]
    turn = await session.generate(stops=stops, max_tokens=int(rng.integers(1, 13)))
    now = session.context.tokens.tolist()
    # The prefix property: the model saw `seen`, and its turn stands right behind it.
    assert now[:len(seen)] == seen and turn.start == len(seen) and turn.end == len(now)
    books.tokens += now[turn.start:]
    books.sampled += [True] * (turn.end - turn.start)
    books.shortest = len(now)
    text = session.engine.tokenizer.decode(now[turn.start:])
    before = session.engine.tokenizer.decode(now[turn.start:-1])
    assert text == turn.text
    assert (turn.stop_reason == 'stop') == any(s in text for s in stops)
    assert not any(s in before for s in stops)  # Nothing past the stop is left.

  return program


def play(tiny, seeds, sampler, forks=None):
  """Runs random programs; returns their trajectories and books, forks included, and the stats."""
  books = [Books() for _ in seeds]
  jobs = [Job(tiny.task(s), 0, f'g{s}', random_program(s, b, forks)) for s, b in zip(seeds, books)]
  with tiny.engine(sampler=sampler) as engine:
    trajectories = [t for t in engine.collect(jobs) if not t.path]
    return list(zip(trajectories, books)) + (forks or []), engine.stats


def check(tiny, played: list[tuple[Trajectory, Books]]):
  for trajectory, books in played:
    assert trajectory.status is Status.FINISHED, trajectory.detail
    [segment] = trajectory.segments
    assert segment.tokens.tolist() == books.tokens
    assert segment.sampled.tolist() == books.sampled
    # Log-probs exist exactly where the policy drew, and turns are stretches of such tokens.
    np.testing.assert_array_equal(np.isfinite(segment.log_probs), segment.sampled)
    np.testing.assert_array_equal(np.isfinite(segment.entropies), segment.sampled)
    drawn = np.zeros(len(segment), bool)
    for turn in trajectory.turns:
      drawn[turn.start:turn.end] = True
    np.testing.assert_array_equal(drawn, segment.sampled)
  trajectories = [t for t, _ in played]
  for trajectory, (log_probs, entropies) in zip(trajectories, tiny.learner_scores(trajectories)):
    [s] = trajectory.segments
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4, rtol=0)
    np.testing.assert_allclose(s.entropies[s.sampled], entropies[s.sampled], atol=1e-4, rtol=0)


@pytest.mark.parametrize('slots', [4, 2])
def test_random_programs_are_recorded_as_they_were_sampled(tiny, slots):
  # Two slots for ten programs: sessions queue, are evicted while they wait and come back.
  sampler = tiny.sampler(slots, capacities=(48, tiny.context) if slots == 4 else (tiny.context,))
  played, stats = play(tiny, range(10), sampler, forks=[])
  check(tiny, played)
  reasons = [turn.stop_reason for t, _ in played for turn in t.turns]
  assert len(played) > 12 and min(reasons.count('stop'), reasons.count('length')) > 10
  assert slots == 4 or stats.evictions > 0


def test_the_cache_is_written_once_for_each_forced_token_and_never_for_a_drawn_one(tiny):
  played, stats = play(tiny, range(20, 24), tiny.sampler())
  check(tiny, played)
  assert stats.evictions == stats.shared_tokens == 0
  assert stats.extended_tokens == sum(books.forced_cost for _, books in played)
  assert sum(t.num_sampled for t, _ in played) > 40


def test_without_rollbacks_the_cost_is_the_forced_tokens(tiny):
  """The plain case by hand: prompts and observations, each once; the last token is drawn on."""

  async def program(session):
    session.append(range(20, 37))  # 17: more than one extension writes.
    await session.generate()
    for n in (1, 18, 3):
      await asyncio.sleep(0.001)
      session.append(range(50, 50 + n))
      await session.generate(stops=('e',))
    session.finish(Status.FINISHED)

  with tiny.engine() as engine:
    [t] = engine.collect([Job(tiny.task(), 0, 'g', program)])
    assert engine.stats.extended_tokens == 17 + 1 + 18 + 3 - 1
    assert t.num_sampled == len(t.segments[0]) - 39
  check_one = tiny.learner_scores([t])[0][0]
  s = t.segments[0]
  np.testing.assert_allclose(s.log_probs[s.sampled], check_one[s.sampled], atol=1e-4, rtol=0)


def test_a_stop_that_spans_tokens_is_cut_there_and_the_rest_rolled_back(tiny):
  """Stops change nothing but the end: the drawn tokens are those of the run without them."""
  tokenizer = tiny.tokenizer

  def program(stops, out):
    async def run(session):
      session.append(range(30, 40))
      out.append(await session.generate(stops=stops, max_tokens=12))
      session.append([40, 41, 42])
      out.append(await session.generate(max_tokens=8))
      session.finish(Status.FINISHED)
    return run

  checked = 0
  for seed in range(12):
    with tiny.engine(seed=seed) as engine:
      [free] = engine.collect([Job(tiny.task(), 0, 'g', program((), []))])
      drawn = free.segments[0].tokens[10:22].tolist()
      # The text of two neighbouring tokens, both of plain letters, that comes there first.
      for at in range(1, 11):
        stop = tokenizer.decode(drawn[at - 1:at + 1])
        alone = [tokenizer.decode([t]) for t in drawn[at - 1:at + 1]]
        if stop.isascii() and all(alone) and stop not in tokenizer.decode(drawn[:at]) and (
            not any(m in stop for m in tokenizer.markers)) and len(tokenizer.encode(stop)) > 1:
          break
      else:
        continue
      checked += 1
      turns = []
      [cut] = engine.collect([Job(tiny.task(), 0, 'g', program((stop,), turns))])
    assert turns[0].stop_reason == 'stop' and turns[0].text.endswith(stop)
    assert cut.segments[0].tokens[10:turns[0].end].tolist() == drawn[:at + 1]
    s, (log_probs, _) = cut.segments[0], tiny.learner_scores([cut])[0]
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4, rtol=0)
  assert checked >= 3
