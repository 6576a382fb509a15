"""The jitted steps of the learner: one update, and one scoring pass."""

from __future__ import annotations

import functools
from typing import Any, Callable
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agentrl.algorithms import objective as objectives
from agentrl.algorithms.objective import LossBatch, Metrics, Objective
from agentrl.core.types import TrainBatch
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import Params, param_axes
from agentrl.sharding import exchange
from agentrl.sharding import mesh as meshes
from agentrl.training.packing import NODE_PARTS
from agentrl.training.state import LearnerState


def make_update(config: ModelConfig, optimizer: optax.GradientTransformation, objective: Objective, *,
                micro_batches: int, temperature: float = 1.0, mesh: jax.sharding.Mesh | None = None,
                estimated: bool = False) -> Callable[..., Any]:
  """Returns a jitted `update(state, batch, used) -> (state, metrics)` that donates the state.

  The objective weighs every token by counts over the whole batch, so the gradient is a plain sum over micro-batches.
  Micro-batch m is rows m, m + micro_batches, ... (see `packing.pack`), and only the first `used` of them are run:
  `used` is traced, so a batch padded to its largest size costs what is in it and compiles once. An update whose loss
  or gradient is not finite is not applied.

  Args:
    config: Of the policy.
    optimizer: Whose state `state.opt_state` is.
    objective: See `agentrl.algorithms.objective`.
    micro_batches: Parts that B is cut into; must divide it.
    temperature: Of the policy.
    mesh: Whose batch axes the rows of each micro-batch are split over; None on one device.
    estimated: Whether batches come with advantages and returns, see `make_estimate`.
  Returns:
    Metrics are float32 scalars by name: the objective's, and 'grad_norm', 'applied' (1 or 0), 'log_prob_gap' and
    'log_prob_gap_max' (nats, between these log-probs and the recorded ones).
  """

  evaluate = meshes.under(mesh, transformer.evaluate)

  def loss(params, micro: LossBatch, masks: jax.Array | None):
    got = evaluate(params, config, micro.tokens, micro.positions, micro.segment_ids, temperature=temperature,
                   with_entropy=objective.needs_entropies, drawn_from=_drawn_from(masks, micro.mask_ids))
    value, metrics = objective.loss(objectives.PolicyOutputs(*got), micro)
    return value, _with_agreement(metrics, got.log_probs, micro)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: LearnerState, batch: TrainBatch, used: jax.Array):
    grad_fn = jax.value_and_grad(functools.partial(loss, masks=batch.masks), has_aux=True)
    prepare = objective.weigh if estimated else objective.prepare
    parts = _spread(objectives.split_rows(prepare(batch, state.updates), micro_batches), mesh)
    if micro_batches == 1:
      total = grad_fn(state.params, _part(parts, 0))
    else:
      # From nothing rather than from part 0, so that the pass through the network is compiled once.
      nothing = _nothing(jax.eval_shape(grad_fn, state.params, jax.eval_shape(_part, parts, 0)))
      total = jax.lax.fori_loop(
          0, jnp.maximum(used, 1), lambda i, total: _sum_parts(total, grad_fn(state.params, _part(parts, i))), nothing)
    (value, metrics), grads = total
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    proposed = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), proposed, (state.params, state.opt_state))
    scalars = {**objectives.summarise(metrics), 'grad_norm': norm, 'applied': finite.astype(jnp.float32)}
    # As they came, so that the next update is the same program.
    params, opt_state = lay_out((params, opt_state), config, mesh)
    return state._replace(params=params, opt_state=opt_state, updates=state.updates + finite), scalars

  return update


def make_estimate(objective: Objective) -> Callable[..., Any]:
  """Returns a jitted `estimate(batches, step) -> [(advantages, returns)]`: of batches that were rolled out together.

  What an advantage takes from the whole of a step, such as a mean or a deviation, is then the same however many updates
  are made on it. The batches have one shape, and no group in common.
  """

  @jax.jit
  def estimate(batches: list[TrainBatch], step: jax.Array):
    rows, joint = batches[0].tokens.shape[0], _joined(batches)
    found = objective.estimate(joint._replace(step=step))
    of = lambda i: slice(i * rows, (i + 1) * rows)
    return [(found.advantages[:, of(i)], found.returns[of(i)]) for i in range(len(batches))]

  return estimate


def _joined(batches: list[TrainBatch]) -> TrainBatch:
  """Puts batches below each other; what counts from 0 in each of them goes on counting."""
  count, tokens = batches[0].weights.shape[0], batches[0].tokens.size
  shifted = []
  for i, batch in enumerate(batches):
    on = lambda x, by: jnp.where(jnp.asarray(x) >= 0, x + by, x)
    nodes = {name: on(batch.token_parts[name], i * tokens) for name in NODE_PARTS if name in batch.token_parts}
    shifted.append(batch._replace(
        trajectory_ids=on(batch.trajectory_ids, i * count), group_ids=batch.group_ids + i * count,
        token_parts={**batch.token_parts, **nodes}))
  join = lambda *x: jnp.concatenate(x) if jnp.ndim(x[0]) in (1, 2) else x[0]
  return jax.tree.map(join, *shifted)


