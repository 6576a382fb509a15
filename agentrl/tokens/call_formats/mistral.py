"""Mistral's calls: a marker before a JSON list."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Mapping, Sequence

from agentrl.core import types
from agentrl.tokens import formats
from agentrl.tokens import grammars

_MARKER = '[TOOL_CALLS]'


@formats.FORMATS.register('mistral')
@dataclasses.dataclass(frozen=True)
class MistralFormat:
  """[TOOL_CALLS] and a list of {"name": ..., "arguments": {...}}, to the end of the turn.

  Ids of calls, which templates of later versions add, are left out of account.

  Example:
    >>> MistralFormat().parse('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]')
    (ToolCall(name='f', arguments={'x': 1}, error=None),)
  """

  name = 'mistral'
  stops = ()
  markers = (_MARKER,)

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """See `formats.CallFormat`."""
    _, marker, body = text.partition(_MARKER)
    if not marker:
      return ()
    try:
      calls = json.loads(body)
    except (ValueError, RecursionError) as error:
      return (types.ToolCall('', {}, f'invalid JSON: {error}'[:200]),)
    if not isinstance(calls, list) or not calls:
      return (types.ToolCall('', {}, 'calls are a JSON list of objects'),)
    return tuple(formats.json_call(json.dumps(c), ignored=('id',)) for c in calls)

  def render(self, call: types.ToolCall) -> str:
    """See `formats.CallFormat`."""
    return f'{_MARKER} [{formats.render_json_call(call, escaped=self.markers)}]'

  def final_answer(self, text: str) -> str | None:
    """See `formats.CallFormat`."""
    return None if self.parse(text) else text.strip()

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """See `formats.CallFormat`."""
    signatures = json.dumps([{'type': 'function', 'function': dict(t)} for t in tools])
    return (f'You may call functions. Their signatures:\n{signatures}\n'
            f'Write calls as {_MARKER} [{{"name": <function>, "arguments": <object>}}]')

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """See `formats.CallFormat`. Behind the list there is nothing but the turn's end."""
    del ids
    text = grammars.without(self.markers)
    return grammars.TurnGrammar(
        f'start: TEXT? | open blank "[" blank call (blank "," blank call)* blank "]" blank\n'
        f'open[lazy]: OTHER {grammars.literal(_MARKER)}\nTEXT: {text}\nOTHER: {text}\n{grammars.json_calls(tools)}')
