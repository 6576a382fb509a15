"""The learner's view of a policy: whole packed sequences in, hidden states, log-probs and values out.

The sampler's view, one position at a time over a cache, is `agentrl.sampling`. Both call the blocks of
`agentrl.models.layers`, which is why their log-probs agree.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Sequence

import jax
import jax.numpy as jnp

from agentrl.models import attention, layers, lora, vocabulary
from agentrl.models.config import ModelConfig
from agentrl.models.params import Params, param_axes
from agentrl.sharding import mesh as meshes


_POLICIES = {'nothing': None, 'attention': jax.checkpoint_policies.save_only_these_names(attention.SAVED),
             'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class PolicyOutputs(NamedTuple):
  """What the objectives read of a policy, each aligned with the token it speaks of.

  Attributes:
    log_probs: [B, T] float32, nats. Of tokens[b, t] given what precedes it in its sequence; 0 for a segment's first token.
    entropies: [B, T] float32, nats, of the same distributions; None if not asked for.
    values: [B, T] float32. Value of the state in which tokens[b, t] was drawn; None without a value head.
  """

  log_probs: jax.Array
  entropies: jax.Array | None
  values: jax.Array | None


class DrawnFrom(NamedTuple):
  """Sets of tokens, and which of them each token was drawn from.

  Attributes:
    masks: [R, V / 32] uint32, bit v % 32 of word v // 32 for token v.
    ids: [B, T] int32, into `masks`.
  """

  masks: jax.Array
  ids: jax.Array


def unpack(masks: jax.Array, vocab_size: int) -> jax.Array:
  """Returns [..., V] bool from sets of tokens [..., V / 32] uint32.

  Example:
    >>> unpack(jnp.array([5], jnp.uint32), 4).tolist()
    [True, False, True, False]
  """
  bits = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * masks.ndim + (32,))
  spread = (masks[..., None] >> bits) & jnp.uint32(1)
  return spread.reshape(*masks.shape[:-1], -1)[..., :vocab_size].astype(bool)


def hidden_states(params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array,
                  segment_ids: jax.Array) -> jax.Array:
  """Returns the normalised last hidden states of packed rows.

  Args:
    params: The policy's parameters, learner's view.
    config: Of the policy.
    tokens: [B, T] int32.
    positions: [B, T] int32, position within the sequence.
    segment_ids: [B, T] int32, from 1 within a row; a token attends to earlier ones with its own id, and to what a segment
      that starts at a later position than 0 goes on from, see `attention.visible`.
  Returns:
    [B, T, D] in the compute dtype.
  """
  x = embed(params, config, tokens)
  implementation = attention.choose(config, tokens.shape[1])
  plain = implementation == 'xla'
  mask = attention.visible(positions, segment_ids)
  kinds = layers.sights(config, positions, positions[:, :, None] - positions[:, None, :], mask if plain else None)
  several = jax.tree.map(lambda *x: jnp.stack(x), *kinds) if len(kinds) > 1 else None
  axes = {name: a[1:] for name, a in param_axes(config)['layers'].items() if 'width' in a and 'experts' not in a}

  def attend(q, k, v, see, kind, sinks):
    if plain:
      return attention.plain(q, k, v, see.mask, scale=config.query_scale, sinks=sinks)
    of_kind = [functools.partial(attention.IMPLEMENTATIONS[implementation], window=window, scale=config.query_scale)
               for window in config.kinds]
    within = segment_ids if implementation == 'splash' else mask
    if several is None:
      return of_kind[0](q, k, v, within, sinks=sinks)
    return jax.lax.switch(kind, [lambda *x, f=f: f(*x, sinks=sinks) for f in of_kind], q, k, v, within)

  def block(x, inputs):
    layer, kind = inputs
    layer = layer | {name: meshes.gather(layer[name], axes[name], dtype=config.compute_dtype) for name in axes}
    see = kinds[0] if several is None else jax.tree.map(lambda x: x[kind], several)
    q, k, v = layers.project_qkv(layer, x, see.cos, see.sin, config)
    attended = attend(q, k, v, see, kind, layer.get('sinks'))
    if config.remat and implementation != 'splash':  # whose kernel names what it gives
      attended = attention.named(attended)
    return layers.add_mlp(layer, layers.add_attention(layer, x, attended, config), config), None

  if config.remat:
    block = jax.checkpoint(block, policy=_POLICIES[config.remat_policy])
  inputs = params['layers'], None if several is None else jnp.asarray(config.kind_of_layer)
  x, _ = jax.lax.scan(block, x, inputs, unroll=config.num_layers if config.unroll_layers else 1)
  return layers.norm(x, params['final_norm'], config)


def follows(segment_ids: jax.Array) -> jax.Array:
  """Returns [B, T] bool: whether the token before it in the row is of the same segment; False for padding, of id 0.

  Example:
    >>> follows(jnp.array([[1, 1, 2, 2, 0, 0]]))[0].tolist()
    [False, True, False, True, False, False]
  """
  return ~attention.begins(segment_ids) & (segment_ids > 0)


def embed(params: Params, config: ModelConfig, tokens: jax.Array,
          axes: Sequence[str | None] = layers.STREAM) -> jax.Array:
  """Returns the embeddings of `tokens`, [...] int32, as [..., D] in the compute dtype, with these logical axes."""
  if meshes.current() is None:
    x = params['embedding'][tokens].astype(config.compute_dtype)
  else:
    x = vocabulary.embed(params['embedding'], tokens, axes, config.compute_dtype)
  return x * jnp.asarray(config.width**0.5, x.dtype) if config.scale_embeddings else x


def logits(params: Params, hidden: jax.Array, temperature: float | jax.Array = 1.0, known: int = 0) -> jax.Array:
  """Returns [..., V] float32 logits of hidden states [..., D], divided by the temperature.

  Those of ids from `known` on say that they never come, unless it is 0.
  """
  table = params.get('head', params['embedding']).astype(hidden.dtype)
  flat = hidden.reshape(-1, hidden.shape[-1])  # one plain matrix product, see `layers.project`
  scores = jax.lax.dot_general(flat, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  scores = scores.reshape(*hidden.shape[:-1], table.shape[0])
  scores = scores / temperature
  if 0 < known < scores.shape[-1]:
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    scores = jnp.where(ids < known, scores, layers.MASKED)
  return scores


def evaluate(params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
             *, temperature: float = 1.0, with_entropy: bool = False, drawn_from: DrawnFrom | None = None) -> PolicyOutputs:
  """Returns log-probs, entropies and values of every token of packed rows.

  The policy is the softmax at `temperature`; log-probs are of that distribution, as those recorded at sampling are.

  Args:
    params: The policy's parameters, learner's view.
    config: Of the policy.
    tokens: [B, T] int32.
    positions: [B, T] int32.
    segment_ids: [B, T] int32.
    temperature: Of the policy.
    with_entropy: Whether to compute entropies, which costs one more pass over the logits.
    drawn_from: Sets that the tokens were drawn from, whose distributions are then meant; None for the vocabulary.
  """
  if config.adapted:
    params = lora.freeze(params)
  hidden = meshes.constrain(hidden_states(params, config, tokens, positions, segment_ids), ('batch', None, None))
  # The state a token is drawn in is the hidden state before it; a segment's first token has none.
  before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  has_before = follows(segment_ids)
  log_probs, entropies = _likelihoods(params, config, before, tokens, temperature, with_entropy, drawn_from)
  values = None
  if config.value_head:
    values = jnp.where(has_before, _value(params['value'], config, before), 0.0)
  entropies = None if entropies is None else jnp.where(has_before, entropies, 0.0)
  return PolicyOutputs(jnp.where(has_before, log_probs, 0.0), entropies, values)


def _likelihoods(params, config, states, targets, temperature, with_entropy, drawn_from):
  """Returns log-probs of the targets, and entropies or None."""
  if meshes.current() is not None and drawn_from is None:
    log_probs, entropies = vocabulary.likelihoods(
        params.get('head', params['embedding']), states, targets, temperature=temperature, known=config.known_tokens,
        chunk=config.logit_chunk, with_entropy=with_entropy)
    return log_probs, entropies if with_entropy else None

  def score(states, targets, ids):
    scores = logits(params, states, temperature, config.known_tokens)
    if ids is not None:
      scores = jnp.where(unpack(drawn_from.masks[ids], config.vocab_size), scores, layers.MASKED)
    log_z = jax.nn.logsumexp(scores, axis=-1)
    log_probs = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0] - log_z
    if not with_entropy:
      return log_probs, None
    return log_probs, log_z - jnp.sum(jax.nn.softmax(scores, axis=-1) * scores, axis=-1)

  return _in_chunks(score, states, targets, drawn_from and drawn_from.ids, config.logit_chunk)


def _value(head: Params, config: ModelConfig, states: jax.Array) -> jax.Array:
  """Returns the value of each hidden state [B, T, D], float32."""
  head = jax.tree.map(lambda x: x.astype(jnp.float32), head)
  states = states.astype(jnp.float32)
  if not config.value_gradient:
    states = jax.lax.stop_gradient(states)
  if config.value_width:
    states = states @ head['hidden']
    states = jax.nn.relu(states + jnp.broadcast_to(head['hidden_bias'], states.shape))
  return states @ head['weight'] + head['bias']


def _in_chunks(score, states, targets, ids, chunk):
  """Maps `score` over [B * T] tokens in chunks whose logits are recomputed in the backward pass."""
  b, t, d = states.shape
  if not chunk or chunk >= b * t:
    return score(states, targets, ids)
  if (b * t) % chunk:
    raise ValueError(f'logit_chunk={chunk} does not divide the {b} x {t} = {b * t} tokens of the batch')
  parts = states.reshape(-1, chunk, d), targets.reshape(-1, chunk), None if ids is None else ids.reshape(-1, chunk)
  out = jax.lax.map(jax.checkpoint(lambda x: score(*x)), parts)
  return jax.tree.map(lambda x: x.reshape(b, t), out)
