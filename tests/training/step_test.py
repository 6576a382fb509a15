"""Tests of what several updates of one step have in common."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from agentrl.algorithms import make
from agentrl.algorithms.examples import example_batch
from agentrl.training.step import make_estimate

pytestmark = pytest.mark.usefixtures('quick_compile')

SIZE, GROUPS = 4, 4
READS = ('node', 'node_parent', 's')
OBJECTIVES = {
    'whitened over tokens': make('ppo'),
    'whitened over trajectories': make('compose', channels={'a': {'maps': 'batch_z'}, 'b': {'maps': 'revive'}}),
    'compared within trees': make('compose', channels={'a': {'advantage': 'fork_z'}, 'b': {'maps': 'prefix_mean'}}),
    'whitened over turns': make('compose', channels={'a': {'advantage': {'name': 'turn_gae', 'turn_part': 's'}}}),
}


def _half(batch, which):
  """Half of the groups as a batch of its own, in which everything is numbered from 0."""
  count = SIZE * GROUPS // 2
  of = slice(which * count, (which + 1) * count)
  first_node = int(batch.token_parts['node'][of][0, 0])
  numbered = lambda x: np.where(x >= 0, x - first_node, x).astype(x.dtype)
  planes = {k: v[of] for k, v in batch._asdict().items() if isinstance(v, np.ndarray) and v.ndim}
  ids = planes['trajectory_ids']
  parts = {k: v[of] for k, v in batch.token_parts.items()}
  nodes = {k: numbered(parts[k]) for k in ('node', 'node_parent')}
  return batch._replace(**planes)._replace(
      trajectory_ids=np.where(ids >= 0, ids - which * count, ids).astype(np.int32),
      group_ids=(batch.group_ids[of] - which * GROUPS // 2).astype(np.int32),
      parts={k: v[of] for k, v in batch.parts.items()}, token_parts={**parts, **nodes})


@pytest.mark.parametrize('name', OBJECTIVES)
def test_batches_of_one_step_are_estimated_as_the_whole_of_it(name):
  objective = OBJECTIVES[name]
  whole, _ = example_batch(5, groups=GROUPS, group_size=SIZE, packed=False, spare=0, reads=READS)
  # One half has a group without signal.
  whole = whole._replace(rewards=np.where(np.arange(SIZE * GROUPS) < SIZE, np.float32(1), whole.rewards))
  halves = [_half(whole, 0), _half(whole, 1)]
  found = make_estimate(objective)(halves, np.int32(0))
  want = jax.jit(objective.estimate)(whole)
  np.testing.assert_allclose(np.concatenate([a for a, _ in found], axis=1), want.advantages, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.concatenate([r for _, r in found]), want.returns, rtol=1e-5, atol=1e-6)
  alone = np.concatenate([objective.estimate(half).advantages for half in halves], axis=1)
  # Trees and groups are whole in each half; what is whitened is not.
  assert np.allclose(alone, want.advantages, atol=1e-4) == (name == 'compared within trees')
