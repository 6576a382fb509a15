"""Samples that are branched after the fact, where they were least certain."""

from __future__ import annotations

from typing import Any

import numpy as np

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Task, Turn
from agentrl.rollout.session import Session, TrajectoryEnded

CHOICES = ('entropy', 'random')


@base.AGENTS.register('branch_back')
class BranchBack(base.Agent):
  """Plays some samples to their end, then goes back to `steps` turns of each and plays `branches` others from there.

  A sample without turns enough has fewer branches, so a group ends with its size at most. What a branch shares with its
  sample is left out of its loss, where the loss is of single trajectories.

  Source: Tool-Light, code asilverlight/Tool-Light and a page: the top 3 turns by the mean entropy of their first 10 to 50
  tokens, 3 branches each, beside 10 plain samples.  Deviation: numbers are arguments; ties take the earlier turn.
  """

  def __init__(self, environment: Any, template: Any, *, samples: int = 1, steps: int = 3, branches: int = 3,
               choose: str = 'entropy', tokens: int = 10):
    """Binds the settings.

    Args:
      environment: Where it acts.
      template: Renders messages.
      samples: Of a group that are branched; the rest of the group is plain.
      steps: Turns that a sample is branched at.
      branches: At each of them.
      choose: 'entropy' for the turns whose first tokens were least certain, or 'random'.
      tokens: First tokens of a turn whose mean entropy counts.
    Raises:
      ValueError: if a setting is out of range.
    """
    if choose not in CHOICES:
      raise ValueError(f'choose={choose!r} of branch_back is none of {", ".join(CHOICES)}')
    if min(samples, steps, branches, tokens) < 1:
      raise ValueError(f'samples={samples}, steps={steps}, branches={branches} and tokens={tokens} of branch_back must '
                       'be at least 1')
    self._environment, self._template = environment, template
    self._samples, self._steps, self._branches = samples, steps, branches
    self._choose, self._tokens = choose, tokens

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size.

    Raises:
      ValueError: if the branched samples alone are more.
    """
    needed = self._samples * (1 + self._steps * self._branches)
    if group_size < needed:
      raise ValueError(f'{self._samples} samples with {self._steps} x {self._branches} branches each are {needed} '
                       f'trajectories and cannot go with a group size of {group_size}; raise it, or branch less')
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns the branched samples' programs, then the plain ones'."""
    del iteration
    plain = group_size - self._samples * (1 + self._steps * self._branches)
    player = Player(self._environment, self._template, task)
    return [self._program(player, k < self._samples) for k in range(self._samples + plain)]

  def _program(self, player: Player, branched: bool) -> base.Program:
    async def program(session: Session):
      places: list[tuple[Session, Any]] = []
      ended = None
      episode = await player.begin(session)
      try:
        while not session.finished:
          if branched:
            [stem] = session.fork(1)
            places.append((stem, await player.ask(episode.snapshot())))
          await player.turn(session, episode)
      except TrajectoryEnded as e:  # It may be branched all the same.
        ended = e
      finally:
        await episode.close()
      for k in self._chosen(session) if branched else ():
        stem, snapshot = places[k]
        for fork in stem.fork(self._branches):
          fork.trajectory.loss_from = len(fork.context)
          session.engine.adopt(fork, self._branch(player, await player.restore(snapshot)))
      if ended:
        raise ended
    return program

  def _branch(self, player: Player, episode: Any) -> base.Program:
    async def program(session: Session):
      try:
        await player.play(session, episode)
      finally:
        await episode.close()
    return program

  def _chosen(self, session: Session) -> list[int]:
    """Returns the indices of the turns to go back to, in order."""
    turns = session.trajectory.turns
    if self._choose == 'random':
      scores = np.random.default_rng(session.seed).random(len(turns))
    else:
      scores = np.array([self._entropy(session, turn) for turn in turns])
    return sorted(np.argsort(-scores, kind='stable')[:self._steps].tolist())

  def _entropy(self, session: Session, turn: Turn) -> float:
    first = session.trajectory.segments[turn.segment].entropies[turn.start:turn.end][:self._tokens]
    return float(np.mean(first)) if len(first) else 0.0
