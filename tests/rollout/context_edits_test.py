"""Tests of what edits a context: replacement, revision, stripping, marks across segments, limits on programs.

The expected log-probs are the learner's: whatever was edited, a token that counts as sampled must be
as likely in the recorded context as the sampler said, or have no log-prob at all.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from agentrl.core.types import Boundary, Segment, Status, Trajectory
from agentrl.rollout import store
from agentrl.rollout.engine import LINGER_SECONDS, Job
from agentrl.rollout.session import Mark
from agentrl.rollout.summary import summarize

PROMPT = list(range(20, 40))


def collect(tiny, *programs, sampler=None, seed=0, enough=1.0, **limits):
  with tiny.engine(sampler=sampler, seed=seed, **limits) as engine:
    got = engine.collect([Job(tiny.task(i), 0, f'g{i}', p) for i, p in enumerate(programs)], enough=enough)
    return got, engine.stats


def segments_as_trajectories(trajectories):
  """Each segment as a trajectory of its own, for the learner to score."""
  return [Trajectory(t.task, t.sample, t.group_id, t.seed, segments=[s]) for t in trajectories for s in t.segments]


def check_truth(tiny, trajectories):
  """Every finite log-prob is the learner's, and entropies are finite where log-probs are."""
  alone = segments_as_trajectories(trajectories)
  for t, (log_probs, entropies) in zip(alone, tiny.learner_scores(alone)):
    [s] = t.segments
    known = np.isfinite(s.log_probs)
    assert not known[~s.sampled].any()
    np.testing.assert_array_equal(known, np.isfinite(s.entropies))
    np.testing.assert_allclose(s.log_probs[known], log_probs[known], atol=1e-4, rtol=0)
    np.testing.assert_allclose(s.entropies[known], entropies[known], atol=1e-4, rtol=0)


def test_replace_starts_a_segment_and_recomputes_only_past_the_common_prefix(tiny):
  drawn = []

  async def program(session):
    session.append(PROMPT)
    for k in range(3):
      turn = await session.generate(max_tokens=5)
      drawn.append(session.context.tail(turn.start).tolist())
      assert (turn.index, turn.segment) == (k, k)
      session.replace([*PROMPT[:15], 60 + k, *drawn[-1][:2]])
    session.finish(Status.FINISHED)

  [t], stats = collect(tiny, program)
  assert [len(s) for s in t.segments] == [25, 23, 23, 18]
  # All but the last of the prompt; then what differs, from place 15 on, less the pending token; no
  # more was asked for after the last replacement.
  assert stats.extended_tokens == 19 + 2 * 2
  # The tokens kept are no longer the policy's there: each was drawn once and is trained on once.
  new = [s.tokens[s.sampled].tolist() for s in t.segments]
  assert new == [*drawn, []] and t.num_sampled == 15
  assert [turn.segment for turn in t.turns] == [0, 1, 2]
  assert t.segments[1].turns.tolist() == [1] * 23
  check_truth(tiny, [t])


def test_replacing_a_context_by_itself_costs_nothing_and_draws_on(tiny):
  """Rows cut at turns are the same draws as one row: the key is the position's."""
  async def plain(session):
    session.append(PROMPT)
    for _ in range(3):
      await session.generate(max_tokens=4)
      session.append([50])
    session.finish(Status.FINISHED)

  async def cut(session):
    session.append(PROMPT)
    for _ in range(3):
      await session.generate(max_tokens=4)
      session.append([50])
      session.replace(session.context.tokens)
    session.finish(Status.FINISHED)

  [one], stats = collect(tiny, plain)
  [many], stats_cut = collect(tiny, cut)
  assert stats_cut.extended_tokens == stats.extended_tokens
  np.testing.assert_array_equal(many.segments[-1].tokens, one.segments[0].tokens)
  assert len(many.segments) == 4 and not many.segments[-1].sampled.any()
  check_truth(tiny, [one, many])


def test_a_replacement_that_does_not_fit_leaves_the_context_as_it_was(tiny):
  async def program(session):
    session.append(PROMPT)
    await session.generate(max_tokens=3)
    with pytest.raises(ValueError, match='not be empty'):
      session.replace([])
    session.replace(range(41))

  [t], _ = collect(tiny, program, context_tokens=40)
  assert (t.status, t.boundary) == (Status.LENGTH, Boundary.ENVIRONMENT)
  assert len(t.segments) == 1 and len(t.segments[0]) == 23


