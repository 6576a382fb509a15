"""Llama 3's calls: a turn that is one JSON object."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Mapping, Sequence

from agentrl.core import types
from agentrl.tokens import formats
from agentrl.tokens import grammars


# What `str.strip` takes for blank.
_BLANK = r'\s\x1c-\x1f'


@formats.FORMATS.register('llama3')
@dataclasses.dataclass(frozen=True)
class Llama3Format:
  """A turn of nothing but {"name": ..., "parameters": {...}}; one call a turn, whose end is the turn's.

  Example:
    >>> Llama3Format().parse('{"name": "f", "parameters": {"x": 1}}')
    (ToolCall(name='f', arguments={'x': 1}, error=None),)
  """

  name = 'llama3'
  stops = ()
  markers = ('<|python_tag|>',)

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """See `formats.CallFormat`. A turn that opens like a call is one, if a malformed one."""
    body = text.strip().removeprefix(self.markers[0]).strip()
    if not body.startswith('{') or '"name"' not in body:
      return ()
    return (formats.json_call(body, arguments='parameters'),)

  def render(self, call: types.ToolCall) -> str:
    """See `formats.CallFormat`."""
    return formats.render_json_call(call, arguments='parameters')

  def final_answer(self, text: str) -> str | None:
    """See `formats.CallFormat`."""
    return None if self.parse(text) else text.strip()

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """See `formats.CallFormat`."""
    signatures = '\n'.join(json.dumps({'type': 'function', 'function': dict(t)}) for t in tools)
    return (f'You may call functions. Their signatures:\n{signatures}\n'
            'To call one, answer with nothing but\n{"name": <function>, "parameters": <object>}')

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """See `formats.CallFormat`. A turn that begins as a call does is one: other text does not begin with a brace."""
    del ids
    tag = grammars.pattern(self.markers[0])
    text = f'/[{_BLANK}]*([^{_BLANK}{{](?s:.*))?/ & ~/[{_BLANK}]*{tag}(?s:.*)/'
    return grammars.TurnGrammar(f'start: TEXT? | {grammars.literal(self.markers[0])}? blank call blank\n'
                                f'TEXT: {text}\n{grammars.json_calls(tools, arguments="parameters")}')
