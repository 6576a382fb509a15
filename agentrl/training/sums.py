"""Updates by losses that read sums over whole trajectories: pairs of them, or regression of what one adds up to.

Such a loss ties tokens together that may lie in different rows, micro-batches and devices. By the chain rule its
gradient is nevertheless a plain sum over tokens,

    s_n = sum_{t in n} f(t);   grad L(s) = sum_t (dL / ds_n(t)) grad f(t)

so the sums are computed first, with no gradient, and the gradient then micro-batch by micro-batch: packing, order and
splits change nothing. With one micro-batch the first pass is the forward half of the second and costs nothing; nor does
it where all that a term of the loss reads lies in one micro-batch, as both of a pair may.

Axes: B rows, T tokens, N trajectories.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agentrl.algorithms.preference import sums_of_trajectories
from agentrl.core.types import TrainBatch
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.sharding import mesh as meshes

Outputs = Callable[[Any, dict[str, Any]], jax.Array]


class Trained(NamedTuple):
  """What is trained: a tree of parameters, its optimiser's state, and updates applied, an int32 scalar."""

  params: Any
  opt_state: Any
  updates: Any


def log_probs_of(config: ModelConfig, temperature: float = 1.0) -> Outputs:
  """Returns the function that gives [rows, T] log-probs of the tokens, nats."""
  def outputs(params, planes):
    return transformer.evaluate(params, config, planes['tokens'], planes['positions'], planes['segment_ids'],
                                temperature=temperature).log_probs
  return outputs


def planes_of(batch: TrainBatch) -> dict[str, Any]:
  """Returns every [B, T] array of a batch by name."""
  names = ('tokens', 'positions', 'segment_ids', 'trajectory_ids', 'turn_ids', 'loss_mask', 'behaviour_log_probs',
           'reference_log_probs')
  return {**{name: batch._asdict()[name] for name in names}, **batch.token_parts}


def make_gradient(outputs: Outputs, *, micro_batches: int, mesh: jax.sharding.Mesh | None = None,
                  together: bool = False) -> Callable[..., Any]:
  """Returns `gradient(params, planes, count, used, loss) -> ((value, aux), grads)`, to be used inside a jit.

  Args:
    outputs: (params, planes of a micro-batch) -> [rows, T] float32; what is outside the loss mask is not read.
    micro_batches: Parts that B is cut into, as for `step.make_update`; must divide it.
    mesh: Whose batch axes the rows of each micro-batch are split over; None on one device.
    together: Whether the loss is a sum of terms each of which reads the sums of one micro-batch alone.
  Returns:
    A function of the parameters, the planes of `planes_of`, N, the number of micro-batches that hold anything (at
    least 1, traced), and `loss`, which takes the sums [N] and returns a scalar and anything else.
  """
  outputs = meshes.under(mesh, outputs)

  def gradient(params, planes, count, used, loss):
    parts = _cut(planes, micro_batches, mesh)

    def sums(params, index):
      part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), parts)
      values = jnp.where(part['loss_mask'], outputs(params, part), 0.0)
      values, ids = replicated((values, part['trajectory_ids']), mesh)
      return sums_of_trajectories(values, ids, count)

    if micro_batches == 1:
      totals, pull = jax.vjp(lambda p: sums(p, 0), params)
      result, weights = jax.value_and_grad(loss, has_aux=True)(totals)
      return result, pull(weights)[0]
    nothing, zeros = jnp.zeros(count, jnp.float32), jax.tree.map(jnp.zeros_like, params)
    if together:
      def add(i, found):
        own, pull = jax.vjp(lambda p: sums(p, i), params)
        # What it says of trajectories that are elsewhere meets none of their tokens.
        weights, _ = jax.grad(loss, has_aux=True)(own)
        return found[0] + own, jax.tree.map(jnp.add, found[1], pull(weights)[0])

      totals, grads = jax.lax.fori_loop(0, used, add, (nothing, zeros))
      return loss(totals), grads
    totals = jax.lax.fori_loop(0, used, lambda i, total: total + sums(params, i), nothing)
    result, weights = jax.value_and_grad(loss, has_aux=True)(totals)
    weighted = jax.grad(lambda p, i: jnp.vdot(weights, sums(p, i)))
    grads = jax.lax.fori_loop(0, used, lambda i, g: jax.tree.map(jnp.add, g, weighted(params, i)), zeros)
    return result, grads

  return gradient


def apply_gradient(trained: Trained, optimizer: optax.GradientTransformation, value: jax.Array,
                   grads: Any) -> tuple[Trained, dict[str, jax.Array]]:
  """Returns what the optimiser makes of a gradient, and 'loss', 'grad_norm' and 'applied' (1 or 0).

  One that is not finite is not applied.
  """
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, trained.opt_state, trained.params)
  proposed = optax.apply_updates(trained.params, updates), opt_state
  params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed,
                                   (trained.params, trained.opt_state))
  return Trained(params, opt_state, trained.updates + finite), {
      'loss': value, 'grad_norm': norm, 'applied': finite.astype(jnp.float32)}


def make_outputs(outputs: Outputs, *, micro_batches: int, mesh: jax.sharding.Mesh | None = None) -> Callable[..., Any]:
  """Returns `(params, planes, used) -> [B, T] float32`, 0 outside the loss mask, to be used inside a jit."""
  outputs = meshes.under(mesh, outputs)

  def evaluate(params, planes, used):
    parts = _cut(planes, micro_batches, mesh)

    def one(i, out):
      part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), parts)
      values = jnp.where(part['loss_mask'], outputs(params, part), 0.0)
      return jax.lax.dynamic_update_index_in_dim(out, values, i, 0)

    out = jax.lax.fori_loop(0, used, one, jnp.zeros(parts['tokens'].shape, jnp.float32))
    return meshes.lay_out_on(mesh, jnp.swapaxes(out, 0, 1).reshape(planes['tokens'].shape), ('batch', None))

  return evaluate


def replicated(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Returns arrays of which every device has a whole copy.

  Left to the compiler, each of the sums over a few thousand tokens would be a collective of its own.
  """
  return jax.tree.map(lambda x: meshes.lay_out_on(mesh, jnp.asarray(x), (None,) * jnp.ndim(x)), tree)


def _cut(planes: dict[str, Any], micro_batches: int, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
  """Cuts planes into micro-batches: micro-batch m is rows m, m + micro_batches, ..., see `packing.pack`."""
  def cut(x):
    x = jnp.asarray(x)
    x = jnp.swapaxes(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 0, 1)
    return meshes.lay_out_on(mesh, x, (None, 'batch') + (None,) * (x.ndim - 2))

  return {name: cut(x) for name, x in planes.items()}
