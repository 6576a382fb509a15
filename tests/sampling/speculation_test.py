"""Speculation changes how many steps it takes, and nothing else: against plain decoding and the learner."""

from __future__ import annotations

import functools
import itertools

from hypothesis import given, strategies as st
import jax
import numpy as np
import pytest

from agentrl.metrics.timing import CompileCounter
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.sampling import cache as caches
from agentrl.sampling import cpu_kernel, functions, speculation
from agentrl.sampling.sampler import Extension, Sampler, SlotRequest
from agentrl.sampling.speculation import NOTHING, Speculation

# A layer with a window and sinks beside one without.
CONFIG = ModelConfig(vocab_size=7, num_layers=2, width=16, ff_width=24, num_heads=4, num_kv_heads=2, head_dim=8,
                     windows=(0, 5), attention_sinks=True)
SLOTS, CAPACITY, STEPS = 32, 40, 20
GUESS = Speculation(tokens=3, ngram=2)
SHARP = 12.0  # the head's scale at which the random policy repeats itself


@functools.cache
def view(sharpness=1.0):
  rng = np.random.default_rng(3)
  draw = lambda s: (float(s.scale is None) + (s.scale or 0.3) * rng.normal(size=s.shape)).astype(np.float32)
  params = jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec))
  params['final_norm'] *= np.float32(sharpness)
  return functions.sampler_view(params, CONFIG), params


settings = dict(config=CONFIG, steps=STEPS)
jit_plain = jax.jit(functools.partial(functions.decode, **settings), static_argnames='kernels')
jit_guess = jax.jit(functools.partial(speculation.decode, **settings, speculation=GUESS), static_argnames='kernels')
jit_extend = jax.jit(functools.partial(functions.extend, config=CONFIG), static_argnames='kernels')


@functools.partial(jax.jit, static_argnames='kernels')
def jit_wide(p, cache, fresh, reading, tokens, lengths, first, kernels):
  plans = kernels and kernels.plan(reading, first, CONFIG.kinds, tokens.shape[1] * 2, cache)
  return functions.next_logits(p, cache, fresh, reading, tokens, lengths, first, CONFIG, kernels, plans)


@functools.cache
def propose(speculation_):
  return jax.jit(functools.partial(speculation.propose, speculation=speculation_))


@pytest.fixture(name='lab')
def make_lab(pages, by_table):
  return Lab(pages, by_table)


class Lab:
  """Contexts in blocks of 8, and both ways of decoding on them."""

  def __init__(self, pages, by_table):
    self.kernels = cpu_kernel.CpuKernels() if by_table else None
    self.pages, self.by_table = pages(CONFIG, SLOTS, CAPACITY // 8, 8, STEPS * (GUESS.tokens + 1)), by_table

  def filled(self, tokens, lengths, sharpness):
    """A cache with tokens[s, :lengths[s]] in each slot, and rubbish elsewhere."""
    return jit_extend(view(sharpness)[0], self.pages.noise(), tokens, np.zeros(SLOTS, np.int32), lengths,
                      self.pages.tables, kernels=self.kernels)

  def both(self, tokens, lengths, budgets, stops, floor=0, sharpness=1.0):
    """What plain decoding and speculation draw, on the host."""
    seeds = np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
    arguments = (view(sharpness)[0], self.filled(tokens, lengths, sharpness), self.pages.reading(lengths, (), self.by_table),
                 tokens[np.arange(SLOTS), lengths], lengths, budgets, seeds, stops, np.int32(floor))
    return (jax.device_get(jit_plain(*arguments, kernels=self.kernels)),
            jax.device_get(jit_guess(*arguments, tokens, kernels=self.kernels)))


def some_slots(seed, longest=16):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 7, (SLOTS, CAPACITY)).astype(np.int32)
  lengths = rng.integers(3, longest + 1, SLOTS).astype(np.int32)
  return rng, tokens, lengths


def reference(history, speculation_):
  """The proposal for a list of tokens, by looking at every place."""
  last, best = len(history) - 1, (0, 0)
  for place in range(last):
    run = 0
    while run < 2 * speculation_.ngram and run <= place and history[place - run] == history[last - run]:
      run += 1
    if run >= speculation_.ngram:
      best = max(best, (run, place))
  if not best[0]:
    return [NOTHING] * speculation_.tokens
  gone_on = history[best[1] + 1:]
  return [gone_on[k % len(gone_on)] for k in range(speculation_.tokens)]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=3, max_size=3), st.integers(1, 3))
