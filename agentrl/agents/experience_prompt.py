"""Some rollouts are guided by what worked before, and trained on as if they had not been: AgentEvolver."""

from __future__ import annotations

from typing import Any, Sequence

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Message, Task, Trajectory
from agentrl.rollout.session import Session


@base.AGENTS.register('experience_prompt')
class ExperiencePrompt(base.Agent):
  """Shows the first samples of a group a hint: the tools that a success with fewest calls used, in order.

  Experience is kept by the question's family, `metadata['family']`. When a guided rollout has ended, the hint is taken
  out of its context: what is trained on is how to do the same unguided, with log-probs that the learner computes. The
  part 'guided' is 1 there, for a clip with more room: clip 'guided'.

  Source: AgentEvolver, code modelscope/AgentEvolver and its documentation.
  Deviation: experience is found and worded by a rule, where the source retrieves and writes it with models; the share
    of guided rollouts is our choice.
  """

  names = ('guided',)
  needs_recompute = True

  def __init__(self, environment: Any, template: Any, *, share: float = 0.5, part: str = 'success'):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages. A hint must change a prompt by an insertion.
      share: Of the samples of a group that are guided, rounded.
      part: Reward part above 0 for a success.
    Raises:
      ValueError: if the share is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
      raise ValueError(f'share={share} must be in [0, 1]')
    self._environment, self._template, self._share, self._part = environment, template, share, part

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample, the guided ones first."""
    player = Player(self._environment, self._template, task)
    hint = iteration.memory.get(_family(task))
    guided = round(self._share * group_size) if hint else 0

    async def plain(session: Session):
      episode = await player.begin(session)
      try:
        await player.play(session, episode)
      finally:
        await episode.close()

    async def with_hint(session: Session):
      episode = await player.open(session)
      start, shown = 0, []
      try:
        start, shown, prompt = _inserted(player.prompt(episode),
                                         player.prompt(episode, (Message('system', ' '.join(hint)),)))
        session.append(prompt)
        session.trajectory.rewards['guided'] = 1.0
        await player.play(session, episode)
      finally:
        if len(session.context):
          session.strip(start, start + len(shown))
        await episode.close()

    return [with_hint] * guided + [plain] * (group_size - guided)

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Keeps, for each family, the calls of the success that took fewest."""
    for t in trajectories:
      calls = [call.name for turn in t.turns for call in turn.calls]
      best = iteration.memory.get(_family(t.task))
      if t.rewards[self._part] > 0 and calls and (best is None or len(calls) < len(best)):
        iteration.memory[_family(t.task)] = calls


def _family(task: Task) -> str:
  return str(task.metadata.get('family', ''))


def _inserted(without: list[int], with_: list[int]) -> tuple[int, list[int], list[int]]:
  """Returns where a prompt was inserted into, what, and the longer prompt.

  Raises:
    ValueError: if the longer one is not the shorter with something inserted.
  """
  count = len(with_) - len(without)
  start = next((i for i, (a, b) in enumerate(zip(without, with_)) if a != b), len(without))
  for at in range(start, -1, -1):
    if with_[:at] + with_[at + count:] == without:
      return at, with_[at:at + count], with_
  raise ValueError('the template does not render a hint as an insertion, so that it could not be taken out again')
