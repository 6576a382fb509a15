"""Call formats: how a call is written in text, as values. Needs no jax.

A format never raises on what a policy wrote: text that opens a call and is none becomes a ToolCall
whose `error` tells the policy what to mend. `parse(render(call)) == (call,)` for every call that
the format can write; `render` refuses the others.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Iterator, Mapping, Protocol, Sequence

from agentrl.core import registry
from agentrl.core import types
from agentrl.tokens import grammars

FORMATS: registry.Registry = registry.Registry('call format', 'agentrl.tokens.call_formats')


class CallFormat(Protocol):
  """How calls are written.

  Attributes:
    name: Under which `FORMATS` has its factory.
    stops: Strings at which a turn's sampling stops, because a call is complete; they belong to the
      sampled text. Empty if a turn may hold several calls: it then ends as any other turn.
    markers: Strings that the tokenizer keeps as single pieces.
  """

  name: str
  stops: tuple[str, ...]
  markers: tuple[str, ...]

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """Returns the calls in the text of a turn, in order; () if it holds none. Never raises."""

  def render(self, call: types.ToolCall) -> str:
    """Returns the text of a call.

    Raises:
      ValueError: if this format cannot write it.
    """

  def final_answer(self, text: str) -> str | None:
    """Returns the text without outer blanks, or None if it holds calls, malformed ones included."""

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns how to call the tools, for a system message.

    Args:
      tools: Each with 'name', 'description' and 'parameters' (a JSON schema).
    """

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """Returns what a turn may be, so that all `parse` finds in it are calls that fit one of the tools.

    Args:
      tools: As for `describe`.
      ids: The tokenizer's markers, by their text.
    Raises:
      ValueError: naming the tool that cannot be called so, or the marker that the tokenizer lacks.
    """


@dataclasses.dataclass(frozen=True)
class _Region:
  """A stretch of text that claims to be a call: its tag, and its content or what is wrong."""

  tag: str
  content: str = ''
  error: str | None = None


def _regions(text: str, tags: Sequence[str]) -> Iterator[_Region]:
  """Yields the calls written as <tag>content</tag>, oldest first.

  A tag that opens within another spoils the outer call up to its own close, or to the end of the
  text, and counts as one wrong call.
  """
  opened, start, nested = None, 0, None
  for match in re.finditer(f'<(/?)({"|".join(map(re.escape, tags))})>', text):
    closing, tag = match.groups()
    if opened is None and closing:
      yield _Region(tag, error=f'</{tag}> without <{tag}>')
    elif opened is None:
      opened, start, nested = tag, match.end(), None
    elif closing and tag == opened:
      content = text[start:match.start()]
      yield _Region(tag, error=nested) if nested else _Region(tag, content)
      opened = None
    elif nested is None:
      nested = f'</{tag}> inside <{opened}>' if closing else f'<{tag}> inside <{opened}>'
  if opened is not None:
    yield _Region(opened, error=nested or f'<{opened}> is not closed')


def _refuse_error(call: types.ToolCall):
  if call.error is not None:
    raise ValueError(f'a malformed call cannot be rendered: {call}')