def test_what_followed_the_longest_and_latest_match_is_proposed(rows, ngram):
  guess = Speculation(tokens=4, ngram=ngram)
  history = np.full((3, 12), 9, np.int32)
  for slot, row in enumerate(rows):
    history[slot, :len(row)] = row
  lengths = np.asarray([len(row) - 1 for row in rows], np.int32)
  got = propose(guess)(history, lengths).tolist()
  assert got == [reference(row, guess) for row in rows]


def test_a_copied_stretch_and_a_loop_are_proposed_to_go_on():
  history = np.asarray([[5, 1, 2, 3, 4, 0, 6, 1, 2, 0], [1, 2, 1, 2, 1, 2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0, 0, 0]])
  got = propose(GUESS)(history.astype(np.int32), np.asarray([8, 5, 4], np.int32))
  assert got.tolist() == [[3, 4, 0], [1, 2, 1], [NOTHING] * 3]


@pytest.mark.parametrize('at, first', [(9, 9), (17, 9), (CAPACITY - 2, CAPACITY - 9), (CAPACITY - 1, CAPACITY - 1)])
def test_a_wide_step_predicts_what_the_learner_does(lab, at, first):
  """Four tokens at once; of what stands before them, the tokens from `first` on are not in blocks yet."""
  _, tokens, _ = some_slots(1)
  lengths, begun = np.full(SLOTS, at, np.int32), np.full(SLOTS, first, np.int32)
  width = min(4, CAPACITY - at)
  guesses = np.zeros((SLOTS, 4), np.int32)
  guesses[:, :width] = tokens[:, at:at + width]
  cache, reading = lab.filled(tokens, begun, 1.0), lab.pages.reading(begun, (), lab.by_table)
  fresh = caches.init_fresh(cache, reading, 16)
  for done in range(first, at, 4):
    fresh, _ = jit_wide(view()[0], cache, fresh, reading, tokens[:, done:done + 4], np.full(SLOTS, done, np.int32), begun,
                        lab.kernels)
  _, logits = jit_wide(view()[0], cache, fresh, reading, guesses, lengths, begun, lab.kernels)
  positions = np.tile(np.arange(CAPACITY), (SLOTS, 1))
  hidden = transformer.hidden_states(view()[1], CONFIG, tokens, positions, np.ones_like(positions))
  expected = transformer.logits(view()[1], hidden)[:, at:at + width]
  np.testing.assert_allclose(logits[:, :width], expected, atol=2e-5)


@pytest.mark.parametrize('sharpness', [1.0, SHARP])
def test_the_same_tokens_are_drawn_whatever_ends_a_slot(lab, sharpness):
  rng, tokens, lengths = some_slots(2)
  budgets = rng.integers(0, STEPS + 1, SLOTS).astype(np.int32)
  stops = rng.integers(-1, 7, (SLOTS, 2)).astype(np.int32)
  stops[::2] = -1
  (_, plain), (_, guess) = lab.both(tokens, lengths, budgets, stops, sharpness=sharpness)
  np.testing.assert_array_equal(plain.counts, guess.counts)
  np.testing.assert_array_equal(plain.stopped, guess.stopped)
  for slot, n in enumerate(plain.counts):
    np.testing.assert_array_equal(plain.tokens[slot, :n], guess.tokens[slot, :n])
    np.testing.assert_allclose(plain.log_probs[slot, :n], guess.log_probs[slot, :n], atol=1e-4)
    np.testing.assert_allclose(plain.entropies[slot, :n], guess.entropies[slot, :n], atol=1e-4)
  assert plain.stopped.any() and (guess.steps < plain.steps if sharpness == SHARP else guess.steps <= plain.steps)


def test_a_policy_that_repeats_itself_needs_far_fewer_steps_and_the_cache_holds_what_was_drawn(lab):
  _, tokens, lengths = some_slots(3)
  budgets, none = np.full(SLOTS, STEPS, np.int32), np.full((SLOTS, 1), -1, np.int32)
  (_, plain), (cache, guess) = lab.both(tokens, lengths, budgets, none, sharpness=SHARP)
  assert plain.steps == STEPS and guess.steps < 0.7 * STEPS
  contexts = tokens.copy()
  for slot, n in enumerate(lengths):
    contexts[slot, n + 1:n + 1 + STEPS] = guess.tokens[slot, :STEPS]
  expected = lab.filled(contexts, lengths + STEPS, SHARP)
  for slot, n in enumerate(lengths + STEPS):
    for got, want in zip(lab.pages.held(cache, slot, n), lab.pages.held(expected, slot, n)):
      np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_floor_returns_once_few_are_left(lab):
  _, tokens, lengths = some_slots(4)
  budgets = np.full(SLOTS, 2, np.int32)
  budgets[:8] = STEPS
  _, (_, guess) = lab.both(tokens, lengths, budgets, np.full((SLOTS, 1), -1, np.int32), floor=8, sharpness=SHARP)
  assert guess.steps <= 2 and (guess.counts[8:] == 2).all() and (guess.counts[:8] >= guess.steps).all()


