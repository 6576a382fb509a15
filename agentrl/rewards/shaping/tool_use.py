"""What a trajectory's calls were like: how many tools, how well formed, how novel."""

from __future__ import annotations

import json
from typing import Iterator, Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base

FULL_SCORE = 4.0


@base.SHAPINGS.register('tool_use')
class ToolUse:
  """Parts 'tools_used', 'tool_turns', 'calls_parse' and 'repeated_calls', and part of turns 'call_score'.

  'tools_used' counts the tools that answered at least once, 'tool_turns' the turns with a call, 'repeated_calls' the
  calls with the name and arguments of an earlier one. 'calls_parse' is 1 if there are calls and all of them are well
  formed, else 0. 'call_score' is the mean over a turn's calls of 0 (no valid structure), 1 (no such tool), 2 (arguments
  that it does not take), 3 (the call failed) or 4, and 0 in a turn without calls.

  Source: the levels (structure, name, arguments, values) are those of AdaReasoner's rubric, recalled, not checked.
  """

  needs = ()
  names = ('tools_used', 'tool_turns', 'calls_parse', 'repeated_calls')
  turn_names = ('call_score',)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float | list[float]]]:
    """Returns the parts of each trajectory."""
    del iteration
    return [self._parts(t) for t in trajectories]

  def _parts(self, trajectory: types.Trajectory) -> dict[str, float | list[float]]:
    pairs = list(executed(trajectory))
    parse = bool(pairs) and all(r.error != 'malformed' for _, r in pairs)
    return {'tools_used': float(len({c.name for c, r in pairs if r.ok})),
            'tool_turns': float(sum(bool(turn.calls) for turn in trajectory.turns)),
            'calls_parse': float(parse), 'repeated_calls': float(sum(repeats(trajectory))),
            'call_score': [_score(turn) for turn in trajectory.turns]}


def executed(trajectory: types.Trajectory) -> Iterator[tuple[types.ToolCall, types.ToolResult]]:
  """Yields the calls that were answered, with their results."""
  for turn in trajectory.turns:
    yield from zip(turn.calls, turn.results)


def repeats(trajectory: types.Trajectory) -> list[bool]:
  """Returns, for each answered call, whether an earlier one had its name and arguments."""
  seen, found = set(), []
  for call, _ in executed(trajectory):
    key = (call.name, json.dumps(dict(call.arguments), sort_keys=True, default=str))
    found.append(key in seen)
    seen.add(key)
  return found


def _score(turn: types.Turn) -> float:
  scores = [_call_score(*pair) for pair in zip(turn.calls, turn.results)]
  return sum(scores) / len(scores) if scores else 0.0


def _call_score(call: types.ToolCall, result: types.ToolResult) -> float:
  if call.error is not None:
    return 0.0
  return FULL_SCORE if result.ok else {'unknown_tool': 1.0, 'malformed': 2.0}.get(result.error, 3.0)
