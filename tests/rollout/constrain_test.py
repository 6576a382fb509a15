"""Constrained rollouts: no call is malformed, and the learner sees the distribution that was drawn from."""

from __future__ import annotations

import asyncio
import json

import jax
import numpy as np
import pytest

from agentrl.core.types import Status
from agentrl.rollout import store
from agentrl.rollout.engine import Engine, Job
from agentrl.rollout.journal import Journal
from agentrl.sampling.constrain import Grammar, MaskTable, allows
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.speculation import Speculation
from agentrl.sharding import mesh as meshes
from agentrl.tokens.formats import HermesFormat
from agentrl.tools import schema as schemas

MARKERS = ('<tool_call>', '</tool_call>')
FORMAT = HermesFormat()


class CallsOnly(HermesFormat):
  """Every turn is one call: a random policy would open one in hundreds of tokens."""

  def grammar(self, tools, ids):
    found = super().grammar(tools, ids)
    first, rest = found.turn.split('\n', 1)
    return found._replace(turn=first.replace('(TEXT? ', '').replace(')* TEXT?', '') + '\n' + rest)


TOOLS = [
    {'name': 'a', 'parameters': {'type': 'object', 'required': ['x'], 'properties': {
        'x': {'enum': ['l', 'r', 1]}, 'y': {'type': 'object', 'properties': {'z': {'type': 'boolean'}}}}}},
    {'name': 'b', 'parameters': {'type': 'object', 'properties': {}}},
    {'name': 'c', 'parameters': {'type': 'object', 'required': ['s'], 'properties': {'s': {'type': 'string', 'maxLength': 4}}}},
]
PARAMETERS = {t['name']: t['parameters'] for t in TOOLS}


@pytest.fixture(scope='module', name='caller')
def calling_policy(tiny):
  """A random policy whose tokenizer writes such calls in few pieces."""
  texts = [json.dumps({'name': t['name'], 'arguments': {'x': 'l', 'y': {'z': True}}}) for t in TOOLS] * 20
  return type(tiny)(MARKERS, [*texts, 'some words of text'])


@pytest.fixture(scope='module', name='grammar')
def grammar_of(caller):
  return Grammar(CallsOnly(), TOOLS, caller.tokenizer, [caller.tokenizer.end_id])


@pytest.fixture(scope='module', name='free')
def free_grammar(caller):
  """Of turns with words too."""
  return Grammar(FORMAT, TOOLS, caller.tokenizer, [caller.tokenizer.end_id])


def sampler(caller, chunk=8, **settings):
  return caller.sampler(4, chunk=chunk, capacities=(caller.context,), constrained=True, **settings)


def program(turns=2, max_tokens=60):
  """A program of some turns, each of a call or words."""

  async def run(session):
    session.append([20, 21, 22 + session.trajectory.sample])
    for _ in range(turns):
      await session.generate(stops=(*FORMAT.stops, '<|end|>'), max_tokens=max_tokens)
      if session.tokens_left < 8:
        break
      session.append([30, 31])
    session.finish(Status.FINISHED)

  return run


def jobs_of(caller, count=12, **settings):
  return [Job(caller.task(k), k, 'g', program(**settings)) for k in range(count)]


def collect(caller, grammar, jobs, sampler_, seed=0):
  with caller.engine(sampler=sampler_, grammar=grammar, seed=seed, turn_tokens=60) as engine:
    return engine.collect(jobs), engine.stats


@pytest.fixture(scope='module', name='plain')
def plain_run(caller, grammar):
  return collect(caller, grammar, jobs_of(caller, 24), sampler(caller))[0]


def turns_of(caller, trajectories):
  return [turn for t in trajectories for turn in t.turns]


def same(a, b):
  for x, y in zip(a, b, strict=True):
    [s], [t] = x.segments, y.segments
    np.testing.assert_array_equal(s.tokens, t.tokens)
    np.testing.assert_allclose(s.log_probs, t.log_probs, atol=1e-5)
    assert s.masks == t.masks


def test_calls_that_end_are_valid_and_free_text_has_no_stray_ends(caller, plain):
  calls = 0
  for turn in turns_of(caller, plain):
    if turn.stop_reason == 'stop':
      for call in FORMAT.parse(turn.text.replace('<|end|>', '')):
        assert call.error is None and schemas.problem(call.arguments, PARAMETERS[call.name]) is None, turn.text
        calls += 1
  assert calls >= 24


def test_words_are_free_but_for_stray_ends(caller, free):
  trajectories, _ = collect(caller, free, jobs_of(caller, 8), sampler(caller))
  for turn in turns_of(caller, trajectories):
    assert turn.stop_reason != 'stop' or not any(c.error for c in FORMAT.parse(turn.text))
  for t, (log_probs, _) in zip(trajectories, caller.learner_scores(trajectories)):
    [s] = t.segments
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4, rtol=0)
    closing = caller.tokenizer.id_of('</tool_call>')
    assert all(m for m, sampled in zip(s.masks, s.sampled) if sampled) and not allows(s.masks[3], closing)


