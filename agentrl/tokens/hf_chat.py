"""A checkpoint's own chat template, behind the interface of `agentrl.tokens.chat.ChatTemplate`."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from typing import Any, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2 import sandbox

from agentrl.core import types
from agentrl.tokens import formats
from agentrl.tokens.hf_tokenizer import BREAK, CALL_MARKERS, HFTokenizer, content_of

# Something that no chat says: where a template put an earlier turn, by which what follows it is found.
_LANDMARK = 'agentrl7landmark'
_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')


@dataclasses.dataclass(frozen=True)
class ChatFamily:
  """What a family's chats need besides the template.

  Attributes:
    stops: Tokens that end the policy's turn, the usual one first. Those that a tokenizer lacks do not count.
    call_format: Name of the format that the family was trained to write calls in, see `formats.FORMATS`.
    settings: Of the format.
    ends: Tokens by which the template ends a turn of the past, where those are others.
  """

  stops: tuple[str, ...]
  call_format: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ends: tuple[str, ...] = ()

  def make_format(self) -> Any:
    """Returns the call format. Turns end at `stops` alone, so that the context holds what the template would."""
    return formats.FORMATS.get(self.call_format)(**self.settings)


_CHATML = ChatFamily(('<|im_end|>', '<|endoftext|>'), 'hermes', {'parallel': True})
# By config.json's "model_type".
CHAT_FAMILIES: Mapping[str, ChatFamily] = {
    'qwen2': _CHATML,
    'qwen3': _CHATML,
    'qwen3_moe': _CHATML,
    'llama': ChatFamily(('<|eot_id|>', '<|eom_id|>', '<|end_of_text|>'), 'llama3'),
    'mistral': ChatFamily(('</s>',), 'mistral'),
    # It has no calls of its own; code blocks it knows.
    'gemma3_text': ChatFamily(('<end_of_turn>', '<eos>'), 'fenced', {'parallel': True}),
    'gpt_oss': ChatFamily(('<|return|>', '<|call|>'), 'harmony', ends=('<|end|>',)),
}


class HFChatTemplate:
  """Messages to ids by a Jinja template, equal to what `transformers.apply_chat_template` gives.

  Two things differ from it. What users and tools wrote never becomes a marker, whatever the template does with it. And
  a stretch of a chat that follows a turn of the policy can be rendered alone, to be appended to what was sampled: it
  is what the template puts behind such a turn.
  """

  def __init__(self, tokenizer: HFTokenizer, template: str | Mapping[str, str], *,
               stops: Sequence[str] | None = None, ends: Sequence[str] = (),
               call_markers: Sequence[str] = CALL_MARKERS, tools: Sequence[Mapping[str, Any]] = (),
               variables: Mapping[str, Any] | None = None):
    """Compiles a template.

    Args:
      tokenizer: Of the policy.
      template: Text of it, or several by name: 'tool_use' is then for chats with tools, 'default' for the others.
      stops: Texts that end a turn; None for the tokenizer's.
      ends: What the template ends a turn of the past with, if with none of these.
      call_markers: Markers that the content of an assistant message may have: a call format's.
      tools: Listed at the beginning of every chat for which none are given.
      variables: Further ones that the template reads, such as enable_thinking.
    Raises:
      ValueError: if it is no Jinja template, with the line.
    """
    self.tokenizer = tokenizer
    self._stops = tuple(tokenizer.stops if stops is None else stops)
    self._tools = tuple(tools)
    self._ends = (*self._stops, *ends)
    self._structural = tuple(m for m in tokenizer.markers if m not in call_markers)
    named = {'default': template} if isinstance(template, str) else dict(template)
    try:
      self._templates = {name: _environment().from_string(text) for name, text in named.items()}
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(f'the chat template cannot be read: line {error.lineno}: {error}') from error
    tokens = {name: content_of(tokenizer.settings.get(name)) for name in _TOKENS}
    self._variables = {**{k: v for k, v in tokens.items() if v is not None}, **(variables or {})}

  @classmethod
  def load(cls, folder: str | os.PathLike, tokenizer: HFTokenizer, **settings: Any) -> HFChatTemplate:
    """Reads a checkpoint's template.

    Args:
      folder: With chat_template.jinja, or a tokenizer_config.json that holds it.
      tokenizer: Of the policy.
      **settings: As for the constructor.
    Raises:
      FileNotFoundError: if there is none.
    """
    path = pathlib.Path(folder) / 'chat_template.jinja'
    if path.exists():
      return cls(tokenizer, path.read_text(encoding='utf-8'), **settings)
    template = tokenizer.settings.get('chat_template')
    if not template:
      raise FileNotFoundError(f'{folder} has neither chat_template.jinja nor a "chat_template" in '
                              'tokenizer_config.json; a base model has none: take the one of its chat version')
    if not isinstance(template, str):
      template = {entry['name']: entry['template'] for entry in template}
    return cls(tokenizer, template, **settings)

  @property
  def stops(self) -> tuple[str, ...]:
    """Strings at which the policy's turn ends."""
    return self._stops

  @property
  def lists_tools(self) -> bool:
    """Whether the template writes out the tools it is given."""
    ask = {'role': 'user', 'content': 'Hello.'}
    tool = {'name': _LANDMARK, 'description': '', 'parameters': {'type': 'object', 'properties': {}}}
    return _LANDMARK in self.text([ask], tools=[tool])

  def text(self, messages: Sequence[types.Message | Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
           add_generation_prompt: bool = False) -> str:
    """Returns a whole chat as the template writes it.

    Args:
      messages: In order. A mapping may have further entries, such as "tool_calls", which the template reads.
      tools: Schemas, each {'name', 'description', 'parameters'} or as {'type': 'function', 'function': ...}; () for
        those that the constructor was given.
      add_generation_prompt: Whether what opens the assistant's turn follows.
    Raises:
      ValueError: if the template refuses the chat, with its words.
    """
    tools = tools or self._tools
    given = [_entries(m) for m in messages]
    named = 'tool_use' if tools and 'tool_use' in self._templates else 'default'
    described = [t if 'function' in t else {'type': 'function', 'function': dict(t)} for t in tools]
    try:
      return self._templates[named].render(
          messages=given, tools=described or None, documents=None, add_generation_prompt=add_generation_prompt,
          **self._variables)
    except jinja2.TemplateError as error:
      raise ValueError(f'the chat template refuses the chat of roles {[m["role"] for m in given]}: {error}') from error

  def render(self, messages: Sequence[types.Message | Mapping[str, Any]], *,
             tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = False,
             continued: bool | None = None) -> list[int]:
    """Returns the ids of messages.

    Args:
      messages: In order: a chat from its beginning, or what follows a turn of the policy.
      tools: Schemas to list at the beginning; () for none.
      add_generation_prompt: Whether what opens the assistant's turn follows, for the policy to go on.
      continued: Whether they follow a turn of the policy, which ended in one of `stops`. None: they do if the first
        is of role 'tool', which no chat begins with.
    Raises:
      ValueError: if the template refuses them.
    """
    messages = [self._guarded(m) for m in messages]
    if continued is None:
      continued = bool(messages) and messages[0]['role'] == 'tool'
    if not continued:
      text = self.text(messages, tools=tools, add_generation_prompt=add_generation_prompt)
    else:
      text = self._after_turn(messages, add_generation_prompt)
    return self.tokenizer.encode(text, allow_markers=True)

  def _after_turn(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Renders the messages behind a made-up turn and returns what stands behind its end."""
    turn = {'role': 'assistant', 'content': _LANDMARK}
    if messages and messages[0]['role'] == 'tool':
      results = [m for m in messages if m['role'] == 'tool']
      calls = [{'id': f'call{i:05}', 'type': 'function',
                'function': {'name': m.get('name', 'tool'), 'arguments': {_LANDMARK: _LANDMARK}}}
               for i, m in enumerate(results)]
      turn = {'role': 'assistant', 'content': '', 'tool_calls': calls}
      ids = iter(call['id'] for call in calls)
      messages = [{'name': 'tool', 'tool_call_id': next(ids), **m} if m['role'] == 'tool' else m for m in messages]
    opening = {'role': 'user', 'content': 'Hello.'}
    text = self.text([opening, turn, *messages], add_generation_prompt=add_generation_prompt)
    place = text.rfind(_LANDMARK)
    ends = [(text.index(s, place), s) for s in self._ends if s in text[place:]] if place >= 0 else []
    if not ends:
      raise ValueError(f'the chat template shows no assistant turn that ends in one of {self._ends}, so that nothing '
                       'can be appended to a turn; name the end that it writes')
    at, stop = min(ends)
    return text[at + len(stop):]

  def render_completion(self, content: str) -> list[int]:
    """Returns the ids that a policy would draw to write an assistant message: calls included, and its end."""
    stop = next((s for s in self._stops if content.endswith(s)), None)
    body = self._guard(content.removesuffix(stop or ''), self._structural)
    end = self.tokenizer.end_id if stop is None else self.tokenizer.id_of(stop)
    return self.tokenizer.encode(body, allow_markers=True) + [end]

  def render_with_mask(self, messages: Sequence[types.Message | Mapping[str, Any]], *,
                       tools: Sequence[Mapping[str, Any]] = ()) -> tuple[list[int], list[bool]]:
    """Returns the ids of a whole chat, put together as a rollout would, and which of them the assistant wrote.

    Returns:
      [n] ids and [n] bools: content and end of assistant messages.
    Raises:
      ValueError: if the chat begins with the assistant.
    """
    ids, mask, given, continued = [], [], [], False
    for message in map(_entries, messages):
      if message['role'] != 'assistant':
        given.append(message)
        continue
      if not given:
        raise ValueError('an assistant message must follow one of another role')
      prompt = self.render(given, tools=() if continued else tools, add_generation_prompt=True, continued=continued)
      completion = self.render_completion(message['content'])
      ids += prompt + completion
      mask += [False] * len(prompt) + [True] * len(completion)
      given, continued = [], True
    rest = self.render(given, tools=() if continued else tools, continued=continued) if given else []
    return ids + rest, mask + [False] * len(rest)

  def _guarded(self, message: types.Message | Mapping[str, Any]) -> dict[str, Any]:
    entries = _entries(message)
    markers = self._structural if entries['role'] == 'assistant' else self.tokenizer.markers
    return {k: v if k == 'role' else self._guard(v, markers) for k, v in entries.items()}

  def _guard(self, value: Any, markers: Sequence[str]) -> Any:
    """Breaks the markers in all strings of a value."""
    if isinstance(value, str):
      for marker in markers:
        value = value.replace(marker, marker[0] + BREAK + marker[1:])
      return value
    if isinstance(value, Mapping):
      return {k: self._guard(v, markers) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [self._guard(v, markers) for v in value]
    return value


def _entries(message: types.Message | Mapping[str, Any]) -> dict[str, Any]:
  """Returns a message as templates read it, who ask whether there is a name."""
  if isinstance(message, types.Message):
    message = {k: v for k, v in dataclasses.asdict(message).items() if v is not None}
  return dict(message)


class _Generation(jinja2.ext.Extension):
  """Passes what stands between {% generation %} and {% endgeneration %}, by which templates mark what to train on."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> sandbox.ImmutableSandboxedEnvironment:
  """Returns the environment that templates of checkpoints are written for: that of transformers."""
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment
