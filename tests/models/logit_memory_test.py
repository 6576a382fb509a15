"""What an update needs at a large vocabulary, by the compiler's own account: logits of all tokens never exist."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.sampler import Sampler, SlotRequest

B, T, V = 4, 256, 65_536
CONFIG = ModelConfig(vocab_size=V, num_layers=1, width=16, ff_width=16, num_heads=2, num_kv_heads=2, head_dim=8)


def temporary_bytes(config):
  """Bytes beside arguments and results of log-probs, entropies and their gradient."""

  def loss(params, tokens):
    got = transformer.evaluate(params, config, tokens, tokens, tokens, with_entropy=True)
    return jnp.sum(got.log_probs) + jnp.sum(got.entropies)

  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  return jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures('compile_cache')
def test_in_chunks_an_update_never_holds_the_logits_of_all_tokens():
  all_logits = 4 * B * T * V
  whole = temporary_bytes(CONFIG)
  chunked = temporary_bytes(dataclasses.replace(CONFIG, logit_chunk=32))
  # The check sees logits at all, and 1/32 of the tokens at a time are a few times 1/32 of them, the table's gradient
  # and the rest of the policy: well below one half.
  assert whole > 2 * all_logits
  assert chunked < all_logits / 4, (chunked, all_logits)


@pytest.mark.usefixtures('quick_compile')
def test_padding_of_the_vocabulary_has_probability_zero_in_learner_and_sampler():
  config = dataclasses.replace(CONFIG, vocab_size=40, tied_embeddings=False)
  padded = dataclasses.replace(config, known_tokens=33)
  params = init_params(config, jax.random.key(0))
  # Without the mask the padding would win: its rows are the longest.
  params['head'] = params['head'].at[33:].multiply(50.0)
  small = dataclasses.replace(config, vocab_size=33)
  cut = {**params, 'head': params['head'][:33], 'embedding': params['embedding'][:33]}
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 33, (2, 9)), jnp.int32)
  positions, ones = jnp.tile(jnp.arange(9, dtype=jnp.int32), (2, 1)), jnp.ones((2, 9), jnp.int32)
  run = lambda p, c: jax.jit(functools.partial(
      transformer.evaluate, config=c, tokens=tokens, positions=positions, segment_ids=ones, temperature=0.7,
      with_entropy=True))(p)
  got, expected = run(params, padded), run(cut, small)  # the policy that never had the padding
  np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-5)
  np.testing.assert_allclose(got.entropies, expected.entropies, atol=1e-5)
  assert np.abs(run(params, config).log_probs - expected.log_probs).max() > 1.0
  for temperature in (0.0, 1.0):
    sampler = Sampler(padded, slots=2, context=32, chunk=30, sampling=SamplingParams(temperature))
    sampler.set_params(params)
    drawn = sampler.decode({s: SlotRequest(int(tokens[s, 0]), 0, 30, (0, 1 + s), ()) for s in (0, 1)})
    for d in drawn.values():
      assert d.tokens.max() < 33 and np.isfinite(d.entropies).all() and np.isfinite(d.log_probs).all()
