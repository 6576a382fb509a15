"""Questions that are answered after any number of tool calls."""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping

from agentrl.core import types
from agentrl.envs import base
from agentrl.tokens import formats
from agentrl.tokens import tokenizer
from agentrl.tools import base as tools_base
from agentrl.tools import executor as executor_lib


@base.ENVIRONMENTS.register('tools')
class ToolEnvironment:
  """A chat with tools: a turn with calls runs them, a turn without is the final answer.

  Every result becomes one short message of role 'tool'. A malformed call, an unknown tool and
  whatever goes wrong in a tool are such messages too, and the episode goes on.
  """

  def __init__(self, executor: executor_lib.Executor, call_format: formats.CallFormat, *,
               name: str = 'tools', max_turns: int = 8, max_calls: int = 16,
               max_repeats: int | None = 1, system_prompt: str | None = None,
               end_markers: tuple[str, ...] = (tokenizer.END,)):
    """Makes an environment.

    Args:
      executor: Holds the tools. The caller closes it.
      call_format: How calls are written.
      name: Tasks name it.
      max_turns: Turns of the policy. If the last one holds calls they are not run, as nobody would
        read the results, and the episode ends with TURN_LIMIT.
      max_calls: Calls of one turn that are run; the rest are told so.
      max_repeats: How often a call may directly follow an equal one (same tool, same arguments)
        within an episode; further ones are told so instead of run. None for any number.
      system_prompt: Content of the system message; '' for no message; None for the format's own
        description of the tools.
      end_markers: What may end a turn's text and is no part of an answer: the end-of-turn token.
    """
    if max_turns < 1 or max_calls < 1:
      raise ValueError(f'max_turns={max_turns} and max_calls={max_calls} must be at least 1')
    self.name = name
    self.call_format = call_format
    self.executor = executor
    self.max_turns = max_turns
    self.max_calls = max_calls
    self.max_repeats = max_repeats
    self.end_markers = end_markers
    if system_prompt is None:
      system_prompt = call_format.describe([
          {'name': t.name, 'description': t.description, 'parameters': t.parameters}
          for t in executor.tools.values()])
    self._system = types.Message('system', system_prompt) if system_prompt else None

  @property
  def stops(self) -> tuple[str, ...]:
    """Strings at which a turn's sampling stops."""
    return self.call_format.stops

  def system_message(self, task: types.Task | None = None) -> types.Message | None:
    """Returns the message that opens every chat, or None for none."""
    del task
    return self._system

  def result_message(self, call: types.ToolCall, result: types.ToolResult) -> types.Message:
    """Returns what a call's result is shown as; with the tool's name unless the policy made that up."""
    return types.Message('tool', result.text, call.name if call.name in self.executor.tools else None)

  async def open(self, task: types.Task, seed: int) -> ToolEpisode:
    """Returns a new episode; opens no tool yet."""
    return ToolEpisode(self, _Progress(task), self.executor.open(self.session_seed(task, seed)))

  def session_seed(self, task: types.Task, seed: int) -> int:
    """Returns what the tools of an episode are opened with; for worlds whose tools belong to a task."""
    del task
    return seed

  async def restore(self, snapshot: tuple[_Progress, Any]) -> ToolEpisode:
    """Returns an independent episode that goes on from a snapshot."""
    progress, session = snapshot
    return ToolEpisode(self, progress, self.executor.restore(session))


@dataclasses.dataclass(frozen=True)
class _Progress:
  """Where an episode stands, without its tools' states."""

  task: types.Task
  turns: int = 0
  done: bool = False
  last_call: tuple[str, Mapping[str, Any]] | None = None
  repeats: int = 0


class ToolEpisode:
  """One attempt at a task in a ToolEnvironment; made by its `open` and `restore`."""

  def __init__(self, env: ToolEnvironment, progress: _Progress, session: executor_lib.ToolSession):
    """Starts or goes on from `progress`."""
    system = env.system_message(progress.task)
    self.messages = ((system,) if system else ()) + tuple(progress.task.messages)
    self._env = env
    self._progress = progress
    self._session = session

  async def step(self, turn: str, stop_reason: str) -> base.Observation:
    """Returns the reaction to a turn; see `base.Episode.step`.

    A turn that ran out of tokens is no answer and its calls are not run: the status is LENGTH.
    """
    if self._progress.done:
      raise RuntimeError(f'the episode of task {self._progress.task.id!r} is over')
    self._progress = dataclasses.replace(self._progress, turns=self._progress.turns + 1)
    text = turn
    for marker in self._env.end_markers:
      text = text.replace(marker, '')
    calls = self._env.call_format.parse(text)
    if stop_reason != 'stop':
      return self._end(calls, types.Status.LENGTH, f'the turn ended by {stop_reason}')
    if not calls:
      answer = self._env.call_format.final_answer(text)
      return dataclasses.replace(self._end((), types.Status.FINISHED), answer=answer)
    if self._progress.turns >= self._env.max_turns:
      return self._end(calls, types.Status.TURN_LIMIT,
                       f'no answer within {self._env.max_turns} turns')
    results = await self._run(calls)
    messages = tuple(map(self._env.result_message, calls, results))
    return base.Observation(messages=messages, calls=calls, results=results)

  async def snapshot(self) -> tuple[_Progress, Any]:
    """Returns a value for `ToolEnvironment.restore`."""
    return self._progress, await self._session.snapshot()

  def go_on(self):
    """Takes the end back: the answer was not the last one."""
    self._progress = dataclasses.replace(self._progress, done=False)

  async def close(self) -> None:
    """Closes the tools' states; safe to repeat."""
    self._progress = dataclasses.replace(self._progress, done=True)
    await self._session.close()

  async def _run(self, calls: tuple[types.ToolCall, ...]) -> tuple[types.ToolResult, ...]:
    refused = {i: r for i, call in enumerate(calls) if (r := self._refusal(i, call))}
    allowed = [call for i, call in enumerate(calls) if i not in refused]
    results = iter(await self._session.call(allowed))
    return tuple(refused[i] if i in refused else next(results) for i in range(len(calls)))

  def _refusal(self, index: int, call: types.ToolCall) -> types.ToolResult | None:
    """Counts the call and returns the answer to one that must not run."""
    if index >= self._env.max_calls:
      return tools_base.failure('too_many_calls', f'at most {self._env.max_calls} calls a turn')
    # Malformed calls all look alike, and their answer costs nothing.
    key = None if call.error else (call.name, call.arguments)
    again = key is not None and key == self._progress.last_call
    repeats = self._progress.repeats + 1 if again else 0
    self._progress = dataclasses.replace(self._progress, last_call=key, repeats=repeats)
    limit = self._env.max_repeats
    if limit is not None and repeats > limit:
      return tools_base.failure('repeated', 'repeated call, not run')
    return None

  def _end(self, calls: tuple[types.ToolCall, ...], status: types.Status,
           detail: str = '') -> base.Observation:
    self._progress = dataclasses.replace(self._progress, done=True)
    boundary = None if status == types.Status.FINISHED else types.Boundary.POLICY
    return base.Observation(calls=calls, done=True, status=status, boundary=boundary, detail=detail)