def test_rollback_crosses_segments(tiny):
  async def program(session):
    session.append(PROMPT)
    first = await session.generate(max_tokens=5)
    mark = session.mark()
    session.append([50])
    again = await session.generate(max_tokens=5)
    session.rollback(mark)
    session.replace(PROMPT[:10])
    await session.generate(max_tokens=5)
    ahead = session.mark()
    session.rollback(mark)
    assert session.mark() == mark and session.trajectory.turns == [first]
    with pytest.raises(ValueError, match='ahead'):
      session.rollback(ahead)
    session.append([50])
    assert await session.generate(max_tokens=5) == again
    session.finish(Status.FINISHED)

  [t], _ = collect(tiny, program)
  assert t.status is Status.FINISHED, t.detail
  assert len(t.segments) == 1 and len(t.turns) == 2
  check_truth(tiny, [t])


def test_revised_turns_are_trained_on_with_log_probs_that_nobody_can_reach(tiny):
  """Identity 19: what was drawn elsewhere has no stored log-prob, and what follows it has its own."""
  async def program(session):
    session.append(PROMPT)
    mark = session.mark()
    await session.generate(max_tokens=6)
    session.append([50, 51])
    later = await session.generate(max_tokens=6)
    words = session.context.tail(later.start).tolist()
    turn = session.revise(mark, words)
    assert (turn.index, turn.start, turn.end) == (0, 20, 26)
    assert turn.text == later.text and session.trajectory.turns == [turn]
    with pytest.raises(ValueError, match='not be empty'):
      session.revise(mark, [])
    session.append([52])
    await session.generate(max_tokens=6)
    session.finish(Status.FINISHED)

  [t], _ = collect(tiny, program)
  assert t.status is Status.FINISHED, t.detail
  [s] = t.segments
  assert s.sampled.tolist() == [False] * 20 + [True] * 6 + [False] + [True] * 6
  assert np.isnan(s.log_probs[20:26]).all() and np.isnan(s.entropies[20:26]).all()
  assert np.isfinite(s.log_probs[27:]).all()
  check_truth(tiny, [t])
  # Neither a mean nor a file is spoilt by what is unknown.
  assert summarize([t])['entropy'] == pytest.approx(s.entropies[27:].mean())


def test_revised_tokens_survive_being_stored(tiny, tmp_path):
  s = Segment()
  s.append_forced([1, 2], 0)
  s.append_revised([3], 0)
  s.append_sampled([4], [-0.5], [0.25], 0)
  t = Trajectory(tiny.task(), 0, 'g', 0, segments=[s], fork_points=((1, 2),))
  [got] = store.read(store.TrajectoryStore(tmp_path).write(0, [t])).trajectories
  for name in ('tokens', 'sampled', 'log_probs', 'entropies', 'turns'):
    np.testing.assert_array_equal(getattr(got.segments[0], name), getattr(s, name))
  assert got.fork_points == ((1, 2),)


def test_a_stripped_hint_is_in_no_context_that_is_trained_on(tiny):
  hint = [60, 61, 62]

  async def program(session):
    session.append([*PROMPT[:5], *hint, *PROMPT[5:]])
    first = await session.generate(max_tokens=4)
    session.append([50])
    second = await session.generate(max_tokens=4)
    words = [session.context.tokens[turn.start:turn.end].tolist() for turn in (first, second)]
    with pytest.raises(ValueError, match='not all forced'):
      session.strip(first.start - 1, first.end)
    session.strip(5, 8)
    assert [session.context.tokens[turn.start:turn.end].tolist() for turn in (first, second)] == words
    session.append([51])
    await session.generate(max_tokens=4)
    session.finish(Status.FINISHED)

  [t], _ = collect(tiny, program)
  assert t.status is Status.FINISHED, t.detail
  [s] = t.segments
  assert s.tokens[:20].tolist() == PROMPT
  # Drawn with the hint in sight: unknown. Drawn after it was gone: the learner's.
  drawn = np.isfinite(s.log_probs)
  assert drawn.nonzero()[0].tolist() == list(range(30, 34)) and s.sampled.sum() == 12
  check_truth(tiny, [t])


