"""The chain world as an environment, and a player that knows the solution."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.core import types
from agentrl.envs import base
from agentrl.envs import tool_env
from agentrl.rewards import chains as rewards
from agentrl.tools import chains


@base.ENVIRONMENTS.register('chains')
class ChainEnvironment(tool_env.ToolEnvironment):
  """A chat with tools in which the facts belong to the task.

  The tools of an episode are opened with `agentrl.tools.chains.session_seed`. A call may be
  repeated any number of times, because it may have failed for a passing reason.
  """

  def __init__(self, *args: Any, name: str = 'chains', max_repeats: int | None = None, **kwargs: Any):
    """See `tool_env.ToolEnvironment`."""
    super().__init__(*args, name=name, max_repeats=max_repeats, **kwargs)

  def session_seed(self, task: types.Task, seed: int) -> int:
    """Returns what the tools of an episode are opened with."""
    return chains.session_seed(task.ground_truth['table'], seed)


def gold_turn(ground_truth: Mapping[str, Any], progress: rewards.Progress) -> types.ToolCall | str:
  """Returns the best next turn: the call for the first missing fact, or the answer.

  With no failing calls and no ambiguous facts, following it takes len(ground_truth['needed']) calls,
  and none can be left out: without a needed fact the answer is anyone's guess.

  Args:
    ground_truth: Of a task of `agentrl.data.chains`.
    progress: After the turns so far.
  """
  if progress.missing:
    return types.ToolCall('lookup', {'fact': progress.missing[0]})
  return ground_truth['answer']
