"""Rollouts that begin behind a stored prefix of a success, which grows shorter as they succeed: IPA."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Boundary, Iteration, Status, Task, Trajectory
from agentrl.rollout.session import Session, TrajectoryEnded


@base.AGENTS.register('prefix_init')
class PrefixInit(base.Agent):
  """Samples plainly until a question was solved; from then on begins its rollouts within that solution.

  The turns before the starting point are put into the context, not to be trained on, and replayed to the environment,
  which answers anew. At first only the last turn is left to sample. When the share of successes of a group reaches
  `advance`, the starting point moves one turn back, down to the question itself. A group begins at one point, so that
  its rewards compare.

  The memory holds the solutions' turns; with experience 'successes' what was solved is imitated as well.

  Source: IPA (ROME), section 3.2.4; code alibaba/ROLL.
  Deviation: the prefixes are the policy's own successes where the source has expert-like ones; the share that moves the
    starting point is our choice; the variant with several starting points at once is left out.
  """

  def __init__(self, environment: Any, template: Any, *, advance: float = 0.5, size: int = 512, part: str = 'success'):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      advance: Share of successes, in (0, 1].
      size: Questions whose solution is kept, the latest.
      part: Reward part above 0 for a success.
    Raises:
      ValueError: if a number is out of range.
    """
    if not 0.0 < advance <= 1.0 or size < 1:
      raise ValueError(f'advance={advance} must be in (0, 1] and size={size} at least 1')
    self._environment, self._template = environment, template
    self._advance, self._size, self._part = advance, size, part

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample, all from the same starting point."""
    player = Player(self._environment, self._template, task)
    solution = iteration.memory.get(task.id, {'turns': [], 'start': 0})
    prefix = [list(turn) for turn in solution['turns'][:solution['start']]]

    async def program(session: Session):
      episode = await player.begin(session)
      try:
        for tokens in prefix:
          await self._replay(player, session, episode, tokens)
        await player.play(session, episode)
      finally:
        await episode.close()

    return [program] * group_size

  async def _replay(self, player: Player, session: Session, episode: Any, tokens: Sequence[int]):
    """Puts a stored turn into the context, and what the environment answers to it."""
    session.append(tokens)
    step = await player.ask(episode.step(session.engine.tokenizer.decode(list(tokens)), 'stop'))
    if step.done:
      raise TrajectoryEnded(Status.ENVIRONMENT_FAILURE, Boundary.ENVIRONMENT, 'a stored prefix ended the episode')
    session.append(player.observation(step))

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Stores first solutions, and moves the starting points of groups that do well."""
    memory, groups = iteration.memory, {}
    for t in trajectories:
      groups.setdefault(t.task.id, []).append(t)
    for task_id, group in groups.items():
      solved = [t for t in group if t.rewards[self._part] > 0]
      if task_id in memory:
        if len(solved) >= self._advance * len(group):
          memory[task_id]['start'] = max(0, memory[task_id]['start'] - 1)
      elif solved:
        turns = _turns(min(solved, key=lambda t: (len(t.turns), t.sample, t.path)))
        memory[task_id] = {'turns': turns, 'start': len(turns) - 1}
    for task_id in list(memory)[:max(0, len(memory) - self._size)]:
      del memory[task_id]


def _turns(trajectory: Trajectory) -> list[list[int]]:
  """Returns the tokens of each turn."""
  tokens = [np.asarray(s.tokens) for s in trajectory.segments]
  return [tokens[turn.segment][turn.start:turn.end].tolist() for turn in trajectory.turns]