@FORMATS.register('hermes')
@dataclasses.dataclass(frozen=True)
class HermesFormat:
  """`<tool_call>` around one JSON object with "name" and "arguments".

  A tag within an argument is written with an escaped '<', so every call can be written.

  Attributes:
    parallel: Whether a turn may hold several calls; else its sampling stops at the first.

  Example:
    >>> HermesFormat().parse('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    (ToolCall(name='f', arguments={'x': 1}, error=None),)
  """

  parallel: bool = False
  name = 'hermes'
  markers = ('<tool_call>', '</tool_call>')

  @property
  def stops(self) -> tuple[str, ...]:
    """See CallFormat."""
    return () if self.parallel else self.markers[1:]

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """See CallFormat."""
    return tuple(types.ToolCall('', {}, region.error) if region.error else
                 json_call(region.content) for region in _regions(text, ('tool_call',)))

  def render(self, call: types.ToolCall) -> str:
    """See CallFormat.

    Raises:
      ValueError: for a malformed call, and arguments that JSON cannot hold.
      TypeError: for arguments that JSON cannot hold.
    """
    body = render_json_call(call, escaped=self.markers)
    return f'{self.markers[0]}\n{body}\n{self.markers[1]}'

  def final_answer(self, text: str) -> str | None:
    """See CallFormat."""
    return None if self.parse(text) else text.strip()

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """See CallFormat."""
    signatures = '\n'.join(json.dumps({'type': 'function', 'function': dict(t)}) for t in tools)
    return (f'You may call functions. Their signatures:\n<tools>\n{signatures}\n</tools>\n'
            'Write a call as\n<tool_call>\n{"name": <function>, "arguments": <object>}\n'
            '</tool_call>')

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """See CallFormat. The tags are their tokens: no text spells them out, not even within an argument."""
    opening, closing = (grammars.token(m, ids) for m in self.markers)
    turn = f'start: (TEXT? {opening} blank call blank {closing})* TEXT?\nTEXT: {grammars.ANY}\n'
    return grammars.TurnGrammar(turn + grammars.json_calls(tools), tokens=self.markers, unspelled=self.markers)


def render_json_call(call: types.ToolCall, *, arguments: str = 'arguments',
                     escaped: Sequence[str] = ()) -> str:
  """Returns a call as one JSON object.

  Args:
    call: What to write.
    arguments: Key of its arguments.
    escaped: Markers that must not stand in it as they are.
  Raises:
    ValueError: for a malformed call, and arguments that JSON cannot hold.
    TypeError: for arguments that JSON cannot hold.
  """
  _refuse_error(call)
  body = json.dumps({'name': call.name, arguments: dict(call.arguments)}, ensure_ascii=False,
                    allow_nan=False)
  for marker in escaped:
    # Markers occur within strings only, where JSON has another way to write their first letter.
    body = body.replace(marker, f'\\u{ord(marker[0]):04x}{marker[1:]}')
  return body


def json_call(body: str, *, arguments: str = 'arguments',
              ignored: Sequence[str] = ()) -> types.ToolCall:
  """Returns the call that a JSON object is, or one whose `error` says why it is none.

  Args:
    body: Text of the object.
    arguments: Key of its arguments.
    ignored: Keys that it may have besides.
  """
  name = ''
  try:
    value = json.loads(body, object_pairs_hook=_distinct, parse_constant=_no_constant)
    if not isinstance(value, dict):
      raise ValueError(f'a call is a JSON object with "name" and "{arguments}"')
    if isinstance(value.get('name'), str):
      name = value['name']
    if not name:
      raise ValueError('"name" must be the name of a tool')
    if not isinstance(value.get(arguments), dict):
      raise ValueError(f'"{arguments}" must be an object')
    if set(value) - {'name', arguments, *ignored}:
      raise ValueError(f'a call has only "name" and "{arguments}"')
    json.dumps(value, ensure_ascii=False).encode('utf-8')
  except json.JSONDecodeError as error:
    return types.ToolCall(name, {}, f'invalid JSON: {error.msg} at character {error.pos}')
  except UnicodeEncodeError:
    return types.ToolCall('', {}, 'invalid JSON: not valid Unicode')
  except RecursionError:
    return types.ToolCall('', {}, 'invalid JSON: nested too deeply')
  except ValueError as error:
    return types.ToolCall(name, {}, str(error)[:200])
  return types.ToolCall(name, value[arguments])


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f'{twice[:40]!r} is given twice')
  return value


def _no_constant(text: str) -> None:
  raise ValueError(f'invalid JSON: {text} is not a JSON value')


