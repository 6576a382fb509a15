"""Selectors that compare groups, or the samples of one: which questions, and which answers to them, teach the most.

Axes: N trajectories, G groups.
"""

from __future__ import annotations

import math

import numpy as np

from agentrl.algorithms.selectors import SELECTORS, Candidates, Selection, compares_groups, of_part

CHOICES = ('sampled', 'sorted')


@SELECTORS.register('top_std')
@compares_groups
def top_std(candidates: Candidates, rng: np.random.Generator, *, share: float = 0.75,
            part: str = 'total') -> Selection:
  """Keeps the groups whose rewards vary the most; a group of one is not compared, and stays.

  Args:
    candidates: Of a step.
    rng: Not used; of groups that vary alike the earlier are kept.
    share: Of the groups with several trajectories in the loss, in (0, 1]; their number is rounded up.
    part: Reward part that is compared.
  Raises:
    ValueError: if the share is out of range.
  Source: SPEAR, .75; RAGEN.  Deviation: none.
  Example:
    >>> n = Candidates(np.float32([1, 0, .5, .4]), np.int32([0, 0, 1, 1]), {}, np.ones(4, np.float32), np.ones(4, bool))
    >>> top_std(n, np.random.default_rng(0), share=.5).weights.tolist()
    [1.0, 1.0, 0.0, 0.0]
  """
  del rng
  _check_share('top_std', share)
  everyone = _groups(candidates)
  groups = {g: members for g, members in everyone.items() if len(members) > 1}
  spread = {g: float(np.std(of_part(candidates, part)[members])) for g, members in groups.items()}
  kept = sorted(groups, key=lambda g: -spread[g])[:math.ceil(share * len(groups))]
  kept += [g for g in everyone if g not in groups]
  return _only(candidates, np.isin(candidates.group_ids, kept))


@SELECTORS.register('roc_downsample')
@compares_groups
def roc_downsample(candidates: Candidates, rng: np.random.Generator, *, keep: int = 16, choose: str = 'sampled',
                   part: str = 'accuracy') -> Selection:
  """Keeps `keep` samples of a group: clean ones of the right, any of the wrong ones.

      penalty = failed calls / calls (0.5 without calls) + 1[no well-formed answer]

  Right and wrong are kept in proportion to how many there are, at least 2 of each where there are 2. 'sampled' draws
  the right without replacement, with chances proportional to 1 / (penalty + 1e-3), and the wrong uniformly; 'sorted'
  takes the right of least penalty and the first wrong ones. Groups of one kind only, or of fewer than `keep`, are left
  out. What is left out does not count in the baseline.

  Args:
    candidates: Of a step; reads the parts 'calls', 'failed_calls' and 'format'.
    rng: For 'sampled'.
    keep: Samples of a group that are left.
    choose: 'sampled' or 'sorted'.
    part: 1 for a right answer.
  Raises:
    ValueError: if `keep` is below 2, or `choose` unknown.
  Source: rStar2-Agent (GRPO-RoC); the paper samples, the release sorts. The constant in the chances is our choice.
    Deviation: our episodes end at the first answer, so that a format is right or wrong and its penalty 0 or 1.
  """
  if keep < 2 or choose not in CHOICES:
    raise ValueError(f"rl.select 'roc_downsample' needs keep of at least 2 and choose of {', '.join(CHOICES)}; "
                     f'got keep={keep}, choose={choose!r}')
  right = of_part(candidates, part) >= 1
  calls = of_part(candidates, 'calls')
  errors = np.where(calls > 0, of_part(candidates, 'failed_calls') / np.maximum(calls, 1), 0.5)
  penalty = errors + (of_part(candidates, 'format') == 0)
  kept = np.zeros(len(right), bool)
  for members in _groups(candidates).values():
    good, bad = members[right[members]], members[~right[members]]
    if len(members) < keep or not len(good) or not len(bad):
      continue
    number = _share_of(len(good), len(bad), keep)
    if choose == 'sorted':
      kept[good[np.argsort(penalty[good], kind='stable')[:number]]] = True
      kept[bad[:keep - number]] = True
    else:
      chances = 1 / (penalty[good] + 1e-3)
      kept[rng.choice(good, number, replace=False, p=chances / chances.sum())] = True
      kept[rng.choice(bad, keep - number, replace=False)] = True
  return Selection(np.where(kept, candidates.weights, np.float32(0)), candidates.baseline_mask & kept)


@SELECTORS.register('value_replace')
@compares_groups
def value_replace(candidates: Candidates, rng: np.random.Generator, *, threshold: float = 0.0,
                  part: str = 'total') -> Selection:
  """Puts groups of high value in the place of those of none; what is repeated has that weight.

      value = (largest reward - mean) * standard deviation

  As many groups as have a value of at most `threshold` are drawn, in proportion to it, from those above. A group drawn
  twice has weight 3. The map 'repeat_decay' divides its advantages by that again.

  Args:
    candidates: Of a step.
    rng: Draws the groups.
    threshold: Value up to which a group is replaced.
    part: Reward part that is compared.
  Raises:
    ValueError: if the threshold is negative.
  Source: VSPO, read on a secondary page; which groups are replaced was not seen.  Deviation: prompts are not asked
    again, their trajectories count more.
  Example:
    >>> n = Candidates(np.float32([1, 0, 1, 1]), np.int32([0, 0, 1, 1]), {}, np.ones(4, np.float32), np.ones(4, bool))
    >>> value_replace(n, np.random.default_rng(0)).weights.tolist()
    [2.0, 2.0, 0.0, 0.0]
  """
  if threshold < 0:
    raise ValueError(f"rl.select 'value_replace' with threshold={threshold}: groups of value 0 would stay in and could "
                     'not be drawn; take 0 or more')
  rewards, groups = of_part(candidates, part), _groups(candidates)
  value = {g: float((rewards[m].max() - rewards[m].mean()) * rewards[m].std()) for g, m in groups.items()}
  good = [g for g in groups if value[g] > threshold]
  weights = np.where(np.isin(candidates.group_ids, good), candidates.weights, np.float32(0))
  if good:
    chances = np.array([value[g] for g in good])
    drawn = rng.choice(good, len(groups) - len(good), p=chances / chances.sum())
    for g in drawn:
      weights[groups[g]] += candidates.weights[groups[g]]
  return Selection(weights, candidates.baseline_mask)


def _only(candidates: Candidates, kept: np.ndarray) -> Selection:
  """Takes all but the trajectories `kept` [N] bool out of the loss; the baselines stay."""
  return Selection(np.where(kept, candidates.weights, np.float32(0)), candidates.baseline_mask)


def _groups(candidates: Candidates) -> dict[int, np.ndarray]:
  """Returns the indices of each group's trajectories that are in the loss, in order."""
  alive = candidates.weights > 0
  return {int(g): np.flatnonzero(alive & (candidates.group_ids == g)) for g in np.unique(candidates.group_ids[alive])}


def _share_of(good: int, bad: int, keep: int) -> int:
  """Returns how many right ones are kept: in proportion, at least 2 of each kind where it has as many."""
  number = round(keep * good / (good + bad))
  low, high = max(min(2, good), keep - bad), min(good, keep - min(2, bad))
  return min(max(number, low), max(low, high))


def _check_share(name: str, share: float):
  if not 0.0 < share <= 1.0:
    raise ValueError(f'rl.select {name!r} keeps a share of the groups and cannot go with share={share}; take one in '
                     "(0, 1], or leave the selector out")