def test_every_token_was_drawn_from_its_mask_and_the_learner_sees_that_distribution(caller, plain):
  for t, (log_probs, entropies) in zip(plain, caller.learner_scores(plain)):
    [s] = t.segments
    for token, mask, sampled in zip(s.tokens, s.masks, s.sampled):
      assert (mask is not None) == sampled and (mask is None or allows(mask, int(token)))
    np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4, rtol=0)
    np.testing.assert_allclose(s.entropies[s.sampled], entropies[s.sampled], atol=1e-4, rtol=0)
  # Where the grammar leaves a single token there is nothing to choose.
  certain = [lp for t in plain for lp, m in zip(t.segments[0].log_probs, t.segments[0].masks)
             if m and np.unpackbits(np.frombuffer(m, np.uint8)).sum() == 1]
  assert len(certain) > 20 and np.abs(certain).max() < 1e-6


def test_chunks_slots_and_speculation_do_not_matter(caller, grammar, plain):
  jobs = jobs_of(caller, 24)
  same(plain, collect(caller, grammar, jobs, sampler(caller, chunk=3))[0])
  guessing = sampler(caller, speculation=Speculation(3, ngram=1))
  same(plain, collect(caller, grammar, jobs, guessing)[0])


def test_a_mesh_which_is_sent_its_masks_draws_the_same(caller, grammar, plain):
  of_two = sampler(caller, mesh=meshes.make_mesh({'tensor': 2}, jax.devices()[:2]))
  assert of_two.masks.everywhere is not None and sampler(caller).masks.everywhere is None
  same(plain, collect(caller, grammar, jobs_of(caller, 24), of_two)[0])


def test_masks_are_those_of_the_grammar_along_the_turn(caller, grammar, plain):
  for t in plain:
    for turn in t.turns:
      tokens = t.segments[0].tokens[turn.start:turn.end].tolist()
      assert grammar.masks(tokens) == list(t.segments[0].masks[turn.start:turn.end])


def test_a_program_that_is_run_again_and_turns_put_in_place_have_the_masks_that_were_drawn_under(caller, grammar):
  journals: dict[tuple, Journal] = {}
  kept = []

  async def once(session):
    await program(turns=1)(session)
    kept.append(session.trajectory.segments[0])

  async def twice(session):
    session.append([20, 21, 22])
    mark = session.mark()
    turn = await session.generate(stops=(*FORMAT.stops, '<|end|>'), max_tokens=30)
    tokens = session.context.tokens[turn.start:turn.end].tolist()
    drawn = session.context.masks[turn.start:turn.end]
    session.revise(mark, tokens)
    assert session.context.masks[turn.start:turn.end] == drawn and drawn[0]
    [fork] = session.fork(1)
    assert fork.grammar is grammar and fork.context.masks == session.context.masks
    session.grammar = None
    turn = await session.generate(max_tokens=8)
    assert not any(session.context.masks[turn.start:])
    session.finish(Status.FINISHED)

  with caller.engine(sampler=sampler(caller), grammar=grammar, turn_tokens=60) as engine:
    async def run():
      for _ in range(2):
        async with engine.serving():
          session = engine.begin(Job(caller.task(), 0, 'g', once), journals)
          for journal in journals.values():
            journal._asked = 0
          while engine.under_way():
            await engine.serve()
          engine.take([session])
    asyncio.run(run())
    [t] = engine.collect([Job(caller.task(), 0, 'g', twice)])
    assert t.status is Status.FINISHED, t.detail
  assert len(kept) == 2 and kept[0].masks == kept[1].masks and any(kept[0].masks)


def test_grammars_are_told_apart_by_their_checksums(caller, grammar, free):
  again = Grammar(FORMAT, TOOLS, caller.tokenizer, [caller.tokenizer.end_id])
  fewer = Grammar(FORMAT, TOOLS[:2], caller.tokenizer, [caller.tokenizer.end_id])
  assert again.checksum == free.checksum
  assert len({g.checksum for g in (grammar, free, fewer)}) == 3


def test_masks_survive_the_store(plain, tmp_path):
  path = store.TrajectoryStore(tmp_path).write(0, plain)
  for t, back in zip(plain, store.read(path).trajectories):
    assert t.segments[0].masks == back.segments[0].masks
    np.testing.assert_array_equal(t.segments[0].log_probs, back.segments[0].log_probs)


