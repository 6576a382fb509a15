"""Groups that are carried from one policy to the next: what they keep, how old they may grow, and that a snapshot loses
nothing.

Expected values are those of `Engine.collect`, of the learner's evaluation under the weights of each version, and of the
same stream undisturbed.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time

import jax
import numpy as np
import pytest

from agentrl.core.types import Status
from agentrl.rollout.engine import Job
from agentrl.rollout.stream import Order, Stream

PROMPT = list(range(20, 32))


def program_of(turns, gate=None):
  """A program of some turns, each with an observation that depends on what was drawn.

  After the second of them its tool waits for `gate`, a threading.Event.
  """
  async def program(session):
    session.append(PROMPT)
    for i in range(turns):
      turn = await session.generate(stops=['e', '1'], max_tokens=12)
      while gate and i == 1 and not gate.is_set():
        await asyncio.sleep(0.001)
      session.append([60 + (turn.end - turn.start) % 7, 61])
    session.finish(Status.FINISHED)
  return program


def jobs_of(tiny, note, gate=None):
  return [Job(tiny.task(note['task']), k, str(note['task']), program_of(note['turns'], gate)) for k in range(2)]


def orders_of(tiny, *turns, first=0, gate=None):
  notes = [{'task': first + i, 'turns': n} for i, n in enumerate(turns)]
  return [Order(jobs_of(tiny, note, gate), note) for note in notes]


def weights(tiny, version):
  """Weights that differ enough for their draws to differ."""
  return jax.tree.map(lambda x: x * (1 + 0.05 * version), tiny.params)


def scores(tiny, trajectory, version):
  """Returns the learner's log-probs [T] under the weights of a version."""
  before, tiny.params = tiny.params, weights(tiny, version)
  try:
    return tiny.learner_scores([trajectory])[0][0]
  finally:
    tiny.params = before


@pytest.fixture(name='start')
def starts(tiny):
  """Makes streams on the tiny policy's sampler, and ends them."""
  made = []

  def start(slots=8, **options):
    engine = tiny.engine(sampler=tiny.sampler(slots, capacities=(tiny.context,)))
    made.append((engine, Stream(engine.__enter__(), **options)))
    return made[-1][1]

  yield start
  for engine, stream in made:
    stream.close()
    engine.__exit__(None, None, None)


def tokens_of(groups):
  return [t.segments[0].tokens.tolist() for group in groups for t in group]