def test_forks_after_edits_know_who_drew_their_turns(tiny):
  others = []

  async def branch(session):
    session.append([50 + len(session.trajectory.path)])
    await session.generate(max_tokens=3)
    if len(session.trajectory.path) == 1:
      [fork] = session.fork(1)
      others.append(fork)
      session.engine.adopt(fork, branch)
    session.finish(Status.FINISHED)

  async def program(session):
    session.append(PROMPT)
    await session.generate(max_tokens=3)
    session.replace(PROMPT[:12])
    await session.generate(max_tokens=3)
    [fork] = session.fork(1)
    others.append(fork)
    session.engine.adopt(fork, branch)
    session.replace(PROMPT)
    await session.generate(max_tokens=3)
    session.finish(Status.FINISHED)

  (root, child, grandchild), _ = collect(tiny, program)
  assert [t.path for t in (root, child, grandchild)] == [(), (0,), (0, 0)]
  drew = lambda t: [t.drawn_by(turn) for turn in t.turns]
  assert drew(root) == [()] * 3
  assert drew(child) == [(), (), (0,)]
  assert drew(grandchild) == [(), (), (0,), (0, 0)]
  assert child.fork_points == ((2, 15),) and grandchild.fork_points == ((2, 15), (2, 19))
  check_truth(tiny, [root, child, grandchild])


def test_a_fork_that_is_stripped_shares_less(tiny):
  async def program(session):
    session.append(PROMPT)
    [fork] = session.fork(1)
    session.finish(Status.FINISHED)

    async def rest(fork):
      await fork.generate(max_tokens=4)
      fork.strip(5, 8)
      fork.finish(Status.FINISHED)

    session.engine.adopt(fork, rest)

  (_, fork), _ = collect(tiny, program)
  assert (fork.fork_point, fork.fork_points) == (17, ((1, 17),))


def test_a_fork_that_is_rolled_back_shares_less(tiny):
  async def program(session):
    session.append(PROMPT)
    mark = session.mark()
    await session.generate(max_tokens=4)
    session.finish(Status.FINISHED)
    [fork] = session.fork(1)  # of one that has ended
    fork.rollback(Mark(mark.segments, mark.length + 2, mark.turns))

    async def rest(fork):
      turn = await fork.generate(max_tokens=4)
      assert fork.trajectory.drawn_by(turn) == (0,)
      fork.finish(Status.FINISHED)

    session.engine.adopt(fork, rest)

  (root, fork), _ = collect(tiny, program)
  assert fork.status is Status.FINISHED, fork.detail
  assert (fork.fork_point, fork.fork_points) == (22, ((1, 22),)) and len(fork.turns) == 1
  np.testing.assert_array_equal(fork.segments[0].tokens[:22], root.segments[0].tokens[:22])
  check_truth(tiny, [root, fork])


def test_random_edits_keep_the_truth(tiny):
  """Any order of edits, on two slots for six programs, so that contexts are lost and come back."""
  def program(seed):
    rng = np.random.default_rng(seed)

    async def run(session):
      session.append([10 + seed, *PROMPT[:9]])
      marks = []
      for _ in range(20):
        operation = rng.choice(['generate', 'generate', 'replace', 'mark', 'rollback', 'revise', 'wait', 'wait'])
        if operation == 'generate':
          await session.generate(max_tokens=int(rng.integers(1, 7)))
        elif operation == 'replace':
          kept = session.context.tokens[:int(rng.integers(1, len(session.context) + 1))]
          session.replace([*kept, *rng.integers(2, 300, 2)])
          marks.clear()
        elif operation == 'mark':
          marks.append(session.mark())
        elif operation == 'wait':
          await asyncio.sleep(1.4 * LINGER_SECONDS[1])
        elif marks and operation == 'rollback':
          session.rollback(marks.pop())
          session.append(rng.integers(2, 300, 1))
        elif marks:
          session.revise(marks.pop(), rng.integers(2, 300, 3))
          marks.clear()
        if session.tokens_left < 20:
          break
      session.finish(Status.FINISHED)
    return run

  got, stats = collect(tiny, *map(program, range(6)), sampler=tiny.sampler(2, capacities=(tiny.context,)),
                       redraws=20)
  assert [t.status for t in got] == [Status.FINISHED] * 6, [t.detail for t in got]
  assert sum(len(t.segments) for t in got) > 8 and stats.evictions > 0
  check_truth(tiny, got)


