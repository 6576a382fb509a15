"""A frozen policy that is shown what became of similar questions: Memento."""

from __future__ import annotations

from typing import Any, Sequence

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Message, Task, Trajectory
from agentrl.experience import case_bank
from agentrl.rollout.session import Session

RETRIEVALS = ('parametric', 'cosine')


@base.AGENTS.register('case_memory')
class CaseMemory(base.Agent):
  """Puts the cases that promise most into the prompt, and learns from the outcome which ones were of use.

  Nothing about the policy changes: run it with a learning rate of 0, and evaluate with `eval.agent`.

  Source: Memento, code Agent-on-the-Fly/Memento: the 8 best cases (the paper: 4, recalled).  Deviation: see
    `agentrl.experience.case_bank`; a case's plan is its calls, where the source's is a planner's text.
  """

  def __init__(self, environment: Any, template: Any, *, cases: int = 1, retrieval: str = 'parametric',
               part: str = 'success', capacity: int = 512):
    """Binds the settings.

    Args:
      environment: Where it acts.
      template: Renders messages.
      cases: Shown, K.
      retrieval: 'parametric' for those of largest probability to be of use, 'cosine' for those of the most similar questions.
      part: Reward part above 0 for a success.
      capacity: Cases kept.
    Raises:
      ValueError: if a setting is out of range.
    """
    if retrieval not in RETRIEVALS:
      raise ValueError(f'retrieval={retrieval!r} of case_memory is none of {", ".join(RETRIEVALS)}')
    if cases < 1 or capacity < 1:
      raise ValueError(f'cases={cases} and capacity={capacity} of case_memory must be at least 1')
    self._environment, self._template = environment, template
    self._cases, self._retrieval, self._part, self._capacity = cases, retrieval, part, capacity

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample; all are shown the same cases."""
    shown = self._shown(task, self._bank(iteration))
    extra = (Message('system', case_bank.text_of(shown)),) if shown else ()
    return [with_messages(Player(self._environment, self._template, task), extra)] * group_size

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Learns which of the cases that were shown were of use, then takes the new cases in."""
    bank = self._bank(iteration)
    shown = {t.task.id: self._shown(t.task, bank) for t in trajectories}
    for t in trajectories:
      for case in shown[t.task.id]:
        bank.learn(_question(t.task), case, t.rewards[self._part] > 0)
    for t in trajectories:
      bank.add(_question(t.task), case_bank.plan_of(t), t.rewards[self._part])

  def _bank(self, iteration: Iteration) -> case_bank.CaseBank:
    return case_bank.CaseBank(iteration.memory, capacity=self._capacity)

  def _shown(self, task: Task, bank: case_bank.CaseBank) -> list[case_bank.Case]:
    find = bank.most_useful if self._retrieval == 'parametric' else bank.nearest
    return find(_question(task), self._cases)


def with_messages(player: Player, extra: Sequence[Message]) -> base.Program:
  """Returns the plain program with further messages in its prompt."""
  async def program(session: Session):
    episode = await player.begin(session, extra)
    try:
      await player.play(session, episode)
    finally:
      await episode.close()
  return program


def _question(task: Task) -> str:
  return task.messages[-1].content