def test_draws_follow_the_distribution_of_the_learner(lab):
  """All sequences of three tokens, counted; the context repeats itself, so every first step proposes three."""
  context = [1, 5, 3, 1, 5, 3, 1, 5]
  tokens = np.zeros((SLOTS, CAPACITY), np.int32)
  tokens[:, :len(context)] = context
  lengths, budgets = np.full(SLOTS, len(context) - 1, np.int32), np.full(SLOTS, 3, np.int32)
  none, sharpness = np.full((SLOTS, 1), -1, np.int32), 3.0
  assert propose(GUESS)(tokens, lengths)[0].tolist() == [3, 1, 5]
  sequences = np.asarray(list(itertools.product(range(7), repeat=3)))
  rows = np.c_[np.tile(context, (len(sequences), 1)), sequences]
  positions = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
  scored = transformer.evaluate(view(sharpness)[1], CONFIG, rows, positions, np.ones_like(positions))
  probs = np.exp(np.asarray(scored.log_probs)[:, -3:].sum(1))
  assert probs.sum() == pytest.approx(1.0, abs=1e-4)
  counts, rounds = np.zeros(len(sequences)), 250
  cache, reading = lab.filled(tokens, lengths, sharpness), lab.pages.reading(lengths, (), lab.by_table)
  for i in range(rounds):
    seeds = np.stack([np.full(SLOTS, i), np.arange(SLOTS)], 1).astype(np.uint32)
    out = jax.device_get(jit_guess(view(sharpness)[0], cache, reading, tokens[:, lengths[0]], lengths, budgets, seeds, none,
                                   np.int32(0), tokens, kernels=lab.kernels)[1])
    np.add.at(counts, out.tokens[:, :3] @ [49, 7, 1], 1)
  # Cells of at least 5 expected; the rest share one.
  expected = probs * rounds * SLOTS
  common = expected >= 5
  pairs = np.stack([np.append(counts[common], counts[~common].sum()), np.append(expected[common], expected[~common].sum())])
  chi2 = np.sum((pairs[0] - pairs[1])**2 / pairs[1])
  assert chi2 < len(pairs[0]) + 4 * np.sqrt(2 * len(pairs[0]))
  # Guesses were right at times and wrong at others.
  assert 0.05 < counts[sequences[:, 0] == 3].sum() / counts.sum() < 0.95


@pytest.mark.parametrize('settings_', [dict(tokens=0), dict(tokens=2, ngram=0)])
def test_speculation_that_proposes_nothing_is_refused(settings_):
  with pytest.raises(ValueError, match='proposes nothing'):
    Speculation(**settings_)


# ---- through the sampler ----------------------------------------------------------------------------


def test_the_sampler_guesses_from_all_it_holds_and_compiles_nothing_after_warm_up(tiny):
  """Prompts, forks, earlier draws and pending tokens are remembered: exactly the context's tokens."""
  sampler = Sampler(tiny.config, slots=2, context=96, chunk=4, capacities=(32, 96), row_buckets=(2,), token_buckets=(16,),
                    block=16, speculation=GUESS)
  sampler.set_params(tiny.params)
  sampler.warm_up()
  assert sampler.reach == 16
  counter = CompileCounter()
  try:
    counter.mark()
    context = np.random.default_rng(0).integers(2, 300, 30).tolist()
    sampler.extend([Extension(0, context[:-1], 0)])
    sampler.fork([(0, 1)])
    for _ in range(3):
      drawn = sampler.decode({s: SlotRequest(context[-1], len(context) - 1, 50, (1, 2), ()) for s in (0, 1)})
      np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
      context += drawn[0].tokens.tolist()
      for slot in (0, 1):
        assert sampler.contexts.tokens[slot, :len(context)].tolist() == context
    assert counter.count == 0, counter.names
  finally:
    counter.close()