def make_score(config: ModelConfig, *, micro_batches: int, temperature: float = 1.0,
               mesh: jax.sharding.Mesh | None = None) -> Callable[..., Any]:
  """Returns a jitted `score(params, batch, used) -> (log_probs, values)`, [B, T] float32 each.

  For the reference's log-probs, 0 outside the loss mask, and the values that advantages are computed from, zeros
  without a value head.

  Args:
    config: Of the policy.
    micro_batches: As for `make_update`.
    temperature: Of the policy.
    mesh: As for `make_update`.
  """

  evaluate = meshes.under(mesh, transformer.evaluate)

  @jax.jit
  def score(params: Params, batch: TrainBatch, used: jax.Array):
    fields = (batch.tokens, batch.positions, batch.segment_ids, batch.loss_mask, batch.mask_ids)
    rows, length = batch.tokens.shape
    parts = _spread(jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(rows // micro_batches, micro_batches, length), 0, 1), fields), mesh)

    def one(i, out):
      tokens, positions, segment_ids, mask, mask_ids = _part(parts, i)
      got = evaluate(params, config, tokens, positions, segment_ids, temperature=temperature,
                     drawn_from=_drawn_from(batch.masks, mask_ids))
      values = jnp.zeros_like(got.log_probs) if got.values is None else got.values
      new = jnp.where(mask, got.log_probs, 0.0), values
      return jax.tree.map(lambda o, n: jax.lax.dynamic_update_index_in_dim(o, n, i, 0), out, new)

    zeros = jnp.zeros(parts[0].shape, jnp.float32)
    out = jax.lax.fori_loop(0, used, one, (zeros, zeros))
    whole = lambda x: jnp.swapaxes(x, 0, 1).reshape(rows, length)
    return jax.tree.map(lambda x: meshes.lay_out_on(mesh, whole(x), ('batch', None)), out)

  return score


def put(batch: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Returns a batch on the mesh: planes [B, T] and [C, B, T] split by rows, all else, masks too, on every device.

  With several processes each sends its devices their rows; all must have packed the same batch.

  Args:
    batch: Of arrays of host or device.
    mesh: None leaves the batch as it is.
  Raises:
    RuntimeError: if the processes have different batches.
  """
  if mesh is None:
    return batch
  if exchange.count() > 1 and not exchange.same(_checksum(batch)):
    raise RuntimeError('the processes of this run have packed different batches: something between rollout and update '
                       'is not the same in all of them, such as the order of a set, the clock, or a random number '
                       'without a seed')

  def place(path, x):
    whole = (None,) * np.ndim(x)
    planes = {2: ('batch', None), 3: (None, 'batch', None)}
    axes = whole if jax.tree_util.keystr(path) == '.masks' else planes.get(np.ndim(x), whole)
    where = jax.sharding.NamedSharding(mesh, meshes.spec_of(axes, np.shape(x), mesh))
    if isinstance(x, jax.Array):
      return x if x.sharding.is_equivalent_to(where, x.ndim) else jax.device_put(x, where)
    return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])

  return jax.tree_util.tree_map_with_path(place, batch)


def _checksum(batch: Any) -> bytes:
  """Returns four bytes that tell host arrays apart."""
  crc = 0
  for x in jax.tree.leaves(batch):
    if not isinstance(x, jax.Array):
      crc = zlib.crc32(np.ascontiguousarray(x), crc)
  return crc.to_bytes(4, 'big')


def _drawn_from(masks: jax.Array | None, ids: jax.Array | None) -> transformer.DrawnFrom | None:
  return None if masks is None else transformer.DrawnFrom(masks, ids)


def _spread(parts: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Splits the rows, axis 1, of every leaf [micro-batches, rows, ...] over the mesh's batch axes."""
  return jax.tree.map(lambda x: meshes.lay_out_on(mesh, x, (None, 'batch') + (None,) * (x.ndim - 2)), parts)


def lay_out(tree: Any, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Any:
  """Splits every leaf whose path ends in a parameter's as that parameter is, and replicates the others."""
  if mesh is None:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, layout(tree, config, mesh))


def layout(tree: Any, config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
  """Returns the shardings that `lay_out` gives to a tree of arrays or shapes."""
  table = {jax.tree_util.keystr(path): axes for path, axes in jax.tree_util.tree_leaves_with_path(
      param_axes(config), is_leaf=lambda x: isinstance(x, tuple))}

  def of(path, x):
    ends = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
    axes = next((table[e] for e in ends if e in table), ())
    axes = axes if len(axes) == x.ndim else (None,) * x.ndim
    return jax.sharding.NamedSharding(mesh, meshes.spec_of(axes, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(of, tree)


def _part(parts: Any, index) -> Any:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), parts)


def _nothing(shapes):
  """Returns what `_sum_parts` adds to without changing it."""
  (value, metrics), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  maxima = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), metrics.maxima)
  return (value, metrics._replace(maxima=maxima)), grads


def _sum_parts(a, b):
  (value_a, metrics_a), grads_a = a
  (value_b, metrics_b), grads_b = b
  metrics = Metrics(jax.tree.map(jnp.add, metrics_a.sums, metrics_b.sums),
                    jax.tree.map(jnp.maximum, metrics_a.maxima, metrics_b.maxima))
  return (value_a + value_b, metrics), jax.tree.map(jnp.add, grads_a, grads_b)


def _with_agreement(metrics: Metrics, log_probs, micro: LossBatch) -> Metrics:
  """Adds how far the learner's log-probs are from those recorded at sampling."""
  gap = jnp.where(micro.loss_mask, jnp.abs(log_probs - micro.behaviour_log_probs), 0.0)
  count = jnp.sum(micro.loss_mask, dtype=jnp.float32)
  added = Metrics({**metrics.sums, 'log_prob_gap': (jnp.sum(gap), count)},
                  {**metrics.maxima, 'log_prob_gap_max': jnp.max(gap)})
  return jax.lax.stop_gradient(added)
