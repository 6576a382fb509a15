"""Every turn is a row with a context of its own, made of the question and a memory of what was found: AgentFlow."""

from __future__ import annotations

import dataclasses
from typing import Any

from agentrl.agents import base
from agentrl.agents.independent import Independent
from agentrl.agents.player import Player
from agentrl.core.types import Message, Turn
from agentrl.rollout.session import Session


@base.AGENTS.register('turn_rows')
class TurnRows(Independent):
  """A trained planner among frozen helpers: the executor, which is the environment, and a scribe, which is a rule.

  After each turn the scribe writes the calls made so far with their results, and nothing of what was thought, into a
  memory; the planner's next turn sees the question and the memory alone. A turn is a segment, and only its own tokens
  are trained on. Advantage 'turn_rows_z' takes the statistics of a group over all these rows.

  Source: AgentFlow (Flow-GRPO), code lupantech/AgentFlow.
  Deviation: the scribe is a rule where the paper has a frozen model; so are verifier and generator, which are left out:
    the planner gives the answer itself.
  """

  def __init__(self, environment: Any, template: Any, *, turns: int = 8, keep: int = 0):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      turns: Of a trajectory at most, and so its segments.
      keep: Turns that the memory holds, the latest; 0 for all.
    Raises:
      ValueError: if a number is out of range.
    """
    if turns < 1 or keep < 0:
      raise ValueError(f'turns={turns} must be at least 1 and keep={keep} not negative')
    super().__init__(environment, template)
    self._keep = keep
    self.max_segments = turns

  async def play(self, player: Player, session: Session, episode: Any):
    """Shows the task and the memory anew for each turn."""
    session.limits = dataclasses.replace(session.limits, turns=min(self.max_segments, session.limits.turns))
    memory: list[tuple[Message, ...]] = []
    while not session.finished:
      turn = await player.turn(session, episode)
      memory.append(self._entry(turn))
      if not session.finished and session.num_turns < self.max_segments:
        recent = memory[-self._keep:] if self._keep else memory
        messages = (*episode.messages, *(message for entry in recent for message in entry))
        session.replace(self._template.render(messages, add_generation_prompt=True))

  def _entry(self, turn: Turn) -> tuple[Message, ...]:
    """Returns what the scribe writes of a turn; of a call that could not be written only what came of it."""
    entry = []
    for call, result in zip(turn.calls, turn.results):
      if call.error is None:
        entry.append(Message('assistant', self._environment.call_format.render(call)))
      entry.append(self._environment.result_message(call, result))
    return tuple(entry)
