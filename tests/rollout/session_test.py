"""Tests of the session: turns, limits, rollback, forks and keys."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from agentrl.core.types import Boundary, Part, Status, ToolCall, ToolResult
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Job
from agentrl.rollout.session import trajectory_seed

PROMPT = list(range(20, 30))


def run(tiny, program, *, seed=0, sample=0, sampler=None, **limits):
  """Runs one program; an assertion that fails in it fails the test."""
  caught = []

  async def guarded(session):
    try:
      await program(session)
    except AssertionError as e:
      caught.append(e)
      raise

  with tiny.engine(seed=seed, sampler=sampler, **limits) as engine:
    [t] = engine.collect([Job(tiny.task(), sample, 'g', guarded)])
  if caught:
    raise caught[0]
  return t


def test_turns_are_recorded_with_their_place_and_text(tiny):
  seen = {}

  async def program(session):
    session.append(PROMPT)
    first = await session.generate(max_tokens=3)
    session.append([50, 51])
    second = await session.generate(max_tokens=5)
    call = ToolCall('python', {'code': '1'})
    session.observe(first, [call], [ToolResult((Part('text', '1'),))])
    session.finish(Status.FINISHED, answer='7')
    seen.update(first=first, second=second)

  t = run(tiny, program)
  first, second = t.turns
  assert (first, second) == (seen['first'], seen['second'])
  assert (first.index, first.segment, first.start, first.end) == (0, 0, 10, 13)
  assert (second.index, second.segment, second.start, second.end) == (1, 0, 15, 20)
  tokens = t.segments[0].tokens
  assert first.text == tiny.tokenizer.decode(tokens[10:13])
  assert first.results == tuple(t.results) and first.calls[0].name == 'python'
  # An observation belongs to the turn it leads to.
  assert t.segments[0].turns.tolist() == [0] * 13 + [1] * 7
  assert (t.status, t.answer, t.boundary, t.detail) == (Status.FINISHED, '7', None, '')
  assert t.seconds > 0 and t.num_sampled == 8


@pytest.mark.parametrize('limits, asked, reasons, drawn', [
    # The turn's own budget: the caller's or the limits', whichever is less.
    (dict(turn_tokens=6), None, ['length'] * 3, 18),
    (dict(turn_tokens=6), 4, ['length'] * 3, 12),
    (dict(turn_tokens=6), 40, ['length'] * 3, 18),
    # Less is left in the trajectory, or in the context, than the turn may have.
    (dict(turn_tokens=6, trajectory_tokens=15), None, ['length', 'length', 'context'], 15),
    (dict(turn_tokens=6, context_tokens=26), None, ['length', 'length', 'context'], 16),
    # Exactly as much is left: no more was asked for.
    (dict(turn_tokens=6, trajectory_tokens=12), None, ['length', 'length'], 12),
    (dict(turn_tokens=6, turns=2), None, ['length', 'length'], 12),
])
def test_budgets(tiny, limits, asked, reasons, drawn):
  async def program(session):
    session.append(PROMPT)
    for _ in range(3):
      await session.generate(max_tokens=asked)
    session.finish(Status.FINISHED)

  t = run(tiny, program, **limits)
  assert [turn.stop_reason for turn in t.turns] == reasons and t.num_sampled == drawn
  if len(reasons) == 2:
    turn_limit = 'turns' in limits
    assert t.status is (Status.TURN_LIMIT if turn_limit else Status.LENGTH)
    assert t.boundary is Boundary.POLICY


def test_a_context_may_be_filled_to_its_last_token(tiny):
  async def program(session):
    session.append(np.arange(20, 20 + tiny.context - 5))
    assert session.tokens_left == 5
    turn = await session.generate()
    assert turn.stop_reason == 'context' and session.tokens_left == 0
    session.finish(Status.FINISHED)

  t = run(tiny, program)
  assert t.status is Status.FINISHED and len(t.segments[0]) == tiny.context
  s, (log_probs, _) = t.segments[0], tiny.learner_scores([t])[0]
  np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4)


def test_append_beyond_the_context_says_how_much_room_was_left(tiny):
  async def program(session):
    session.append(PROMPT)
    session.append(range(11))

  t = run(tiny, program, context_tokens=20)
  assert (t.status, t.boundary) == (Status.LENGTH, Boundary.ENVIRONMENT)
  assert '11 tokens' in t.detail and '10 of the 20' in t.detail
  assert t.segments[0].tokens.tolist() == PROMPT


def test_rollback_forgets_tokens_and_turns_and_draws_the_same_again(tiny):
  async def program(session):
    session.append(PROMPT)
    mark = session.mark()
    first = await session.generate()
    session.append([50])
    await session.generate()
    session.rollback(mark)
    assert session.context.tokens.tolist() == PROMPT and session.num_turns == 0
    again = await session.generate()
    # Keys are a function of the position: the same context draws the same.
    assert again == first and again is not first
    session.rollback(mark)
    session.append([50])
    assert (await session.generate()).text != first.text
    session.finish(Status.FINISHED)

  t = run(tiny, program)
  assert t.status is Status.FINISHED and t.num_sampled == t.turns[0].end - t.turns[0].start
  s, (log_probs, _) = t.segments[0], tiny.learner_scores([t])[0]
  np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4)


def test_forks_share_the_prefix_and_draw_differently(tiny):
  trajectories = []

  async def branch(session):
    session.append([50])
    await session.generate(max_tokens=6)
    session.finish(Status.FINISHED)

  async def program(session):
    session.append([*PROMPT, *PROMPT])
    turn = await session.generate(max_tokens=4)
    forks = session.fork(2) + session.fork(1)
    trajectories.extend(s.trajectory for s in (*forks, *forks[0].fork(1)))
    runs = [session.engine.adopt(s, branch) for s in forks]
    # What is seen of the turn later is this trajectory's alone.
    session.observe(turn, [ToolCall('python', {})], [ToolResult(())])
    await asyncio.gather(*runs)
    await branch(session)

  sampler = tiny.sampler()
  with tiny.engine(sampler=sampler) as engine:
    collected = engine.collect([Job(tiny.task(), 3, 'g', program)])
    # The prompt but its last; the parent's pending token for one fork, which copies 23 tokens from
    # it, and whose 24 the other two copy; the pending token again for the parent itself.
    assert engine.stats.extended_tokens == 19 + 1 + 1
    assert engine.stats.shared_tokens == 23 + 2 * 24
  forks = trajectories[:3]
  # Forks that a program was started on are collected, after what they were forked from.
  assert [id(t) for t in collected[1:]] == [id(t) for t in forks]
  root = collected[0]
  assert [t.path for t in trajectories] == [(0,), (1,), (2,), (0, 0)]
  assert [t.parent_path for t in trajectories] == [(), (), (), (0,)]
  for t in forks:
    assert (t.fork_point, t.sample, t.group_id, t.task) == (24, 3, 'g', root.task)
    assert t.status is Status.FINISHED and not t.turns[0].calls
    np.testing.assert_array_equal(t.segments[0].tokens[:25], root.segments[0].tokens[:25])
    np.testing.assert_array_equal(t.segments[0].log_probs[:25], root.segments[0].log_probs[:25])
  assert len(root.turns[0].calls) == 1
  everyone = [root, *forks]
  assert len({tuple(t.segments[0].tokens[25:]) for t in everyone}) == 4
  for t, (log_probs, _) in zip(everyone, tiny.learner_scores(everyone)):
    s = t.segments[0]
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4)


def test_a_session_is_left_alone_while_a_turn_of_it_is_sampled(tiny):
  async def program(session):
    session.append(PROMPT)
    mark = session.mark()
    turn = asyncio.create_task(session.generate(max_tokens=40))
    await asyncio.sleep(0)
    for meddle in (lambda: session.fork(2), lambda: session.fork(0), lambda: session.append([50]),
                   lambda: session.rollback(mark), lambda: session.replace([50]), lambda: session.revise(mark, [50])):
      with pytest.raises(RuntimeError, match='a turn is being sampled; await it first'):
        meddle()
    assert (await turn).end == 50
    assert [f.trajectory.path for f in session.fork(1)] == [(0,)], 'what was refused left nothing behind'
    session.finish(Status.FINISHED)

  assert run(tiny, program, turn_tokens=40).status is Status.FINISHED


def test_stops_of_one_piece_are_found_within_longer_pieces(tiny):
  """'2' alone is a piece; '12' is text that holds it, whatever pieces it is made of."""
  tokenizer = tiny.tokenizer
  # A multi-letter piece that the tokenizer learnt, and a letter inside it that is a piece as well.
  piece_id, text = next((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size)
                        if len(tokenizer.decode([i])) > 2 and tokenizer.decode([i]).isalpha())
  letter = text[1]
  assert len(tokenizer.encode(letter)) == 1
  found = []

  async def program(session):
    session.append(PROMPT)
    while session.tokens_left:
      turn = await session.generate(stops=[letter])
      drawn = session.context.tail(turn.start).tolist()
      if turn.stop_reason == 'stop':
        found.append(drawn[-1])
      assert (letter in turn.text) == (turn.stop_reason == 'stop')
      assert letter not in tokenizer.decode(drawn[:-1])
    session.finish(Status.FINISHED)

  for seed in range(8):
    run(tiny, program, seed=seed, turns=100)
  # Both the letter's own id and other pieces that hold it ended turns.
  [own] = tokenizer.encode(letter)
  assert own in found and set(found) - {own}


def test_the_key_is_a_function_of_seed_task_sample_and_path_alone():
  base = (0, 'a', 1, (0, 2))
  others = [(1, 'a', 1, (0, 2)), (0, 'b', 1, (0, 2)), (0, 'a', 0, (0, 2)), (0, 'a', 1, (0,)),
            (0, 'a', 1, (2, 0)), (0, 'a', 1, ())]
  keys = {trajectory_seed(*arguments) for arguments in (base, *others)}
  assert len(keys) == 7 and trajectory_seed(*base) == trajectory_seed(0, 'a', 1, [0, 2])
  assert all(0 <= word < 2**32 for key in keys for word in key)
  # What this version gives: a stored seed must mean the same draws in later ones.
  assert trajectory_seed(0, 'a', 1) == (1415558832, 2758359419)


@pytest.mark.parametrize('bad', [dict(turn_tokens=0), dict(turns=-1), dict(context_tokens=0), dict(calls=2.5),
                                 dict(seconds=float('nan'))])
def test_limits_below_one_are_refused(bad):
  [(name, value)] = bad.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    Limits(**bad)
