"""Rollouts that begin behind a stored prefix of a success, which grows shorter as they succeed: IPA."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Boundary, Iteration, Status, Task, Trajectory
from agentrl.rewards.shaping.flags import NOISE
from agentrl.rollout.session import Mark, Session, TrajectoryEnded

STARTS = ('sequential', 'parallel')


@base.AGENTS.register('prefix_init')
class PrefixInit(base.Agent):
  """Samples plainly until a question was solved; from then on begins its rollouts within that solution.

  The turns before the starting point are put into the context, not to be trained on, and replayed to the environment,
  which answers anew. 'sequential': at first only the last turn is left to sample; when the share of successes of a
  group reaches `advance`, the starting point moves one turn back, down to the question itself. 'parallel': its samples
  begin at several points of the solution at once, evenly spread from the question to the last turn, two at least from
  each. Those that begin at one point are a group of their own, so that their rewards compare.

  A rollout that the environment spoiled is left out, and another one begins from the same point, `retries` times.

  The memory holds the solutions' turns; with experience 'successes' what was solved is imitated as well.

  Source: IPA (ROME), section 3.2.4; code alibaba/ROLL.
  Deviation: the prefixes are the policy's own successes where the source has expert-like ones; the share that moves the
    starting point and the spread of several are our choices.
  """

  def __init__(self, environment: Any, template: Any, *, starts: str = 'sequential', advance: float = 0.5,
               retries: int = 0, size: int = 512, part: str = 'success'):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      starts: 'sequential' or 'parallel'.
      advance: Share of successes, in (0, 1].
      retries: Further rollouts in the place of one that failed for no fault of the policy's.
      size: Questions whose solution is kept, the latest.
      part: Reward part above 0 for a success.
    Raises:
      ValueError: if a number is out of range.
    """
    if starts not in STARTS:
      raise ValueError(f'starts={starts!r} is none of {", ".join(STARTS)}')
    if not 0.0 < advance <= 1.0 or size < 1 or retries < 0:
      raise ValueError(f'advance={advance} must be in (0, 1], size={size} at least 1 and retries={retries} not below 0')
    self._environment, self._template = environment, template
    self._parallel, self._advance, self._retries = starts == 'parallel', advance, retries
    self._size, self._part = size, part

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample."""
    player = Player(self._environment, self._template, task)
    solution = iteration.memory.get(task.id, {'turns': [], 'start': 0})
    turns = [list(turn) for turn in solution['turns']]
    if not self._parallel or not turns:
      return [self._program(player, turns[:solution['start']], '')] * group_size
    points = starting_points(len(turns), group_size)
    return [self._program(player, turns[:start], f'/from_{start}') for start in points]

  def _program(self, player: Player, prefix: list[list[int]], group: str, retries: int | None = None) -> base.Program:
    """Returns the program of a rollout behind a prefix, in the group whose name goes on so."""
    left = self._retries if retries is None else retries

    async def program(session: Session):
      session.trajectory.group_id += group
      status = None
      try:
        await self._play(player, session, prefix)
      except TrajectoryEnded as ended:
        status = ended.status
        if not (left and is_spoiled(session.trajectory, status)):
          raise
      if left and is_spoiled(session.trajectory, status):
        [again] = session.fork(1)
        again.rollback(Mark(1, 0, 0))
        session.discard()
        session.engine.adopt(again, self._program(player, prefix, '', left - 1))

    return program

  async def _play(self, player: Player, session: Session, prefix: list[list[int]]):
    episode = await player.begin(session)
    try:
      for tokens in prefix:
        await self._replay(player, session, episode, tokens)
      await player.play(session, episode)
    finally:
      await episode.close()

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


def starting_points(turns: int, samples: int) -> list[int]:
  """Returns after how many of a solution's turns each sample begins: evenly spread, two samples or more a point.

  Example:
    >>> starting_points(4, 8), starting_points(3, 4), starting_points(1, 3)
    ([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 2, 2], [0, 0, 0])
  """
  points = max(1, min(turns, samples // 2))
  spread = [round(k * (turns - 1) / max(1, points - 1)) for k in range(points)]
  return [spread[k * points // samples] for k in range(samples)]


def is_spoiled(trajectory: Trajectory, status: Status | None = None) -> bool:
  """Whether a trajectory says nothing of the policy: the environment or a tool failed for reasons of its own.

  Args:
    trajectory: As far as it came.
    status: That it ends with; None for its own.
  """
  failed = (status or trajectory.status) in (Status.ENVIRONMENT_FAILURE, Status.TOOL_FAILURE)
  return failed or any(result.error in NOISE for result in trajectory.results)


def _turns(trajectory: Trajectory) -> list[list[int]]:
  """Returns the tokens of each turn."""
  tokens = [np.asarray(s.tokens) for s in trajectory.segments]
  return [tokens[turn.segment][turn.start:turn.end].tolist() for turn in trajectory.turns]
