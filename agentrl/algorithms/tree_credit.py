"""Credit in groups whose trajectories fork from each other: shared steps, and siblings.

Axes: B rows, T tokens, N trajectories. A node is a step of the group's tree, a turn and the
observation before it; trajectories that fork share the nodes before the fork. Reads the token parts
'node' and 'node_parent', see `training.packing.TOKEN_PARTS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import advantages, choices, credit, turns
from agentrl.algorithms.channel import Advantage, Estimate
from agentrl.core import masked

REACHES = ('any', 'mean')


class Visits(NamedTuple):
  """Each trajectory's way through the tree; [B, T] each.

  Attributes:
    nodes: int32. The token's node, from 0 to B T - 1; 0 for padding.
    start: bool. One token of each trajectory in each of its nodes, of trajectories in the loss.
    in_baseline: bool. Those of them whose trajectory counts in the baseline.
  """

  nodes: chex.Array
  start: chex.Array
  in_baseline: chex.Array


def find_visits(batch: Any, loss_mask: chex.Array, node_part: str = 'node') -> Visits:
  """Returns which trajectory visits which node.

  Steps of a trajectory that are themselves not in the loss count as visited, because another
  trajectory may train on them.

  Args:
    batch: A TrainBatch.
    loss_mask: [B, T] bool. Of the channel.
    node_part: Token part with the node's number.
  """
  n = batch.weights.shape[0]
  inside = jnp.where(loss_mask, batch.trajectory_ids, n).reshape(-1)
  trains = jax.ops.segment_max(jnp.ones_like(inside), inside, num_segments=n + 1)[:n] > 0
  live = credit.of_trajectory(trains, batch.trajectory_ids)
  edge = jnp.full_like(batch.turn_ids[:, :1], -2)
  before = [jnp.concatenate([edge, x[:, :-1]], axis=1) for x in (batch.turn_ids, batch.segment_ids)]
  start = live & ((batch.turn_ids != before[0]) | (batch.segment_ids != before[1]))
  nodes = jnp.where(live, batch.token_parts[node_part].astype(jnp.int32), -1)
  nodes = advantages.dense_groups(nodes.reshape(-1)).reshape(nodes.shape)
  return Visits(nodes, start, turns.counted(batch, start))


@choices.MAPS.register('prefix_mean')
def prefix_mean(batch: Any, advantages_: chex.Array, loss_mask: chex.Array, *,
                node_part: str = 'node') -> chex.Array:
  """Gives the tokens of a node the mean advantage of the trajectories that share it.

  For advantages of whole trajectories. On the policy's own samples, with every sharer's copy of the
  shared step in the loss and a mean over tokens, the gradient is that of the trajectories' own
  advantages; where only one copy is in the loss, this is the credit that all of them give it.

  Args:
    batch: A TrainBatch.
    advantages_: [B, T] float32; the same on all tokens of a trajectory.
    loss_mask: [B, T] bool.
    node_part: Token part with the node's number.
  Source: ARPO, hard attribution, code RUC-NLPIR/ARPO.  Deviation: none.
  """
  visits = find_visits(batch, loss_mask, node_part)
  n = batch.weights.shape[0]
  ids = jnp.where(loss_mask, batch.trajectory_ids, n).reshape(-1)
  own = [jax.ops.segment_sum(x.reshape(-1), ids, num_segments=n + 1)[:n]
         for x in (advantages_, loss_mask.astype(jnp.float32))]
  of_start = credit.of_trajectory(masked.safe_divide(*own), batch.trajectory_ids)
  mean = _node_mean(of_start, visits.start, visits.nodes)
  return jnp.where(loss_mask, mean[visits.nodes], 0.0)


@choices.ADVANTAGES.register('fork_z')
def fork_z(*, part: str = 'total', turn_part: str = '', turn_weight: float = 0.1,
           reach: str = 'any', ddof: int = 0, eps: float = 1e-6, node_part: str = 'node',
           node_parent_part: str = 'node_parent') -> Advantage:
  """Makes an estimator that compares each step with the other steps taken from the same place.

      V(node) = max (or mean) over trajectories through it of R  +  turn_weight r(node)
      A(node) = (V(node) - mean) / (std + eps)      over the children of one parent

  The first steps of a group are the children of its question. An only child gets 0.

  Args:
    part: Outcome R.
    turn_part: Reward part of turns r, such as whether calls were well-formed; '' for none.
    turn_weight: Of r; our choice, the source gives none.
    reach: 'any', the best that can be reached from the step, or 'mean'.
    ddof: Of the deviation.
    eps: Added to it.
    node_part: Token part with the step's number.
    node_parent_part: Token part with the number of the step before it.
  Raises:
    ValueError: if `reach` is unknown.
  Source: PORTool, from a page about it: weights and decay were not found.  Deviation: the weights.
  """
  if reach not in REACHES:
    raise ValueError(f'reach={reach!r} is none of {", ".join(REACHES)}')

  def estimate(batch, loss_mask):
    found, visits = turns.find(batch, loss_mask), find_visits(batch, loss_mask, node_part)
    shape, size = loss_mask.shape, loss_mask.size
    outcome = credit.of_trajectory(choices.reward_of(batch, part), batch.trajectory_ids)
    value = (_node_max if reach == 'any' else _node_mean)(outcome, visits.in_baseline, visits.nodes)
    if turn_part:
      own = turns.on_turns(batch.token_parts[turn_part], found)
      # The trajectory that trains on the step knows what it was worth.
      value += turn_weight * _node_mean(own, found.last, visits.nodes)
    parents = batch.token_parts[node_parent_part].astype(jnp.int32)
    # A question is the parent of its group's first steps.
    parents = turns.pairs(jnp.where(visits.start, turns.groups(batch), -1), parents)
    parent = _node_max(parents, visits.start, visits.nodes)
    counts = _node_max(visits.in_baseline.astype(jnp.int32), visits.start, visits.nodes) > 0
    every = jnp.where(counts, value, 0.0)
    z = advantages.group_z(every, jnp.maximum(parent, 0), counts, size, ddof=ddof, eps=eps)
    plane = jnp.where(counts, z, 0.0)[visits.nodes]
    chex.assert_shape(plane, shape)
    return Estimate(jnp.where(loss_mask, plane, 0.0))

  return Advantage('fork_z', estimate, level='token')


def _node_mean(x, marked, nodes):
  """Averages over the marked tokens of each node: [B T] float32."""
  ids = jnp.where(marked, nodes, nodes.size).reshape(-1)
  total, count = (jax.ops.segment_sum(y.reshape(-1), ids, num_segments=nodes.size + 1)[:-1]
                  for y in (jnp.where(marked, x, 0.0), marked.astype(jnp.float32)))
  return masked.safe_divide(total, count)


def _node_max(x, marked, nodes):
  """Takes the largest of the marked tokens of each node: [B T], the lowest number where none is."""
  ids = jnp.where(marked, nodes, nodes.size).reshape(-1)
  return jax.ops.segment_max(x.reshape(-1), ids, num_segments=nodes.size + 1)[:-1]
