"""gpt-oss's calls: messages on a channel, addressed to a function."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Mapping, Sequence

from agentrl.core import types
from agentrl.tokens import formats
from agentrl.tokens import grammars

_CALL = re.compile(r'<\|channel\|>commentary to=functions\.(\S+?)\s*(?:<\|constrain\|>\s*\w+|json)?\s*<\|message\|>'
                   r'(.*?)(?:<\|call\|>|<\|end\|>|<\|return\|>|\Z)', re.DOTALL)
_FINAL = re.compile(r'<\|channel\|>final(?:\s*<\|constrain\|>\s*\w+)?\s*<\|message\|>'
                    r'(.*?)(?:<\|return\|>|<\|end\|>|\Z)', re.DOTALL)
_MARKERS = ('<|start|>', '<|end|>', '<|message|>', '<|channel|>', '<|constrain|>', '<|call|>', '<|return|>')


@formats.FORMATS.register('harmony')
@dataclasses.dataclass(frozen=True)
class HarmonyFormat:
  """A turn of messages, each with a channel: thoughts, calls (JSON arguments, named in the header), the answer.

  Example:
    >>> HarmonyFormat().parse('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>')
    (ToolCall(name='f', arguments={'x': 1}, error=None),)
  """

  name = 'harmony'
  stops = ('<|call|>',)
  markers = _MARKERS

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """See `formats.CallFormat`."""
    calls = []
    for name, body in _CALL.findall(text):
      try:
        wrapped = json.dumps({'name': name, 'arguments': json.loads(body)})
      except (ValueError, RecursionError) as error:
        calls.append(types.ToolCall(name, {}, f'invalid JSON: {error}'[:200]))
      else:
        calls.append(formats.json_call(wrapped))
    return tuple(calls)

  def render(self, call: types.ToolCall) -> str:
    """See `formats.CallFormat`.

    Raises:
      ValueError: also for a name with a blank, which would end it.
    """
    body = formats.render_json_call(call, escaped=_MARKERS)  # refuses what JSON cannot hold
    arguments = json.dumps(json.loads(body)['arguments'], ensure_ascii=False)
    for marker in _MARKERS:
      arguments = arguments.replace(marker, '\\u003c' + marker[1:])
    if not re.fullmatch(r'[^\s<]+', call.name):
      raise ValueError(f'{call.name!r} cannot be the name of a function in a header')
    return f'<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>{arguments}<|call|>'

  def final_answer(self, text: str) -> str | None:
    """See `formats.CallFormat`; what is on the final channel, or all of a text without channels."""
    if self.parse(text):
      return None
    final = _FINAL.findall(text)
    return (final[-1] if final else text).strip()

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """See `formats.CallFormat`."""
    signatures = '\n'.join(json.dumps({'type': 'function', 'function': dict(t)}) for t in tools)
    return (f'You may call functions on the commentary channel. Their signatures:\n{signatures}')

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """See `formats.CallFormat`. Markers are their tokens: no text spells them out, not even within an argument."""
    start, end, message, channel, constrain, call, _ = (grammars.token(m, ids) for m in _MARKERS)
    names = [f'name_{i}: {grammars.literal(t["name"])} (" " {constrain}? "json")? {message} {grammars.json_arguments(t)}\n'
             for i, t in enumerate(tools)]
    turn = (f'start: TEXT? (({start} | {end} | {message} | {constrain}) TEXT? | {channel} (OTHER? | to))*\n'
            f'to: "commentary to=functions." ({" | ".join(f"name_{i}" for i in range(len(tools)))}) {call} TEXT?\n'
            f'TEXT: {grammars.ANY}\nOTHER: {grammars.ANY} & ~/commentary\\x20to=functions\\.(?s:.*)/\n{"".join(names)}')
    return grammars.TurnGrammar(turn, tokens=_MARKERS[:-1], unspelled=_MARKERS)
