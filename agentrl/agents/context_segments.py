"""The context is edited while the task goes on, by the policy or by a rule: Memory as Action."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from agentrl.agents import base
from agentrl.agents.independent import Independent
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Trajectory, Turn
from agentrl.rollout.session import Session


@base.AGENTS.register('context_segments')
class ContextSegments(Independent):
  """The plain program, with exchanges forgotten when the policy says so, or when the context has grown too long.

  An exchange is a turn and what answered it. The policy forgets by a call of the tool named `tool`, see
  `agentrl.tools.prune`: all exchanges but the latest `keep` go, and the call's own. The rule forgets the oldest until
  the context fits the budget. Each edit begins a segment: the tokens kept are taken over as they are, and only what is
  drawn afterwards is trained on there, so that every drawn token is trained on once.

  Of a group's segments `trained` at most are in the loss, drawn at random; the others count in the group's baseline.

  Source: DCPO (Memory as Action), from a page of notes: 16 segments of 8 trajectories.
  Deviation: the rule is ours, for policies that do not know the tool.
  """

  def __init__(self, environment: Any, template: Any, *, tool: str = '', keep: int = 1, budget: int = 0,
               max_segments: int = 8, trained: int = 16, seed: int = 0):
    """Makes the agent.

    Args:
      environment: Where it acts; it must have the tool.
      template: Renders messages.
      tool: Name of the tool by which the policy forgets; '' for none.
      keep: Exchanges that the policy's edit leaves.
      budget: Tokens above which the rule forgets; 0 for no rule.
      max_segments: Of a trajectory; there is no edit beyond.
      trained: Segments of a group in the loss at most; 0 for all.
      seed: Of their choice.
    Raises:
      ValueError: if a number is out of range, or nothing would ever be forgotten.
    """
    if min(keep, budget, trained) < 0 or max_segments < 2:
      raise ValueError(f'keep={keep}, budget={budget} and trained={trained} must not be negative and '
                       f'max_segments={max_segments} at least 2')
    if not tool and not budget:
      raise ValueError("with tool='' and budget=0 nothing is ever forgotten; set one of them, or take agent 'react'")
    super().__init__(environment, template)
    self._tool, self._keep, self._budget = tool, keep, budget
    self.max_segments = max_segments
    self._trained, self._seed = trained, seed

  async def play(self, player: Player, session: Session, episode: Any):
    """Forgets after each turn what is to be forgotten."""
    prompt, exchanges = session.context.tail(0).tolist(), []
    while not session.finished:
      turn = await player.turn(session, episode)
      exchanges.append(session.context.tail(turn.start).tolist())
      kept = self._kept(turn, len(prompt), exchanges)
      room = len(session.trajectory.segments) < self.max_segments
      if not session.finished and room and len(kept) < len(exchanges):
        exchanges = kept
        session.replace([*prompt, *(token for exchange in exchanges for token in exchange)])

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Draws the segments of each group that are trained on, among those in which something was drawn."""
    groups: dict[str, list[tuple[Trajectory, int]]] = {}
    for t in trajectories:
      drawn = [(t, i) for i, segment in enumerate(t.segments) if segment.sampled.any()]
      groups.setdefault(t.group_id, []).extend(drawn)
    for group_id, group in groups.items():
      if not 0 < self._trained < len(group):
        continue
      rng = np.random.default_rng([self._seed, iteration.step, *group_id.encode()])
      chosen = sorted(rng.choice(len(group), self._trained, replace=False))
      for t, _ in group:
        t.loss_segments = ()
      for k in chosen:
        t, i = group[k]
        t.loss_segments = (*t.loss_segments, i)

  def _kept(self, turn: Turn, prompt: int, exchanges: list[list[int]]) -> list[list[int]]:
    """Returns the exchanges that stay after a turn."""
    if self._tool and any(call.name == self._tool and call.error is None for call in turn.calls):
      before = exchanges[:-1]
      exchanges = before[len(before) - min(self._keep, len(before)):]
    while self._budget and len(exchanges) > 1 and prompt + sum(map(len, exchanges)) > self._budget:
      exchanges = exchanges[1:]
    return exchanges
