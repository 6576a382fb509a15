"""Credit in trees against loops over a tree drawn by hand, and ARPO's hard and soft attribution."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from agentrl.algorithms import choices, compose, make
from agentrl.algorithms.examples import example_batch
from agentrl.core.types import TrainBatch

# One question. Trajectories 0 and 1 share their first step, 2 took another; 3 asks another question.
#   question 0: node 0 -> 1 (trajectory 0), -> 2 (trajectory 1);  node 3 (trajectory 2)
#   question 1: node 7 (trajectory 3)
NODES = [[0, 1], [0, 2], [3], [7]]
PARENTS = [[-1, 0], [-1, 0], [-1], [-1]]
REWARDS = np.float32([1, 0, .5, 1])
TURN = 3  # tokens: one forced, two sampled


def _tree(rewards=REWARDS, shared_once=False, seed=0):
  """Returns the batch above, one trajectory a row."""
  rows, length, rng = len(NODES), 2 * TURN, np.random.default_rng(seed)
  planes = {k: np.full((rows, length), -1, np.int32) for k in ('turn_ids', 'trajectory_ids', 'node', 'node_parent')}
  mask, segments = np.zeros((rows, length), bool), np.zeros((rows, length), np.int32)
  reward = np.zeros((rows, length), np.float32)
  for i, nodes in enumerate(NODES):
    for k, node in enumerate(nodes):
      at = slice(k * TURN, (k + 1) * TURN)
      for name, value in (('turn_ids', k), ('trajectory_ids', i), ('node', node), ('node_parent', PARENTS[i][k])):
        planes[name][i, at] = value
      segments[i, at] = 1
      mask[i, k * TURN + 1:(k + 1) * TURN] = not (shared_once and i == 1 and k == 0)
      reward[i, (k + 1) * TURN - 1] = node
  parts = {name: planes.pop(name) for name in ('node', 'node_parent')}
  noise = lambda: np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
  behaviour = -np.abs(noise())
  return TrainBatch(
      tokens=np.zeros_like(segments), positions=np.zeros_like(segments), segment_ids=segments, loss_mask=mask,
      baseline_mask=np.ones(rows, bool), advantages=None, returns=None, behaviour_log_probs=behaviour,
      reference_log_probs=behaviour, values=noise(), group_ids=np.int32([0, 0, 0, 1]), weights=np.ones(rows, np.float32),
      rewards=np.float32(rewards), step=np.int32(0), token_parts={**parts, 'well': reward}, **planes)


def _per_node(plane, batch):
  """Returns the number that each (trajectory, node) has, the same on all its tokens in the loss."""
  out = {}
  for i, nodes in enumerate(NODES):
    for node in nodes:
      found = np.asarray(plane)[i][(batch.token_parts['node'][i] == node) & batch.loss_mask[i]]
      assert np.ptp(found) == 0 if found.size else True
      if found.size:
        out[i, node] = float(found[0])
  return out


def _advantage(batch, **options):
  estimator = choices.advantage('fork_z', **options)
  return _per_node(estimator.function(batch, batch.loss_mask).advantages, batch)


def test_siblings_are_compared_by_what_can_be_reached_from_them():
  # Node 0 reaches 1 (its best), node 3 reaches .5: z = +-1. Children of 0: 1 and 0. Node 7 is alone.
  want = {(0, 0): 1, (1, 0): 1, (2, 3): -1, (0, 1): 1, (1, 2): -1, (3, 7): 0}
  got = _advantage(_tree())
  assert got.keys() == want.keys()
  np.testing.assert_allclose(list(got.values()), [want[k] for k in got], atol=1e-4)


def test_means_of_what_is_reached_may_be_equal():
  # Node 0: mean of 1 and 0; node 3: .5. No difference, exactly.
  got = _advantage(_tree(), reach='mean')
  assert got[0, 0] == got[1, 0] == got[2, 3] == 0
  np.testing.assert_allclose([got[0, 1], got[1, 2]], [1, -1], atol=1e-4)


def test_a_steps_own_reward_is_added():
  # In this batch the part of node n is n: V = 1 + .5 * 0 and .5 + .5 * 3; children 1 + .5 and 0 + 1.
  got = _advantage(_tree(), turn_part='well', turn_weight=.5)
  np.testing.assert_allclose([got[0, 0], got[2, 3], got[0, 1], got[1, 2]], [-1, 1, 1, -1], atol=1e-4)


def test_a_shared_step_that_is_trained_once_is_judged_by_all_who_share_it():
  once = _tree(rewards=[0, 1, .5, 1], shared_once=True)
  # Trajectory 0 trains on the shared step; the success behind it is trajectory 1's.
  assert _advantage(once)[0, 0] == pytest.approx(1, abs=1e-4)


def test_a_trajectory_outside_the_baseline_reaches_nothing():
  batch = _tree()._replace(baseline_mask=np.array([False, True, True, True]))
  got = _advantage(batch)
  # Node 0 is now worth what trajectory 1 got: 0 against .5.
  np.testing.assert_allclose([got[1, 0], got[2, 3], got[1, 2]], [-1, 1, 0], atol=1e-4)


def test_sharers_share_the_mean_of_their_advantages():
  batch = _tree()
  made = make('compose', channels={'p': {'advantage': 'center', 'maps': 'prefix_mean'}})
  # Centred: .5, -.5, 0; node 0 has the mean of the first two.
  got = _per_node(made.estimate(batch).advantages[0], batch)
  np.testing.assert_allclose([got[0, 0], got[1, 0], got[0, 1], got[1, 2], got[2, 3]], [0, 0, .5, -.5, 0], atol=1e-6)
  trunk = _per_node(made.estimate(_tree(shared_once=True)).advantages[0], _tree(shared_once=True))
  np.testing.assert_allclose([trunk[0, 0], trunk[0, 1], trunk[1, 2]], [0, .5, -.5], atol=1e-6)


def _logit_gradient(made, batch, log_probs):
  """Of the loss, by one number per token of the tree: copies of a shared token are one variable."""
  outputs = example_batch()[1]._replace(log_probs=log_probs, entropies=None, values=None)
  prepared = made.prepare(batch)
  gradient = np.asarray(jax.grad(lambda l: made.loss(outputs._replace(log_probs=l), prepared)[0])(log_probs))
  total = {}
  for i, t in np.argwhere(batch.loss_mask):
    key = batch.token_parts['node'][i, t], t
    total[key] = total.get(key, 0) + gradient[i, t]
  return np.array([total[k] for k in sorted(total)])


@pytest.mark.parametrize('aggregation, equal', [('tok_mean', True), ('seq_mean_tok_mean', False)])
def test_hard_and_soft_attribution_agree_on_policy_under_a_token_mean(aggregation, equal):
  # With ratio 1 the gradient is linear in A, and the copies of a token share it, so that their mean is as good as
  # each. A mean within trajectories weighs the copies apart.
  batch = _tree(rewards=[1, 0, .3, 1])
  # Make trajectory 1 longer, so that the two means differ: its last turn counts with one token more.
  longer = batch.loss_mask.copy()
  longer[1, TURN] = True
  batch = batch._replace(loss_mask=longer)
  soft, hard = (_logit_gradient(make('compose', channels={'p': {'advantage': 'center', 'maps': maps}},
                                     aggregation=aggregation), batch, batch.behaviour_log_probs)
                for maps in ((), ('prefix_mean',)))
  assert np.allclose(soft, hard, atol=1e-6) == equal


def test_hard_and_soft_attribution_differ_once_a_clip_acts():
  batch = _tree(rewards=[1, 0, .3, 1])
  far = np.where(batch.loss_mask, batch.behaviour_log_probs + 1, 0).astype(np.float32)
  soft, hard = (_logit_gradient(make('compose', channels={'p': {'advantage': 'center', 'maps': maps}}), batch, far)
                for maps in ((), ('prefix_mean',)))
  assert not np.allclose(soft, hard, atol=1e-6)


def test_advantages_of_tokens_cannot_be_shared_between_trajectories():
  with pytest.raises(ValueError, match="'prefix_mean'.*'gae'.*take advantage 'z'"):
    make('compose', channels={'p': {'advantage': 'gae', 'maps': 'prefix_mean'}})


def test_an_unknown_reach_is_refused():
  with pytest.raises(ValueError, match='reach'):
    compose.compose(channels={'p': {'advantage': {'name': 'fork_z', 'reach': 'all'}}})
