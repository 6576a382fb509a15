"""Scripted conversations of the chain world: imperfect on purpose, in ways that are counted.

They show how calls are written, what public facts say and how sums come out. How many are right,
and how many calls they waste, is the caller's choice, so that reinforcement learning has both
accuracy and economy to gain.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Mapping, Sequence

import numpy as np

from agentrl.core import types
from agentrl.synthesis import base
from agentrl.tools import chains
from agentrl.tools import executor as executor_lib

# Ways to a wrong answer: stop early and guess; do one step wrong; leave one out; make up a fact
# instead of looking it up; give up after a call that is written the wrong way round.
WRONG_STRATEGIES: Mapping[str, float] = {
    'guess': 0.25, 'slip': 0.25, 'skip': 0.15, 'invent': 0.25, 'give_up': 0.1}


@base.DEMONSTRATORS.register('chains')
def make_traces(tasks: Sequence[types.Task], executor: executor_lib.Executor, *, seed: int,
                share_right: float = 0.5, call_format: Any = None, **habits: Any) -> list[base.Trace]:
  """Returns one trace a task, as `write_traces` does; blocks."""
  return asyncio.run(write_traces(tasks, executor, seed=seed, share_right=share_right,
                                  call_format=call_format, **habits))


async def write_traces(tasks: Sequence[types.Task], executor: executor_lib.Executor, *, seed: int,
                       share_right: float = 0.5, call_format: Any = None, over_call: float = 0.5,
                       repeat: float = 0.15, noise: float = 0.1, malformed: float = 0.1,
                       max_calls: int = 7,
                       wrong_strategies: Mapping[str, float] = WRONG_STRATEGIES) -> list[base.Trace]:
  """Returns one trace a task, in their order; the same tasks and seed give the same traces.

  Args:
    tasks: Of `agentrl.data.chains`.
    executor: Holds 'lookup'; 'calculator' and 'noise' are used where it has them.
    seed: Of the choices.
    share_right: Probability that a trace is scripted to end in a right answer.
    call_format: Of the run.
    over_call: Probability that a trace asks for everything, known by heart or not.
    repeat: Probability that a call that was answered is made once more.
    noise: Probability that a trace begins with a call of 'noise'.
    malformed: Probability that a lookup is first written the wrong way round, and then mended.
    max_calls: Calls of a trace; where they do not suffice it ends in a guess.
    wrong_strategies: Weights of the ways to a wrong answer.
  Raises:
    ValueError: if the tool is missing, or a share is outside [0, 1].
  """
  shares = dict(share_right=share_right, over_call=over_call, repeat=repeat, noise=noise,
                malformed=malformed)
  for name, share in shares.items():
    if not 0.0 <= share <= 1.0:
      raise ValueError(f'{name} must be in [0, 1], got {share}')
  if 'lookup' not in executor.tools:
    raise ValueError(f"the executor has no tool 'lookup'; there are {sorted(executor.tools)}")
  writers = [_Writer(task, executor, call_format, shares, max_calls, wrong_strategies,
                     np.random.default_rng([seed, i])) for i, task in enumerate(tasks)]
  return [await writer.write() for writer in writers]


class _OutOfCalls(Exception):
  """The trace may make no further call."""


class _Writer:
  """Writes one trace."""

  def __init__(self, task: types.Task, executor: executor_lib.Executor, call_format: Any,
               shares: Mapping[str, float], max_calls: int, wrong: Mapping[str, float],
               rng: np.random.Generator):
    self._task, self._format, self._shares, self._rng = task, call_format, shares, rng
    self._tools = executor.tools
    seed = int(rng.integers(1 << 32))
    self._session = executor.open(chains.session_seed(task.ground_truth['table'], seed))
    self._calls_left = max_calls
    self._messages = list(task.messages)
    start, *self._steps = re.findall(r'\d(?!\d)|[A-Z]|\+\d', task.messages[-1].content)
    self._start = int(start)
    names = list(wrong)
    weights = np.array([wrong[name] for name in names])
    if self._chance('share_right'):
      self._strategy = 'right'
    else:
      self._strategy = names[rng.choice(len(names), p=weights / weights.sum())]
    self._careful = self._chance('over_call')

  async def write(self) -> base.Trace:
    try:
      answer = await self._answer()
    except _OutOfCalls:
      answer = self._digit()
    await self._session.close()
    self._messages.append(types.Message('assistant', str(answer)))
    careful = '_careful' if self._careful else ''
    return base.Trace(self._task, tuple(self._messages), self._strategy + careful,
                      str(answer) == self._task.ground_truth['answer'])

  async def _answer(self) -> int:
    """Walks the chain and returns what it comes to."""
    if 'noise' in self._tools and self._chance('noise'):
      await self._call('noise', fact=self._name(self._steps[0], self._start))
    if self._strategy == 'give_up':
      await self._call('lookup', fact=self._name(self._steps[0], self._start)[::-1])
      return self._digit()
    value, where = self._start, self._place()
    for i, step in enumerate(self._steps):
      if i == where and self._strategy == 'guess':
        return self._digit()
      if i == where and self._strategy == 'invent':
        value = self._digit()
      elif i != where or self._strategy != 'skip':
        value = await self._take(step, value, slip=i == where and self._strategy == 'slip')
    return value

  def _place(self) -> int:
    """Returns the step that a wrong strategy gets wrong: for some of them one that needs a call."""
    places = [i for i, step in enumerate(self._steps)
              if self._strategy not in ('invent', 'skip') or step in chains.PRIVATE]
    return places[self._rng.integers(len(places))]

  async def _take(self, step: str, value: int, slip: bool) -> int:
    """Returns what a step makes of a value."""
    if step.startswith('+'):
      if self._careful and 'calculator' in self._tools and not slip:
        return int(await self._call('calculator', expression=f'{value}{step}'))
      return value + int(step) + (self._off() if slip else 0)
    if step in chains.PUBLIC and not self._careful:
      true = chains.fact(self._name(step, value), 0)
      return (true + self._off()) % chains.DIGITS if slip else true
    asked = (value + self._off()) % chains.DIGITS if slip else value
    return int(await self._ask(self._name(step, asked)))

  async def _ask(self, name: str) -> str:
    """Looks a fact up until there is one answer, and now and then once more."""
    if self._chance('malformed'):
      await self._call('lookup', fact=name[::-1])
    while not re.fullmatch(r'\d', text := await self._call('lookup', fact=name)):
      pass
    if self._chance('repeat'):
      await self._call('lookup', fact=name)
    return text

  async def _call(self, tool: str, **arguments: str) -> str:
    if not self._calls_left:
      raise _OutOfCalls
    self._calls_left -= 1
    call = types.ToolCall(tool, arguments)
    (result,) = await self._session.call([call])
    self._messages += [types.Message('assistant', self._format.render(call)),
                       types.Message('tool', result.text, tool)]
    return result.text

  def _chance(self, name: str) -> bool:
    return self._rng.random() < self._shares[name]

  def _name(self, step: str, value: int) -> str:
    letter = step if step in chains.PRIVATE + chains.PUBLIC else self._letter()
    return f'{letter}{value % chains.DIGITS}'

  def _letter(self) -> str:
    return chains.PRIVATE[self._rng.integers(len(chains.PRIVATE))]

  def _digit(self) -> int:
    return int(self._rng.integers(chains.DIGITS))

  def _off(self) -> int:
    return int(self._rng.integers(1, chains.DIGITS))