def test_without_staleness_it_collects_what_the_engine_collects(tiny, start):
  stream = start(overlap=True)
  stream.take_weights(weights(tiny, 0), 5)
  orders = orders_of(tiny, 1, 3, 2)
  stream.ask(orders)
  groups = stream.take(3)
  with tiny.engine(sampler=tiny.sampler(8, capacities=(tiny.context,))) as engine:
    plain = engine.collect([job for order in orders for job in order.jobs], policy_version=5)
  for t, other in zip((t for group in groups for t in group), plain, strict=True):
    a, b = t.segments[0], other.segments[0]
    for name in ('tokens', 'sampled', 'log_probs', 'entropies', 'turns', 'versions'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert t.policy_version == other.policy_version == 5 and t.turns == other.turns


@pytest.mark.parametrize('overlap', [False, True])
def test_what_is_carried_over_keeps_its_log_probs_and_goes_on_under_the_new_weights(tiny, start, overlap):
  stream, gate = start(staleness=1, overlap=overlap), threading.Event()
  stream.take_weights(weights(tiny, 0), 0)
  stream.ask(orders_of(tiny, 1, 4, gate=gate))
  [short] = stream.take(1)
  assert [len(t.turns) for t in short] == [1, 1] and stream.under_way == 1
  carried = [t for _, _, t in under_way(stream)]
  stream.take_weights(weights(tiny, 1), 1)
  gate.set()
  before = [(t.segments[0].tokens, t.segments[0].log_probs) for t in carried]
  stream.ask(orders_of(tiny, 1, first=2))
  [long] = stream.take(1)
  assert [t.policy_version for t in long] == [0, 0]
  for t, (tokens, log_probs) in zip(long, before, strict=True):
    s = t.segments[0]
    assert t.status is Status.FINISHED and len(t.turns) == 4
    np.testing.assert_array_equal(s.tokens[:len(tokens)], tokens)
    np.testing.assert_array_equal(s.log_probs[:len(tokens)], log_probs)
    np.testing.assert_array_equal(s.versions[:len(tokens)], np.where(s.sampled[:len(tokens)], 0, -1))
    np.testing.assert_array_equal(s.versions[len(tokens):], np.where(s.sampled[len(tokens):], 1, -1))
    assert (s.versions == 0).any() and (s.versions == 1).any()
    # Every token has the probability that the policy of its version gives it, whatever drew those before it.
    for version in (0, 1):
      own = s.versions == version
      np.testing.assert_allclose(s.log_probs[own], scores(tiny, t, version)[own], atol=1e-4)
      assert np.abs(s.log_probs[own] - scores(tiny, t, 1 - version)[own]).max() > 1e-2


def under_way(stream):
  """Returns (group, sample, trajectory) of what is being drawn."""
  return [(g.number, root.trajectory.sample, root.trajectory) for g in stream._groups for root in g.roots]


def test_a_kept_cache_is_not_computed_anew_and_records_what_was_drawn_from(tiny, start):
  drawn, extended = {}, {}
  for keep in (False, True):
    stream = start(staleness=1, keep_cache=keep)
    stream.take_weights(weights(tiny, 0), 0)
    stream.ask(orders_of(tiny, 1, 4))
    stream.take(1)
    carried = sum(len(t.segments[0]) for _, _, t in under_way(stream))
    stream.take_weights(weights(tiny, 1), 1)
    stream._engine.stats.extended_tokens = 0
    [drawn[keep]] = stream.take(1)
    extended[keep] = stream._engine.stats.extended_tokens
    stream.close()
  assert extended[False] - extended[True] > carried / 2
  for t in drawn[True]:
    own = t.segments[0].versions == 1
    assert np.abs(t.segments[0].log_probs - scores(tiny, t, 1))[own].max() > 1e-3


def test_of_a_kept_cache_new_trajectories_share_nothing(tiny, start):
  stream = start(staleness=1, keep_cache=True)
  stream.take_weights(weights(tiny, 0), 0)
  stream.ask(orders_of(tiny, 1, 4))
  stream.take(1)
  carried = {id(t) for _, _, t in under_way(stream)}
  stream.take_weights(weights(tiny, 1), 1)
  stream.ask(orders_of(tiny, 1, first=2))  # the same prompt
  stream.take(1)
  stream.take_weights(weights(tiny, 1), 2)
  begun_after = [t for group in stream.take(1) for t in group if id(t) not in carried]
  assert begun_after
  for t in begun_after:
    own = t.segments[0].sampled
    np.testing.assert_allclose(t.segments[0].log_probs[own], scores(tiny, t, 1)[own], atol=1e-4)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('staleness', [0, 1, 3])
def test_nothing_grows_too_old_whatever_ends_first(tiny, start, staleness, seed):
  """Programs that draw nothing and end in a random order, some of them only when they are the last to be waited for."""
  rng, count, steps = np.random.default_rng(seed), 2, 12
  stream = start(staleness=staleness, overlap=bool(seed % 2))
  stream.take_weights(tiny.params, 0)
  lags, taken = [], []

  def order():
    seconds = float(rng.choice([0.0, 0.001, 0.02]))
    async def program(session):
      session.append(PROMPT)
      await asyncio.sleep(seconds)
      session.finish(Status.FINISHED)
    return Order([Job(tiny.task(), 0, str(stream.asked), program)])

  for step in range(steps):
    stream.take_weights(tiny.params, step)
    while stream.under_way < (1 + staleness) * count:
      stream.ask([order()])
    groups = stream.take(count)
    assert len(groups) == count and stream.under_way == staleness * count
    lags += [step - t.policy_version for group in groups for t in group]
    taken += [t.group_id for group in groups for t in group]
  assert max(lags) == staleness and min(lags) >= 0 and len(set(taken)) == steps * count
  if not staleness:
    assert taken == [str(i) for i in range(steps * count)]


def play(tiny, start, interrupted):
  """Four versions, two groups of three each; at each of some versions the stream is ended and made again."""
  stream, found = start(staleness=2), []
  for version in range(4):
    if version in interrupted:
      snapshot = json.loads(json.dumps(stream.snapshot()))
      stream.close()
      stream = start(staleness=2)
    stream.take_weights(weights(tiny, version), version)
    if version in interrupted:
      stream.restore(snapshot, lambda note: jobs_of(tiny, note))
    while stream.under_way < 3:
      stream.ask(orders_of(tiny, 1 + stream.asked % 4, first=stream.asked))
    found.append(stream.take(1))
  return found


def test_a_stream_made_again_goes_on_as_if_it_had_not_ended(tiny, start):
  plain = play(tiny, start, ())
  versions = [set(t.segments[0].versions) - {-1} for groups in plain for group in groups for t in group]
  assert max(len(v) for v in versions) > 1, 'some are to be carried over'
  for interrupted in [(1,), (2, 3)]:
    again = play(tiny, start, interrupted)
    assert [tokens_of(groups) for groups in again] == [tokens_of(groups) for groups in plain]
    for a, b in zip((t for gs in again for g in gs for t in g), (t for gs in plain for g in gs for t in g)):
      np.testing.assert_array_equal(a.segments[0].versions, b.segments[0].versions)
      np.testing.assert_allclose(a.segments[0].log_probs, b.segments[0].log_probs, atol=1e-5)
      assert a.policy_version == b.policy_version and a.turns == b.turns and a.status is b.status


def test_drawing_goes_on_while_nobody_waits_only_if_it_is_to_overlap(tiny, start):
  for overlap in (False, True):
    stream, gate = start(staleness=1, overlap=overlap), threading.Event()
    stream.take_weights(tiny.params, 0)
    stream.ask(orders_of(tiny, 1, 5, gate=gate))
    stream.take(1)
    drawn = stream._engine.stats.decoded_tokens
    gate.set()
    deadline = time.monotonic() + (60 if overlap else 0.3)
    while stream._engine.stats.decoded_tokens == drawn and time.monotonic() < deadline:
      time.sleep(0.01)
    assert (stream._engine.stats.decoded_tokens > drawn) == overlap
    stream.close()


def test_what_ends_the_drawing_is_raised_where_somebody_waits(tiny, start):
  stream = start()
  stream._engine.sampler._decode, decode = None, stream._engine.sampler._decode
  try:
    stream.ask(orders_of(tiny, 1))
    with pytest.raises(Exception, match='NoneType|None'):
      stream.take(1)
  finally:
    stream._engine.sampler._decode = decode


def test_more_than_is_under_way_cannot_be_taken(tiny, start):
  with pytest.raises(ValueError, match='2 groups are to be taken, but 1 are under way'):
    stream = start()
    stream.ask(orders_of(tiny, 1))
    stream.take(2)
  with pytest.raises(ValueError, match='staleness=-1 must be at least 0'):
    start(staleness=-1)
