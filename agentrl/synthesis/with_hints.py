"""Demonstrations of which some begin with a hint, so that a policy has seen what later stands in its prompt."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Sequence

import numpy as np

from agentrl.agents.text_experience import advice
from agentrl.core import registry, types
from agentrl.experience import case_bank
from agentrl.synthesis import base

KINDS = ('cases', 'advice')


@base.DEMONSTRATORS.register('with_hints')
def with_hints(tasks: Sequence[types.Task], executor: Any, *, seed: int, share_right: float = 0.5, call_format: Any = None,
               demonstrator: str = 'chains', kind: str = 'cases', share: float = 0.5, **options: Any) -> list[base.Trace]:
  """Returns the traces of another demonstrator, a share of them with a hint before the question; blocks.

  A case is another trace; advice is the tools that the trace itself uses, or another's.

  Args:
    tasks: See `base.Demonstrator`.
    executor: Likewise.
    seed: Of the choices.
    share_right: See `base.Demonstrator`.
    call_format: Of the run.
    demonstrator: Who writes the traces.
    kind: 'cases' as the agent 'case_memory' shows, 'advice' as 'text_experience' does.
    share: Of the traces that have a hint.
    **options: Of the other demonstrator.
  Raises:
    ValueError: if a setting is out of range.
  """
  if kind not in KINDS or not 0.0 <= share <= 1.0:
    raise ValueError(f'kind={kind!r} of with_hints must be one of {", ".join(KINDS)}, share={share} in [0, 1]')
  write = base.DEMONSTRATORS.get(demonstrator)
  traces = registry.call('sft.options', functools.partial(
      write, tasks, executor, seed=seed, share_right=share_right, call_format=call_format), options)
  rng, out = np.random.default_rng([seed, 1]), []
  for trace in traces:
    other = traces[rng.integers(len(traces))]
    hinted = rng.random() < share
    text = _case(other, call_format) if kind == 'cases' else _advice(trace if rng.random() < 0.5 else other, call_format)
    messages = (types.Message('system', text), *trace.messages) if hinted and text else trace.messages
    out.append(dataclasses.replace(trace, messages=messages))
  return out


def _calls(trace: base.Trace, call_format: Any) -> list[types.ToolCall]:
  return [c for m in trace.messages if m.role == 'assistant' for c in call_format.parse(m.content)]


def _case(trace: base.Trace, call_format: Any) -> str:
  plan = ' '.join(f'{c.name} {" ".join(map(str, c.arguments.values()))}'.strip() for c in _calls(trace, call_format))
  return case_bank.text_of([{'state': trace.task.messages[-1].content, 'plan': plan, 'reward': float(trace.right)}])


def _advice(trace: base.Trace, call_format: Any) -> str:
  return advice({'do': [c.name for c in _calls(trace, call_format)]})