# ---- programs that misbehave ----------------------------------------------------------------------


async def good(session):
  session.append(PROMPT)
  await session.generate(max_tokens=6)
  session.finish(Status.FINISHED)


async def raises(session):
  session.append(PROMPT)
  raise RuntimeError('a mistake')


async def waits_for_ever(session):
  session.append(PROMPT)
  await asyncio.get_running_loop().create_future()


async def draws_for_ever(session):
  session.append(PROMPT)
  mark = session.mark()
  while True:
    await session.generate()
    session.rollback(mark)


async def forks_for_ever(session):
  session.append(PROMPT)
  while True:
    for fork in session.fork(1):
      session.engine.adopt(fork, good_fork)


async def good_fork(session):
  await session.generate(max_tokens=2)
  session.finish(Status.FINISHED)


async def appends_past_the_context(session):
  session.append([5] * 1_000)


async def asks_for_less_than_nothing(session):
  session.append(PROMPT)
  await session.generate(max_tokens=-1)


async def returns(session):
  session.append(PROMPT)


@pytest.mark.parametrize('bad, status, boundary, words', [
    (raises, Status.AGENT_FAILURE, Boundary.AGENT, 'RuntimeError: a mistake'),
    (returns, Status.AGENT_FAILURE, Boundary.AGENT, 'without finishing'),
    (waits_for_ever, Status.AGENT_FAILURE, Boundary.AGENT, 'did not end within 1 s'),
    (draws_for_ever, Status.AGENT_FAILURE, Boundary.AGENT, 'rolled back again'),
    (forks_for_ever, Status.AGENT_FAILURE, Boundary.AGENT, '6 forks of one sample, where 5 are allowed'),
    (appends_past_the_context, Status.LENGTH, Boundary.ENVIRONMENT, '1000 tokens were appended'),
    (asks_for_less_than_nothing, Status.AGENT_FAILURE, Boundary.AGENT, 'max_tokens=-1'),
])
def test_a_program_that_misbehaves_ends_alone(tiny, bad, status, boundary, words):
  limits = dict(trajectory_tokens=24, redraws=2, forks=5, seconds=1.0 if bad is waits_for_ever else 60.0)
  alone, _ = collect(tiny, good, **limits)
  got, _ = collect(tiny, good, bad, good, **limits)
  roots = [t for t in got if not t.path]
  assert [t.status for t in roots] == [Status.FINISHED, status, Status.FINISHED]
  assert roots[1].boundary is boundary and words in roots[1].detail
  # The same draws as without a bad neighbour.
  np.testing.assert_array_equal(roots[0].segments[0].tokens, alone[0].segments[0].tokens)
  forks = [t for t in got if t.path]
  assert len(forks) == (5 if bad is forks_for_ever else 0)
  assert all(t.status is Status.FINISHED for t in forks)


def test_stragglers_are_cut_once_enough_have_ended(tiny):
  cleaned = []

  async def slow(session):
    session.append(PROMPT)
    await session.generate(max_tokens=3)
    try:
      await asyncio.get_running_loop().create_future()
    finally:
      await asyncio.sleep(0)
      cleaned.append(session)

  got, _ = collect(tiny, slow, good, good, slow, enough=0.5)
  assert [t.status for t in got] == [Status.CUT, Status.FINISHED, Status.FINISHED, Status.CUT]
  assert {t.boundary for t in got if t.status is Status.CUT} == {Boundary.ENGINE} and len(cleaned) == 2
  for enough in (0.0, 1.5):
    with pytest.raises(ValueError, match='enough='):
      collect(tiny, good, enough=enough)


def test_the_discarded_are_not_collected(tiny):
  async def program(session):
    session.append(PROMPT)
    [fork] = session.fork(1)
    session.engine.adopt(fork, good_fork)
    session.discard()

  (fork,), _ = collect(tiny, program)
  assert fork.path == (0,)
