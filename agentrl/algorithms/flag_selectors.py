"""Selectors that judge each trajectory by its own parts. Axes: N trajectories."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.algorithms.selectors import SELECTORS, Candidates, Selection, of_part


@SELECTORS.register('mask_flags')
def mask_flags(candidates: Candidates, rng: np.random.Generator, *, parts: Sequence[str], in_loss: bool = False,
               in_baseline: bool = True, min_share: float = 0.0) -> Selection:
  """Takes trajectories with a flag out of the loss, out of the baseline, or both.

  Args:
    candidates: Of a step.
    rng: Not used.
    parts: Names of parts that are above 0 where something is wrong, such as 'truncated' or those of the shaping 'flags'.
    in_loss: Whether flagged trajectories stay in the loss.
    in_baseline: Whether they go on counting in their group's baseline.
    min_share: Groups of which a smaller share is without a flag are left out as a whole.
  Raises:
    ValueError: if the flags would have no effect, or the share is out of range.
  Source: masks of truncated, void and repetitive trajectories: DAPO, SimpleTIR, SPEAR; they stay in the baseline there.
    A least share of 1/2: THOR, where they do not.  Deviation: none.
  Example:
    >>> n = Candidates(np.zeros(2, np.float32), np.int32([0, 0]), {'truncated': np.float32([1, 0])},
    ...                np.ones(2, np.float32), np.ones(2, bool))
    >>> mask_flags(n, np.random.default_rng(0), parts=['truncated'], in_baseline=False)[1].tolist()
    [False, True]
  """
  del rng
  if not parts or (in_loss and in_baseline):
    raise ValueError(f"rl.select 'mask_flags' with parts={tuple(parts)}, in_loss={in_loss} and in_baseline={in_baseline} "
                     'has no effect; name parts, and set one of the two to False')
  if not 0.0 <= min_share <= 1.0:
    raise ValueError(f"rl.select 'mask_flags' with min_share={min_share}: it must lie in [0, 1]")
  flagged = np.any([of_part(candidates, part) > 0 for part in parts], axis=0)
  weights = candidates.weights if in_loss else np.where(flagged, np.float32(0), candidates.weights)
  baseline = candidates.baseline_mask if in_baseline else candidates.baseline_mask & ~flagged
  for group in np.unique(candidates.group_ids):
    members = candidates.group_ids == group
    if np.mean(~flagged[members]) < min_share:
      weights = np.where(members, np.float32(0), weights)
  return Selection(weights, baseline)


@SELECTORS.register('env_noise_reject')
def env_noise_reject(candidates: Candidates, rng: np.random.Generator, *, part: str = 'noisy') -> Selection:
  """Takes trajectories that the environment spoiled out of the loss and out of the baseline.

  Args:
    candidates: Of a step.
    rng: Not used.
    part: Above 0 for a spoiled one; 'noisy' is the shaping 'flags'.
  Source: IPA (ROME).  Deviation: sampling the rejected again from where they began is the agent's, see 'prefix_init';
    `rl.max_generation_batches` asks further questions instead.
  """
  return mask_flags(candidates, rng, parts=(part,), in_baseline=False)


@SELECTORS.register('recompose')
def recompose(candidates: Candidates, rng: np.random.Generator, *, part: str = 'priority',
              replayed_part: str = 'replayed') -> Selection:
  """Keeps in the loss what has priority, and what comes back from a memory; baselines stay those of whole groups.

  Args:
    candidates: Of a step.
    rng: Not used.
    part: 1 for a trajectory with priority; see the shaping 'priority'.
    replayed_part: 1 for one from a memory.
  Source: RoRecomp, read on a secondary page.  Deviation: unknown.
  """
  del rng
  kept = (of_part(candidates, part) > 0) | (of_part(candidates, replayed_part) > 0)
  return Selection(np.where(kept, candidates.weights, np.float32(0)), candidates.baseline_mask)
