"""Single steps that were better than others in the same place: pairs from the tree that a group makes."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Trajectory
from agentrl.synthesis import pairs

RULES = ('path', 'value')


@dataclasses.dataclass
class _Node:
  """A step: the same context and the same turn, in however many trajectories."""

  excerpt: pairs.Excerpt
  scores: list[float] = dataclasses.field(default_factory=list)

  @property
  def value(self) -> float:
    return float(np.mean(self.scores))


@pairs.MINERS.register('step_pairs')
class StepPairs:
  """Pairs the turns that follow one context; the loss is on that turn alone.

  Trajectories of a group whose tokens agree up to a turn meet in one node, whether they were forked or came to the same
  context by themselves. The score of a node is the mean of a reward part over the trajectories through it.

  - 'path': the chosen lies on the path of a full success, the rejected is a sibling through which nothing succeeded
    (TP-LLaMA, on depth-first search trees; recalled). Every step of every success gives such pairs.
  - 'value': the best against the worst sibling, by their scores and only where these differ by `min_gap` and are
    means of `min_visits` trajectories: the chance of success from there on, estimated by sampling (Step-DPO finds the
    first wrong step by other means and regenerates it; recalled).
  """

  def __init__(self, part: str = 'success', rule: str = 'path', per_group: int = 8, min_gap: float = 0.5,
               min_visits: int = 1):
    """Binds the settings.

    Args:
      part: Reward part, 1 for a full success.
      rule: 'path' or 'value'.
      per_group: Most pairs of a group; drawn at random where there are more.
      min_gap: See 'value'.
      min_visits: See 'value'.
    Raises:
      ValueError: if a setting is out of range.
    """
    if rule not in RULES:
      raise ValueError(f'rule={rule!r} of step_pairs is none of {", ".join(RULES)}')
    if per_group < 1 or min_visits < 1 or min_gap <= 0:
      raise ValueError(f'per_group={per_group} and min_visits={min_visits} must be at least 1, min_gap={min_gap} '
                       'above 0')
    self.needs = (part,)
    self._rule, self._per_group, self._min_gap, self._min_visits = rule, per_group, min_gap, min_visits

  def __call__(self, trajectories: Sequence[Trajectory], rng: np.random.Generator,
               iteration: Iteration) -> list[pairs.Pair]:
    """Returns the pairs."""
    del iteration
    out = []
    for group in pairs.groups_of(trajectories):
      found = [pair for siblings in self._tree(group) for pair in self._of_place(siblings)]
      kept = sorted(rng.permutation(len(found))[:self._per_group])
      out += [found[i] for i in kept]
    return out

  def _tree(self, group: list[Trajectory]) -> list[list[_Node]]:
    """Returns the nodes that follow each context, in order of first occurrence."""
    (part,) = self.needs
    places: dict[bytes, dict[bytes, _Node]] = {}
    for t in group:
      tokens = t.segments[0].tokens
      for turn in t.turns:
        if turn.end > turn.start:
          siblings = places.setdefault(tokens[:turn.start].tobytes(), {})
          node = siblings.setdefault(tokens[turn.start:turn.end].tobytes(),
                                     _Node(pairs.Excerpt(t, turn.start, turn.end)))
          node.scores.append(t.rewards[part])
    return [list(siblings.values()) for siblings in places.values()]

  def _of_place(self, siblings: list[_Node]) -> list[pairs.Pair]:
    if self._rule == 'path':
      good = [n for n in siblings if max(n.scores) >= 1.0]
      bad = [n for n in siblings if max(n.scores) < 1.0]
      return [pairs.Pair(g.excerpt, b.excerpt) for g in good for b in bad]
    seen = [n for n in siblings if len(n.scores) >= self._min_visits]
    if not seen:
      return []
    best, worst = max(seen, key=lambda n: n.value), min(seen, key=lambda n: n.value)
    gap = best.value - worst.value
    return [pairs.Pair(best.excerpt, worst.excerpt)] if gap >= self._min_gap else []
