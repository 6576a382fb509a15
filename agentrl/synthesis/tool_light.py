"""Tool-Light's criteria: what is right with few calls first, what is right at all on hard questions later."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Trajectory
from agentrl.synthesis import pairs


@pairs.MINERS.register('tool_light')
class ToolLight:
  """Pairs by two criteria, one after the other over the rounds of the stage.

  Round 1: the positive is the right trajectory with the fewest calls, of those the one of lowest entropy; the negative
  is a wrong one with more calls. Groups without branches (plain samples): the shortest right one against the longest
  wrong one that is longer. Hard and easy questions are kept 2:1.
  Round 2, on hard questions only: the longest right trajectory against the shortest wrong one.

  A question is hard where fewer than `hard_below` of its samples are right, and round 2 begins at `second_round` of the
  stage's steps: our choices, the source trains two separate rounds and sorts questions beforehand.

  Source: Tool-Light, code asilverlight/Tool-Light and a page about it, which give the criteria.
  """

  def __init__(self, part: str = 'success', hard_below: float = 0.5, hard_to_easy: float = 2.0,
               second_round: float = 0.5):
    """Binds the settings.

    Args:
      part: Reward part, 1 for a right answer.
      hard_below: Share of right samples.
      hard_to_easy: Most easy questions are 1 / this of the hard ones; 0 keeps all.
      second_round: Share of the steps after which the second criterion holds; 1 for never.
    Raises:
      ValueError: if a setting is out of range.
    """
    if not (0.0 <= hard_below <= 1.0 and 0.0 <= second_round <= 1.0 and hard_to_easy >= 0.0):
      raise ValueError(f'hard_below={hard_below} and second_round={second_round} of tool_light must lie in [0, 1], '
                       f'hard_to_easy={hard_to_easy} must not be negative')
    self.needs = (part, 'calls')
    self._hard_below, self._hard_to_easy, self._second_round = hard_below, hard_to_easy, second_round

  def __call__(self, trajectories: Sequence[Trajectory], rng: np.random.Generator,
               iteration: Iteration) -> list[pairs.Pair]:
    """Returns one pair a group at most."""
    second = iteration.step >= self._second_round * iteration.steps
    hard, easy = [], []
    for group in pairs.groups_of(trajectories):
      right = [t for t in group if t.rewards[self.needs[0]] >= 1.0]
      wrong = [t for t in group if t.rewards[self.needs[0]] < 1.0]
      is_hard = len(right) < self._hard_below * len(group)
      pair = self._second(right, wrong) if second else self._first(right, wrong)
      if pair and (is_hard or not second):
        (hard if is_hard else easy).append(pair)
    if self._hard_to_easy and not second:
      room = int(np.ceil(len(hard) / self._hard_to_easy))
      easy = [easy[i] for i in sorted(rng.permutation(len(easy))[:room])]
    return hard + easy

  def _first(self, right: list[Trajectory], wrong: list[Trajectory]) -> pairs.Pair | None:
    if not right:
      return None
    if any(t.path for t in right + wrong):
      best = min(right, key=lambda t: (t.rewards['calls'], pairs.mean_entropy(t)))
      worse = [t for t in wrong if t.rewards['calls'] > best.rewards['calls']]
      worst = max(worse, key=lambda t: t.rewards['calls'], default=None)
    else:
      best = min(right, key=lambda t: t.num_sampled)
      worst = max((t for t in wrong if t.num_sampled > best.num_sampled), key=lambda t: t.num_sampled, default=None)
    return _pair(best, worst)

  def _second(self, right: list[Trajectory], wrong: list[Trajectory]) -> pairs.Pair | None:
    size = lambda t: t.num_sampled
    return _pair(max(right, key=size, default=None), min(wrong, key=size, default=None))


def _pair(chosen: Trajectory | None, rejected: Trajectory | None) -> pairs.Pair | None:
  if chosen is None or rejected is None:
    return None
  return pairs.Pair(pairs.Excerpt(chosen), pairs.Excerpt(rejected))