def test_a_greedy_policy_keeps_to_the_grammar_with_finite_numbers(caller, grammar):
  greedy = sampler(caller, sampling=SamplingParams(temperature=0.0))
  for t in collect(caller, grammar, jobs_of(caller, 4), greedy)[0]:
    [s] = t.segments
    assert all(allows(m, int(token)) for token, m in zip(s.tokens, s.masks) if m) and any(s.masks)
    assert np.isfinite(s.entropies[s.sampled]).all()


def test_a_grammar_needs_a_sampler_made_for_it(caller, grammar):
  with pytest.raises(ValueError, match='not made with constrained=True'):
    Engine(caller.sampler(), caller.tokenizer, grammar=grammar)

  async def sets_one(session):
    session.append([5])
    session.grammar = grammar
    await session.generate()

  with caller.engine() as engine:
    [t] = engine.collect([Job(caller.task(), 0, 'g', sets_one)])
  assert t.status is Status.AGENT_FAILURE and 'not made with constrained=True' in t.detail


# ---- what the decode loop asks --------------------------------------------------------------------


def ask(table, counts, tokens, proposals=None):
  """The table's answer through a jitted function, as in the loop: [S, W, V] bool."""
  arrays = [np.asarray(x, np.int32) for x in (counts, tokens, *([] if proposals is None else [proposals]))]
  return np.asarray(jax.jit(lambda *a: table.allowed(*a))(*arrays))


def expected(caller, grammar, tokens):
  cursor = grammar.start()
  cursor.follow(tokens)
  return np.unpackbits(np.frombuffer(cursor.mask(), np.uint8), bitorder='little')[:caller.tokenizer.vocab_size].astype(bool)


def test_answers_follow_from_the_question_alone(caller, grammar):
  """Asked again, or about fewer tokens than before, the table answers the same; slots without a grammar are free."""
  v = caller.tokenizer.vocab_size
  tokens = caller.tokenizer.encode('<tool_call>{"name": "b", ', allow_markers=True)
  table = MaskTable(3, v)
  cursor = grammar.start()
  cursor.follow(tokens[:1])
  table.begin({1: cursor})
  rest = tokens[1:]
  padded = np.zeros((3, len(rest)), np.int32)
  padded[1] = rest
  for count in (0, 2, 2, 3, 1, len(rest), 0):
    got = ask(table, [0, count, 0], padded)
    assert got[0].all() and got[2].all()
    np.testing.assert_array_equal(got[1, 0], expected(caller, grammar, tokens[:1 + count]))


def test_answers_look_ahead_as_far_as_proposals_may_be_drawn(caller, grammar):
  v = caller.tokenizer.vocab_size
  tokens = caller.tokenizer.encode('<tool_call>{"name": "b", ', allow_markers=True)
  table = MaskTable(2, v, width=4)
  table.begin({0: grammar.start(), 1: grammar.start()})
  wrong = caller.tokenizer.end_id
  got = ask(table, [1, 1], [tokens[:2], tokens[:2]], [tokens[1:4], [tokens[1], wrong, tokens[2]]])
  for i in range(4):
    np.testing.assert_array_equal(got[0, i], expected(caller, grammar, tokens[:1 + i]))
  np.testing.assert_array_equal(got[1, 1], expected(caller, grammar, tokens[:2]))
  assert not got[1, 1, wrong]
  assert table.drawn(0, 1)[0] is not None
  # The cursors stand where the drawn tokens end.
  np.testing.assert_array_equal(ask(table, [1, 1], [tokens[:2]] * 2, [[-1] * 3] * 2)[0, 0], expected(caller, grammar, tokens[:1]))


def test_a_cursor_goes_forwards_and_backwards_and_begins_anew_behind_an_end(caller, free):
  grammar = free
  tokens = caller.tokenizer.encode('so <tool_call>{"name": "c", "arguments": {"s": "ab"}}</tool_call>', allow_markers=True)
  turn = [*tokens, caller.tokenizer.end_id, *tokens]
  masks = grammar.masks(turn)
  assert None not in masks
  cursor = grammar.start()
  for length in (3, 9, 1, len(turn) - 2, len(tokens) + 1, 4, len(turn) - 1, 0):
    cursor.follow(turn[:length])
    assert cursor.taken == length and cursor.mask() == masks[length]
  other = turn[:5] + caller.tokenizer.encode(' words')
  cursor.follow(turn[:9])
  cursor.follow(other)
  assert cursor.mask() == grammar.masks([*other, 5])[-1]


def test_masks_of_a_larger_vocabulary_leave_out_what_the_tokenizer_does_not_know(caller, grammar):
  v = caller.tokenizer.vocab_size
  table = MaskTable(1, v + 70)
  table.begin({0: grammar.start()})
  got = ask(table, [0], [[0]])[0, 0]
  np.testing.assert_array_equal(got[:v], expected(caller, grammar, []))
  assert not got[v:].any()
