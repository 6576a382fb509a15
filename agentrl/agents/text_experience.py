"""A frozen policy that is shown advice distilled from its own groups: Training-Free GRPO."""

from __future__ import annotations

from typing import Any, Sequence

from agentrl.agents import base
from agentrl.agents.case_memory import with_messages
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Message, Task, Trajectory


@base.AGENTS.register('text_experience')
class TextExperience(base.Agent):
  """Compares the samples of each group that are partly right and keeps advice in words, which every prompt then shows.

  Advice is kept by the question's family, `metadata['family']`, two pieces at most:
    'do ...':     the tools that a success with fewest calls used, in order;
    'avoid ...':  tools that only failures used.
  The operations of a batch are merged at its end: ADD where there is none, UPDATE where a success took fewer calls or the set
  to avoid changed, DELETE where a success used what was to be avoided and nothing is left of it. Run it with a learning
  rate of 0, and evaluate with `eval.agent`.

  Source: Training-Free GRPO, code TencentCloudADP/youtu-agent: groups with 0 < mean < 1 only, at most 2 experiences a
    group, operations merged at the end of a batch; groups of 5, 3 epochs of 100 questions (recalled).
  Deviation: a rule writes the advice. In the source a language model summarises each rollout and words what it learns from
    comparing them; a toy policy could not, so this tests the loop and not the summaries.
  """

  def __init__(self, environment: Any, template: Any, *, part: str = 'success'):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      part: Reward part above 0 for a success.
    """
    self._environment, self._template, self._part = environment, template, part

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample, all with the same advice."""
    text = advice(iteration.memory.get(_family(task), {}))
    extra = (Message('system', text),) if text else ()
    return [with_messages(Player(self._environment, self._template, task), extra)] * group_size

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Merges what the groups of a batch teach into the bank."""
    groups: dict[str, list[Trajectory]] = {}
    for t in trajectories:
      groups.setdefault(t.group_id, []).append(t)
    for group in groups.values():
      right = [t for t in group if t.rewards[self._part] > 0]
      if not 0 < len(right) < len(group):
        continue
      kept = iteration.memory.setdefault(_family(group[0].task), {})
      best = min((_calls(t) for t in right), key=len)
      if 'do' not in kept or len(best) < len(kept['do']):
        kept['do'] = best
      used = {name for t in right for name in _calls(t)}
      failed = {name for t in group if t not in right for name in _calls(t)}
      avoid = sorted({*kept.get('avoid', ()), *failed} - used)
      kept.pop('avoid', None)
      if avoid:
        kept['avoid'] = avoid


def advice(kept: dict[str, list[str]]) -> str:
  """Returns the advice of a family as the policy is shown it; '' for none.

  Example:
    >>> advice({'do': ['lookup', 'lookup'], 'avoid': ['noise']})
    'do lookup lookup avoid noise'
  """
  return ' '.join(f'{kind} {" ".join(kept[kind])}'.strip() for kind in ('do', 'avoid') if kind in kept)


def _calls(trajectory: Trajectory) -> list[str]:
  return [call.name for turn in trajectory.turns for call in turn.calls]


def _family(task: Task) -> str:
  return str(task.metadata.get('family', ''))
