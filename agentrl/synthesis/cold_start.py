"""Scripted conversations that teach the protocol of calls, and as little of the tasks as they can.

Every family has several strategies, among them wrong expressions, failing calls and guesses. What
the tools say is what they really said. How many traces end in a right answer is the caller's
choice, so that reinforcement learning has something to sharpen and something to forget.
"""

from __future__ import annotations

import asyncio
from typing import Any, Mapping, Sequence

import numpy as np

from agentrl.core import types
from agentrl.rewards import reasoning_gym as rewards
from agentrl.synthesis import base
from agentrl.synthesis import cold_start_scripts as scripts
from agentrl.tokens import chat
from agentrl.tokens import formats
from agentrl.tools import executor as executor_lib

RIGHT_STRATEGIES: Mapping[str, float] = {'python': 0.7, 'calculator': 0.2, 'failed_then_right': 0.1}
WRONG_STRATEGIES: Mapping[str, float] = {
    'wrong': 0.5, 'guess': 0.25, 'failed_then_wrong': 0.15, 'failed_then_guess': 0.1}
# Traces written at once: enough to keep every worker of the tools busy.
_CONCURRENT = 64


@base.DEMONSTRATORS.register('reasoning_gym')
def make_traces(tasks: Sequence[types.Task], executor: executor_lib.Executor, *, seed: int,
                **settings: Any) -> list[base.Trace]:
  """Returns one trace a task, as `write_traces` does; blocks. For callers without an event loop."""
  return asyncio.run(write_traces(tasks, executor, seed=seed, **settings))


async def write_traces(tasks: Sequence[types.Task], executor: executor_lib.Executor, *, seed: int,
                       share_right: float = 0.5,
                       right_strategies: Mapping[str, float] = RIGHT_STRATEGIES,
                       wrong_strategies: Mapping[str, float] = WRONG_STRATEGIES,
                       call_format: formats.CallFormat | None = None) -> list[base.Trace]:
  """Returns one trace a task, in their order; the same tasks and seed give the same traces.

  Args:
    tasks: reasoning-gym tasks of families in `cold_start_scripts.SCRIPTS`.
    executor: Holds the tools 'python' and 'calculator'; the traces quote what they answer.
    seed: Of the choices.
    share_right: Probability that a trace is scripted to end in a right answer, in every family.
    right_strategies: Weights of the ways to a right answer; those a family lacks are left out.
    wrong_strategies: Weights of the others.
    call_format: Of the run; None is XML tags for the executor's tools.
  Raises:
    ValueError: if the share is outside [0, 1], a task's family has no script or a tool is missing.
  """
  if not 0.0 <= share_right <= 1.0:
    raise ValueError(f'share_right must be in [0, 1], got {share_right}')
  unnamed = [t.id for t in tasks if 'family' not in t.metadata]
  if unnamed:
    raise ValueError(f'task {unnamed[0]!r} has no "family" in its metadata, by which its demonstration would be '
                     'scripted; add it')
  strange = sorted({_family(task) for task in tasks} - set(scripts.SCRIPTS))
  if strange:
    raise ValueError(f'family {strange[0]!r} has no script; there are {sorted(scripts.SCRIPTS)}')
  missing = sorted({'python', 'calculator'} - set(executor.tools))
  if missing:
    raise ValueError(f'the executor has no tool {missing[0]!r}; there are {sorted(executor.tools)}')
  call_format = call_format or formats.xml_format(list(executor.tools.values()))
  answers: dict[str, list[str]] = {}
  for task in tasks:
    answers.setdefault(_family(task), []).append(task.ground_truth['answer'])

  async def write(index: int) -> base.Trace:
    task = tasks[index]
    rng = np.random.default_rng([seed, index])
    right = rng.random() < share_right
    writer = _Writer(task, answers[_family(task)], executor, index, call_format, rng)
    return await writer.write(right_strategies if right else wrong_strategies)

  traces: list[base.Trace] = []
  for start in range(0, len(tasks), _CONCURRENT):
    stop = min(start + _CONCURRENT, len(tasks))
    traces += await asyncio.gather(*(write(i) for i in range(start, stop)))
  return traces


def _family(task: types.Task) -> str:
  return task.metadata['family']


class _Writer:
  """Writes one trace."""

  def __init__(self, task: types.Task, answers: Sequence[str], executor: executor_lib.Executor,
               index: int, call_format: formats.CallFormat, rng: np.random.Generator):
    self._task = task
    self._script = scripts.SCRIPTS[_family(task)](task.messages[-1].content)
    self._answers = answers
    self._tools = executor.tools
    self._session = executor.open(index)
    self._call_format = call_format
    self._rng = rng
    self._messages = list(task.messages)

  async def write(self, strategies: Mapping[str, float]) -> base.Trace:
    strategy = self._choose(strategies)
    if strategy.startswith('failed_then_'):
      await self._call('python', self._pick(self._script.failing))
    end = strategy.removeprefix('failed_then_')
    if end == 'guess':
      answer = self._guess()
    elif end == 'wrong':
      answer = await self._call_wrong()
    elif end == 'calculator':
      answer = await self._call('calculator', self._script.calculator)
    else:
      answer = await self._call('python', self._script.right)
    await self._session.close()
    self._messages.append(types.Message('assistant', answer))
    return base.Trace(self._task, tuple(self._messages), strategy, self._is_right(answer))

  def _choose(self, strategies: Mapping[str, float]) -> str:
    names = [n for n in strategies if n != 'calculator' or self._script.calculator is not None]
    weights = np.array([strategies[name] for name in names])
    return names[self._rng.choice(len(names), p=weights / weights.sum())]

  async def _call(self, tool: str, code: str) -> str:
    (argument,) = self._tools[tool].parameters['required']
    call = types.ToolCall(tool, {argument: code})
    (result,) = await self._session.call([call])
    self._messages += [types.Message('assistant', self._call_format.render(call)),
                       types.Message('tool', result.text, tool)]
    return result.text

  async def _call_wrong(self) -> str:
    # A wrong expression may hit the answer by luck: then the next one is tried.
    before = list(self._messages)
    for i in self._rng.permutation(len(self._script.wrong)):
      self._messages = list(before)
      answer = await self._call('python', self._script.wrong[i])
      if not self._is_right(answer):
        break
    return answer

  def _guess(self) -> str:
    # Half of the guesses copy from the question: more copying to learn from.
    return self._pick(self._script.copied if self._rng.random() < 0.5 else self._answers)

  def _pick(self, options: Sequence[str]) -> str:
    return options[self._rng.integers(len(options))]

  def _is_right(self, answer: str) -> bool:
    return rewards.is_full(rewards.score_answer(answer, self._task.ground_truth).score)


def corpus(traces: Sequence[base.Trace], tools: Sequence[Mapping[str, Any]] = ()) -> list[str]:
  """Returns the texts to train a tokenizer on, each as often as the traces render it."""
  system = [chat.describe_tools(tools)] if tools else []
  return [text for trace in traces for text in (*system, *(m.content for m in trace.messages))]


def tokenize(traces: Sequence[base.Trace], template: chat.ChatTemplate,
             tools: Sequence[Mapping[str, Any]] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns [n] int32 ids and [n] bool loss masks, a pair a trace.

  The mask is True on what the assistant wrote, closing markers included, and nowhere else.

  Args:
    traces: Conversations.
    template: Renderer of the run.
    tools: Schemas for the system message; () for none.
  """
  pairs = (template.render_with_mask(trace.messages, tools=tools) for trace in traces)
  return [(np.asarray(ids, np.int32), np.asarray(mask, bool)) for ids, mask in pairs]
