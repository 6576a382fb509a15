"""A reward that asks right answers for economy and wrong ones for exploration."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards.shaping import tool_use


@base.SHAPINGS.register('steerable')
class Steerable:
  """Replaces the total; parts 'redundancy', 'new_searches' and 'new_queries' say what it was made of.

      right:  .1 format + max(1 - redundancy, .5)           redundancy = repeated calls / calls
      wrong:  .1 format + .2 min(1, new searches / 8) + .2 min(1, new queries / 16)

  A call is new unless an earlier one of the trajectory had its name and arguments.

  Source: RAPO, stage 2 (FractalAIResearchLabs/Fathom-DeepResearch).  Deviation: a model judges there whether a search
    or a query is redundant; here a repetition is one, which is our choice.
  Example:
    >>> shaping = Steerable(search_tools=('lookup',))
    >>> shaping.total(1.0, 1.0, 0.25, 0, 0), shaping.total(0.0, 1.0, 0.0, 4, 16)
    (0.85, 0.4)
  """

  names = ('redundancy', 'new_searches', 'new_queries', 'total')
  turn_names = ()

  def __init__(self, search_tools: Sequence[str], part: str = 'accuracy', searches: int = 8, queries: int = 16):
    """Binds the settings.

    Args:
      search_tools: Tools whose calls are searches; those of all others are queries.
      part: 1 for a right answer.
      searches: New searches that earn a wrong answer its full share.
      queries: New queries that do.
    """
    self._search_tools, self._part = tuple(search_tools), part
    self._searches, self._queries = searches, queries
    self.needs = ('format', part)

  def total(self, right: float, well_formed: float, redundancy: float, new_searches: int, new_queries: int) -> float:
    """Returns the reward."""
    if right >= 1:
      return 0.1 * well_formed + max(1.0 - redundancy, 0.5)
    exploration = min(1.0, new_searches / self._searches) + min(1.0, new_queries / self._queries)
    return 0.1 * well_formed + 0.2 * exploration

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the parts of each trajectory."""
    del iteration
    return [self._parts(t) for t in trajectories]

  def _parts(self, trajectory: types.Trajectory) -> dict[str, float]:
    repeated = tool_use.repeats(trajectory)
    names = [call.name for call, _ in tool_use.executed(trajectory)]
    redundancy = sum(repeated) / max(1, len(repeated))
    new = [name in self._search_tools for name, again in zip(names, repeated) if not again]
    searches, queries = sum(new), len(new) - sum(new)
    total = self.total(trajectory.rewards[self._part], trajectory.rewards['format'], redundancy, searches, queries)
    return {'redundancy': redundancy, 'new_searches': float(searches), 'new_queries': float(queries), 'total': total}
