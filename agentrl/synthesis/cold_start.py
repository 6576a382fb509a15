"""Scripted conversations that teach the protocol of calls, and of the tasks only as much as that needs.

Every family has several strategies, among them wrong expressions, failing calls and guesses. What the tools
say is what they really said. How many traces end in a right answer is the caller's choice, so that
reinforcement learning has something to sharpen and something to forget.
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Mapping, Sequence

import numpy as np

from agentrl.core import types
from agentrl.rewards import reasoning_gym as rewards
from agentrl.synthesis import cold_start_scripts as scripts
from agentrl.tokens import chat

# (tool, code) -> (text that the policy reads, whether the call succeeded).
RunTool = Callable[[str, str], tuple[str, bool]]

RIGHT_STRATEGIES: Mapping[str, float] = {'python': 0.7, 'calculator': 0.2, 'failed_then_right': 0.1}
WRONG_STRATEGIES: Mapping[str, float] = {
    'wrong': 0.5, 'guess': 0.25, 'failed_then_wrong': 0.15, 'failed_then_guess': 0.1}


@dataclasses.dataclass(frozen=True)
class Trace:
  """A scripted conversation.

  Attributes:
    task: What was asked.
    messages: The task's messages and all that follow, ending in the answer.
    strategy: Which script wrote it.
    right: Whether the answer scores full marks; a guess may be lucky.
  """

  task: types.Task
  messages: tuple[types.Message, ...]
  strategy: str
  right: bool


def xml_call(tool: str, code: str) -> str:
  """Returns a call as an XML tag.

  Example:
    >>> xml_call('python', '1+1')
    '<python>1+1</python>'
  """
  return f'<{tool}>{code}</{tool}>'


def make_traces(tasks: Sequence[types.Task], run_tool: RunTool, *, seed: int, share_right: float = 0.5,
                right_strategies: Mapping[str, float] = RIGHT_STRATEGIES,
                wrong_strategies: Mapping[str, float] = WRONG_STRATEGIES,
                write_call: Callable[[str, str], str] = xml_call) -> list[Trace]:
  """Returns one trace a task; each depends on its task and the seed only.

  Blocks while the calls run, one after the other.

  Args:
    tasks: reasoning-gym tasks of families in `cold_start_scripts.SCRIPTS`.
    run_tool: Runs a call and tells what the policy would read.
    seed: Of the choices.
    share_right: Probability that a trace is scripted to end in a right answer, in every family.
    right_strategies: Weights of the ways to a right answer; those a family lacks are left out.
    wrong_strategies: Weights of the others.
    write_call: Renders (tool, code) in the call format of the run.
  Raises:
    ValueError: if the share is outside [0, 1], or a task's family has no script.
  """
  if not 0.0 <= share_right <= 1.0:
    raise ValueError(f'share_right must be in [0, 1], got {share_right}')
  guesses = _answers_by_family(tasks)
  traces = []
  for i, task in enumerate(tasks):
    family = task.metadata['family']
    if family not in scripts.SCRIPTS:
      raise ValueError(f'family {family!r} has no script; there are {sorted(scripts.SCRIPTS)}')
    writer = _Writer(task, scripts.SCRIPTS[family](task.messages[-1].content), guesses[family], run_tool,
                     write_call, np.random.default_rng([seed, i]))
    right = writer.rng.random() < share_right
    traces.append(writer.write(right_strategies if right else wrong_strategies, right))
  return traces


def _answers_by_family(tasks: Sequence[types.Task]) -> dict[str, list[str]]:
  answers: dict[str, list[str]] = {}
  for task in tasks:
    answers.setdefault(task.metadata['family'], []).append(task.ground_truth['answer'])
  return answers


class _Writer:
  """Writes one trace."""

  def __init__(self, task, script, answers, run_tool, write_call, rng):
    self.rng = rng
    self._task = task
    self._script: scripts.Script = script
    self._answers = answers
    self._run_tool = run_tool
    self._write_call = write_call
    self._messages = list(task.messages)

  def write(self, strategies: Mapping[str, float], right: bool) -> Trace:
    weights = {name: weight for name, weight in strategies.items()
               if not (name == 'calculator' and self._script.calculator is None)}
    names = list(weights)
    p = np.array([weights[name] for name in names])
    strategy = names[self.rng.choice(len(names), p=p / p.sum())]
    if strategy.startswith('failed_then_'):
      self._call('python', self._pick(self._script.failing))
    end = strategy.removeprefix('failed_then_')
    if end == 'guess':
      answer = self._guess()
    elif end == 'wrong':
      answer = self._call_wrong()
    elif end == 'calculator':
      answer = self._call('calculator', self._script.calculator)
    else:
      answer = self._call('python', self._script.right)
    self._messages.append(types.Message('assistant', answer))
    return Trace(self._task, tuple(self._messages), strategy, self._is_right(answer))

  def _call(self, tool: str, code: str) -> str:
    text, _ = self._run_tool(tool, code)
    self._messages += [types.Message('assistant', self._write_call(tool, code)), types.Message('tool', text)]
    return text

  def _call_wrong(self) -> str:
    # A wrong expression may hit the answer by luck: the next one is tried, the last one is kept as it is.
    for i in self.rng.permutation(len(self._script.wrong)):
      text, ok = self._run_tool('python', self._script.wrong[i])
      if ok and not self._is_right(text):
        break
    return self._call('python', self._script.wrong[i])

  def _guess(self) -> str:
    # Half of the guesses copy from the question: more copying to learn from.
    if self.rng.random() < 0.5:
      return self._pick(self._script.copied)
    return self._pick(self._answers)

  def _pick(self, options: Sequence[str]) -> str:
    return options[self.rng.integers(len(options))]

  def _is_right(self, answer: str) -> bool:
    return rewards.score_answer(answer, self._task.ground_truth).score >= 1.0 - 1e-6


def tokenize(traces: Sequence[Trace], template: chat.ChatTemplate,
             tools: Sequence[Mapping[str, object]] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns [n] int32 ids and [n] bool loss masks, a pair a trace.

  The mask is True on what the assistant wrote, closing markers included, and nowhere else.

  Args:
    traces: Conversations.
    template: Renderer of the run.
    tools: Schemas for the system message; () for none.
  """
  pairs = (template.render_with_mask(trace.messages, tools=tools) for trace in traces)
  return [(np.asarray(ids, np.int32), np.asarray(mask, bool)) for ids, mask in pairs]