@FORMATS.register('xml')
@dataclasses.dataclass(frozen=True)
class XmlFormat:
  """One tag a tool, its content the tool's one argument, as it stands: `<python>1 + 1</python>`.

  Cheapest to learn, as nothing is escaped; so a content that holds a tag of a tool cannot be
  written: `render` refuses it, and `parse` sees a nested call or an early end. Arguments are str.

  Attributes:
    arguments: (tool, argument) pairs: where the content of the tool's tag goes.
    parallel: Whether a turn may hold several calls; else its sampling stops at the first.

  Example:
    >>> XmlFormat((('python', 'code'),)).parse('So <python>1 + 1</python>')
    (ToolCall(name='python', arguments={'code': '1 + 1'}, error=None),)
  """

  arguments: tuple[tuple[str, str], ...]
  parallel: bool = False
  name = 'xml'

  @property
  def stops(self) -> tuple[str, ...]:
    """See CallFormat."""
    return () if self.parallel else tuple(f'</{tool}>' for tool, _ in self.arguments)

  @property
  def markers(self) -> tuple[str, ...]:
    """See CallFormat."""
    return tuple(m for tool, _ in self.arguments for m in (f'<{tool}>', f'</{tool}>'))

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """See CallFormat."""
    argument = dict(self.arguments)
    regions = _regions(text, tuple(argument)) if argument else ()
    return tuple(types.ToolCall(r.tag, {}, r.error) if r.error else
                 types.ToolCall(r.tag, {argument[r.tag]: r.content}) for r in regions)

  def render(self, call: types.ToolCall) -> str:
    """See CallFormat."""
    _refuse_error(call)
    argument = dict(self.arguments).get(call.name)
    content = call.arguments.get(argument)
    if argument is None or len(call.arguments) != 1 or not isinstance(content, str):
      raise ValueError(f'{call} is not one string for one of {self.arguments}')
    inside = next((m for m in self.markers if m in content), None)
    if inside:
      raise ValueError(f'{inside} cannot stand inside the call {call}')
    return f'<{call.name}>{content}</{call.name}>'

  def final_answer(self, text: str) -> str | None:
    """See CallFormat."""
    return None if self.parse(text) else text.strip()

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """See CallFormat."""
    argument = dict(self.arguments)
    lines = [f'<{t["name"]}>{argument[t["name"]]}</{t["name"]}>: {t["description"]}' for t in tools]
    return '\n'.join(['Tools:', *lines])

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """See CallFormat. A content holds no tag; enumerations and lengths of its schema are kept to."""
    del ids
    argument, rules, calls = dict(self.arguments), [], []
    for i, tool in enumerate(t for t in tools if t['name'] in argument):
      content = grammars.content(tool, argument[tool['name']], self.markers)
      opening, closing = (grammars.literal(m.format(tool['name'])) for m in ('<{}>', '</{}>'))
      # Lazy: each ends where its tag first does.
      rules.append(f'open_{i}[lazy]: OTHER {opening}\nclose_{i}[lazy]: CONTENT_{i} {closing}\nCONTENT_{i}: {content}\n')
      calls.append(f'open_{i} close_{i}')
    if not calls:
      raise ValueError(f'none of the tools {[t["name"] for t in tools]} has a tag; there are {list(argument)}')
    text = grammars.without(self.markers)
    return grammars.TurnGrammar(f'start: ({" | ".join(calls)})* TEXT?\nTEXT: {text}\nOTHER: {text}\n{"".join(rules)}')


def xml_format(tools: Sequence[Any], *, parallel: bool = False) -> XmlFormat:
  """Returns the XML format of some tools: content goes to the first required argument of each.

  Args:
    tools: Objects with `name` and `parameters`, a JSON schema.
    parallel: See XmlFormat.
  Raises:
    ValueError: if a tool has no argument or requires several, or its argument is not a string.
  """
  pairs = []
  for tool in tools:
    properties = tool.parameters.get('properties', {})
    required = list(tool.parameters.get('required', ())) or list(properties)[:1]
    if len(required) != 1 or properties[required[0]].get('type') != 'string':
      raise ValueError(f'tool {tool.name!r} cannot be written as one tag: it requires {required} '
                       f'of {properties}, not one string')
    pairs.append((tool.name, required[0]))
  return XmlFormat(tuple(pairs), parallel)


