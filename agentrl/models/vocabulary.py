"""Embedding and output head on a mesh, where the vocabulary is split over one axis and the width over another.

Written for each device rather than left to the compiler, which would gather logits or tables whole.
"""

from __future__ import annotations

import functools
from typing import Sequence

import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp

from agentrl.models.layers import MASKED
from agentrl.sharding import mesh as meshes

_TABLE = ('vocab', 'width')


def embed(table: jax.Array, tokens: jax.Array, axes: Sequence[str | None], dtype: str) -> jax.Array:
  """Returns table[tokens] in `dtype`, [..., D].

  Tokens go to where the table lies and embeddings come back, so that neither the table nor its gradient moves.

  Args:
    table: [V, D].
    tokens: [...] int32.
    axes: Logical axes of what is returned but the last; 'length' is not one of the tokens.
    dtype: Of what is returned.
  """
  rows = meshes.local_spec([None if a == 'length' else a for a in axes], tokens.shape)
  split, out = meshes.local_spec(_TABLE, table.shape), meshes.local_spec((*axes, None), (*tokens.shape, table.shape[1]))
  local = functools.partial(_embed, rows=rows, split=split, out=out, dtype=dtype)
  return jax.shard_map(local, in_specs=(split, rows), out_specs=out, check_vma=False)(table, tokens)


def _embed(table, tokens, *, rows, split, out, dtype):
  vocab, widths = split
  shared = [n for n in meshes.names_in(widths) if n in meshes.names_in(rows[0])]
  for name in shared:
    tokens = jax.lax.all_gather(tokens, name, tiled=True)
  here = tokens - _first(table, vocab)
  found = table[jnp.clip(here, 0, table.shape[0] - 1)]
  found = jnp.where(((here >= 0) & (here < table.shape[0]))[..., None], found, 0).astype(dtype)
  for name in shared:
    found = jax.lax.all_to_all(found, name, split_axis=0, concat_axis=found.ndim - 1, tiled=True)
  for name in set(meshes.names_in(widths)) - set(shared):
    found = jax.lax.all_gather(found, name, axis=found.ndim - 1, tiled=True)
  if not vocab:
    return _own_part(found, rows, out)
  scattered = len(out) > 2 and vocab in meshes.names_in(out[1])
  return jax.lax.psum_scatter(found, vocab, scatter_dimension=1, tiled=True) if scattered else jax.lax.psum(found, vocab)


def _own_part(x, rows, out):
  """Returns the part of the second axis that this device keeps where only what is returned is split along it."""
  if len(out) < 3 or not out[1]:
    return x
  size = x.shape[1] // jax.lax.axis_size(out[1])
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(out[1]) * size, size, axis=1)


def _first(table, vocab):
  """Returns the first id of a device's part of a table."""
  return jax.lax.axis_index(vocab) * table.shape[0] if vocab else 0


def likelihoods(table: jax.Array, states: jax.Array, targets: jax.Array, *, temperature: float | jax.Array, known: int,
                chunk: int, with_entropy: bool) -> tuple[jax.Array, jax.Array]:
  """Returns log-probs of the targets and entropies, [B, T] float32 nats each; the latter 0 without `with_entropy`.

  Each device holds the logits of `chunk` of its tokens and of its part of the vocabulary at a time. The table is gathered
  along its width once, in the states' dtype; its gradient is summed over chunks and devices in float32.

  Args:
    table: [V, D].
    states: [B, T, D].
    targets: [B, T] int32.
    temperature: Of the policy.
    known: See `transformer.logits`.
    chunk: Must divide a device's tokens; 0 for all of them.
    with_entropy: Whether entropies are wanted.
  """
  rows = meshes.local_spec(('batch', None, None), states.shape)
  split = meshes.local_spec(_TABLE, table.shape)
  local = functools.partial(_likelihoods, split=split, known=known, chunk=chunk, with_entropy=with_entropy)
  each = PartitionSpec(*rows[:2])
  return jax.shard_map(local, in_specs=(split, rows, each, PartitionSpec()), out_specs=(each, each), check_vma=False)(
      table, states, targets, jnp.asarray(temperature, jnp.float32))


def _likelihoods(table, states, targets, temperature, *, split, known, chunk, with_entropy):
  shape, size = targets.shape, targets.size
  chunk = min(chunk or size, size)
  if size % chunk:
    raise ValueError(f'logit_chunk={chunk} does not divide the {shape[0]} x {shape[1]} = {size} tokens of a device')
  score = functools.partial(_score, vocab=split[0], known=known, with_entropy=with_entropy)
  mapped = _mapped(score, meshes.names_in(split[1]))
  log_probs, entropies = mapped(table, states.reshape(-1, chunk, states.shape[-1]), targets.reshape(-1, chunk), temperature)
  return log_probs.reshape(shape), entropies.reshape(shape)


def _score(table, states, targets, temperature, *, vocab, known, with_entropy):
  """Returns the log-probs and entropies of a chunk, from the logits of this device's part of the vocabulary."""
  total = (lambda x: jax.lax.psum(x, vocab)) if vocab else lambda x: x
  scores = jax.lax.dot_general(states, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) / temperature
  first = _first(table, vocab)
  if known:
    ids = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(ids < known, scores, MASKED)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
  top = jax.lax.pmax(top, vocab) if vocab else top
  log_z = top + jnp.log(total(jnp.sum(jnp.exp(scores - top[:, None]), axis=-1)))
  here = targets - first
  own = jnp.take_along_axis(scores, jnp.clip(here, 0, table.shape[0] - 1)[:, None], axis=-1)[:, 0]
  log_probs = total(jnp.where((here >= 0) & (here < table.shape[0]), own, 0.0)) - log_z
  if not with_entropy:
    return log_probs, jnp.zeros_like(log_probs)
  return log_probs, log_z - total(jnp.sum(jnp.exp(scores - log_z[:, None]) * scores, axis=-1))


def _mapped(score, widths):
  """Returns `score` of every chunk, whose gradient computes logits again and sums the table's in float32."""

  def gathered(table, dtype):
    table = table.astype(dtype)
    for name in widths:
      table = jax.lax.all_gather(table, name, axis=1, tiled=True)
    return table

  @jax.custom_vjp
  def run(table, states, targets, temperature):
    whole = gathered(table, states.dtype)
    return jax.lax.map(lambda x: score(whole, *x, temperature), (states, targets))

  def forward(table, states, targets, temperature):
    return run(table, states, targets, temperature), (table, states, targets, temperature)

  def backward(saved, grads):
    table, states, targets, temperature = saved
    whole = gathered(table, states.dtype)

    def add(total, chunk):
      states, targets, grad = chunk
      pull = jax.vjp(lambda w, s: score(w, s, targets, temperature), whole, states)[1]
      of_table, of_states = pull(grad)
      return total + of_table.astype(jnp.float32), of_states

    total, of_states = jax.lax.scan(add, jnp.zeros(whole.shape, jnp.float32), (states, targets, grads))
    for name in reversed(widths):
      total = jax.lax.psum_scatter(total, name, scatter_dimension=1, tiled=True)
    return total.astype(table.dtype), of_states, None, None

  run.defvjp(forward, backward)
  return run
