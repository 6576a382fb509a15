"""Turns whose call failed are replaced by the turn that mended it, so that no error stays in the row: CLEANER."""

from __future__ import annotations

import difflib
from typing import Any, Sequence

from agentrl.agents import base, rounds
from agentrl.agents.independent import Independent
from agentrl.agents.player import Player, call_text, failed
from agentrl.core.types import ToolCall, Turn
from agentrl.rollout.session import Mark, Session


def similarity(old: Sequence[ToolCall], new: Sequence[ToolCall]) -> float:
  """Returns how alike two turns' calls are, from 0 to 1.

  Example:
    >>> one = [ToolCall('lookup', {'fact': 'F4'})]
    >>> similarity(one, one), similarity(one, [ToolCall('noise', {})]) < .5
    (1.0, True)
  """
  texts = [' '.join(map(call_text, calls)) for calls in (old, new)]
  return difflib.SequenceMatcher(None, *texts, autojunk=False).ratio()


@base.AGENTS.register('rollback_purify')
class RollbackPurify(Independent):
  """The plain program, except that a failed call is answered by its error, retried, and then never was.

  When a retry succeeds, the row is rolled back to before the failed turn. If the calls are alike, the failed turn's
  thought is kept and its call replaced; else the whole turn is. What is spliced was drawn elsewhere: its log-probs are
  unknown until the learner computes them. A retry without a call leaves the row as it is and ends purification there;
  so do retries that all fail, for that error.

  Source: CLEANER (SAAR), code Tianshi-Xu/Open-CLEANER tool_agent_loop.py: 3 retries, similarity 0.5, probability 1 for
    4 B and 0.7 for 7 B parameters.
  Deviation: the draw is one a row (our choice; the source is silent on its unit). The tools keep the state that the
    failed calls left behind.
  """

  needs_recompute = True

  def __init__(self, environment: Any, template: Any, *, retries: int = 3, alike: float = 0.5,
               probability: float = 1.0):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      retries: Turns that may mend an error.
      alike: Similarity from which on the thought is kept.
      probability: Share of rows that are purified.
    Raises:
      ValueError: if a number is out of range.
    """
    if retries < 1 or not 0.0 <= probability <= 1.0 or not 0.0 <= alike <= 1.0:
      raise ValueError(f'retries={retries} must be at least 1, and probability={probability} and alike={alike} '
                       'in [0, 1]')
    super().__init__(environment, template)
    self._retries, self._alike, self._probability = retries, alike, probability

  async def play(self, player: Player, session: Session, episode: Any):
    """Mends failed turns as they come."""
    purify = rounds.uniform(session) < self._probability
    while not session.finished:
      mark = session.mark()
      turn = await player.turn(session, episode)
      if purify and failed(turn) and not session.finished:
        purify = await self._mend(player, session, episode, mark, turn)

  async def _mend(self, player: Player, session: Session, episode: Any, mark: Mark, turn: Turn) -> bool:
    """Lets the policy retry, and splices what succeeds; returns whether to purify further errors."""
    thought = session.context.tokens[turn.start:player.find_call(session, turn)]
    for _ in range(self._retries):
      again = await player.turn(session, episode)
      if not again.calls:
        return False
      if session.finished:
        return True
      if not failed(again):
        words, shown = session.context.tokens[again.start:again.end], session.context.tail(again.end)
        if similarity(turn.calls, again.calls) >= self._alike:
          words = [*thought, *session.context.tokens[player.find_call(session, again):again.end]]
        spliced = session.revise(mark, words)
        session.observe(spliced, again.calls, again.results)
        session.append(shown)
        return True
    return True