@FORMATS.register('fenced')
@dataclasses.dataclass(frozen=True)
class FencedFormat:
  """A Markdown code block whose language is a tool's name, as pretrained models write code.

  The closing fence and its newline stop the turn; blocks in other languages are text. A content
  that holds a fence cannot be written: `render` refuses it, and `parse` sees an early end.

  Attributes:
    arguments: (language, argument) pairs; the language is the tool's name.
    parallel: Whether a turn may hold several calls; else its sampling stops at the first.

  Example:
    >>> FencedFormat().parse('```python\\nprint(1)\\n```\\n')
    (ToolCall(name='python', arguments={'code': 'print(1)'}, error=None),)
  """

  arguments: tuple[tuple[str, str], ...] = (('python', 'code'),)
  parallel: bool = False
  name = 'fenced'
  markers = ('```',)

  @property
  def stops(self) -> tuple[str, ...]:
    """See CallFormat."""
    return () if self.parallel else ('```\n',)

  def parse(self, text: str) -> tuple[types.ToolCall, ...]:
    """See CallFormat."""
    argument, calls = dict(self.arguments), []
    # Fences come in pairs, so a block in another language must be walked over as a block.
    opening, position = re.compile(r'^```([^\n`]*)\n', re.MULTILINE), 0
    while match := opening.search(text, position):
      language = match.group(1).strip()
      end = text.find('```', match.end())
      position = len(text) if end < 0 else end + 3
      if language not in argument:
        continue
      if end < 0:
        calls.append(types.ToolCall(language, {}, 'the code block is not closed'))
      elif text[position:].split('\n', 1)[0].strip():
        calls.append(types.ToolCall(language, {}, 'text after the closing ```'))
        position = len(text)
      else:
        content = text[match.end():end]
        calls.append(types.ToolCall(language, {argument[language]: content.removesuffix('\n')}))
    return tuple(calls)

  def render(self, call: types.ToolCall) -> str:
    """See CallFormat."""
    _refuse_error(call)
    argument = dict(self.arguments).get(call.name)
    content = call.arguments.get(argument)
    if argument is None or len(call.arguments) != 1 or not isinstance(content, str):
      raise ValueError(f'{call} is not one string for one of {self.arguments}')
    if '```' in content:
      raise ValueError(f'``` cannot stand inside the call {call}')
    return f'```{call.name}\n{content}\n```\n'

  def final_answer(self, text: str) -> str | None:
    """See CallFormat; code blocks in other languages are part of the answer."""
    return None if self.parse(text) else text.strip()

  def describe(self, tools: Sequence[Mapping[str, Any]]) -> str:
    """See CallFormat."""
    lines = [f'```{t["name"]}```: {t["description"]}' for t in tools]
    return '\n'.join(['Code blocks in these languages are run:', *lines])

  def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int]) -> grammars.TurnGrammar:
    """See CallFormat. A content holds no fence; enumerations and lengths of its schema are kept to."""
    del ids
    argument, rules, calls = dict(self.arguments), [], []
    # As `parse` finds it: at the start of a line, blanks around the language.
    opening = lambda language: f'```[^\\S\\n]*({language})[^\\S\\n]*\\n'
    for i, tool in enumerate(t for t in tools if t['name'] in argument):
      content = grammars.content(tool, argument[tool['name']], self.markers)
      rules.append(f'open_{i}[lazy]: /((?s:.*)\\n)?{opening(grammars.pattern(tool["name"]))}/\n'
                   f'close_{i}[lazy]: CONTENT_{i} "```\\n"\nCONTENT_{i}: (({content}) /\\n?/) & ~/(?s:.*)`/\n')
      calls.append(f'open_{i} close_{i}')
    if not calls:
      raise ValueError(f'none of the tools {[t["name"] for t in tools]} has blocks; there are {list(argument)}')
    blocks = opening('|'.join(grammars.pattern(name) for name in argument))
    text = f'TEXT: {grammars.ANY} & ~/((?s:.*)\\n)?{blocks}(?s:.*)/\n'
    return grammars.TurnGrammar(f'start: ({" | ".join(calls)})* TEXT?\n{text}{"".join(rules)}')


def make(name: str, tools: Sequence[Any]) -> CallFormat:
  """Returns the call format of that name for some tools.

  Args:
    name: 'xml', 'hermes', 'fenced', or another that is registered.
    tools: Objects with `name` and `parameters`; only XML, which has a tag for each, reads them.
  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
    ValueError: if a tool cannot be written in this format.
  """
  factory = FORMATS.get(name)
  return xml_format(tools) if factory is XmlFormat else factory()
