"""The one renderer of chats."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

from agentrl.core import types
from agentrl.tokens import tokenizer as tokenizer_lib


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
  """Returns a one-line listing of tools: names and parameters, no prose.

  Args:
    tools: JSON schemas: {'name', 'parameters': {'properties': {...}}}.
  Example:
    >>> describe_tools([{'name': 'python', 'parameters': {'properties': {'code': {}}}}])
    'python(code)'
  """
  calls = []
  for tool in tools:
    properties = tool.get('parameters', {}).get('properties', {})
    calls.append(f"{tool['name']}({', '.join(properties)})")
  return '; '.join(calls)


class ChatTemplate:
  """Messages to ids, one message after the other: rendering distributes over concatenation.

      render(a + b) == render(a) + render(b)

  A message is its role marker, its content and the end marker (without the line breaks):

      <|system|>python(code)<|end|>
      <|user|>2 + 2?<|end|>
      <|assistant|><python>2+2</python><|tool|>4<|end|>
      <|assistant|>4<|end|>

  An assistant message that ends in a call is closed by the call's own last marker: that is where
  sampling stops, so that nothing the policy did not draw stands inside its turn. Markers are
  recognised in assistant messages only, and there only those of calls.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, call_ends: Sequence[str] = (), *,
               describe: Callable[[Sequence[Mapping[str, Any]]], str] = describe_tools):
    """Binds a tokenizer.

    Args:
      tokenizer: Of the policy.
      call_ends: Strings that close a call and with it the turn, such as '</python>': a call
        format's `stops`.
      describe: Words the system message about tools; a call format's `describe` says more.
    """
    self.tokenizer = tokenizer
    self._call_ends = tuple(call_ends)
    self._describe = describe
    # Without role markers and the end marker, content cannot leave its message.
    structural = (tokenizer_lib.END, *map(tokenizer_lib.role_marker, tokenizer_lib.ROLES))
    self._call_markers = frozenset(m for m in tokenizer.markers if m not in structural)

  @property
  def stops(self) -> tuple[str, ...]:
    """Strings at which a turn ends that calls nothing."""
    return (tokenizer_lib.END,)

  def render(self, messages: Sequence[types.Message], *, tools: Sequence[Mapping[str, Any]] = (),
             add_generation_prompt: bool = False, continued: bool | None = None) -> list[int]:
    """Returns the ids of messages.

    Args:
      messages: In order; any stretch of a chat, so that increments can be rendered alone.
      tools: Schemas to list in a system message before the first message; () for no such message.
      add_generation_prompt: Whether the assistant's marker follows, for the policy to go on.
      continued: Whether they follow a turn of the policy; makes no difference here, as it does to
        templates of checkpoints.
    Returns:
      [n] ids.
    Raises:
      ValueError: if a role is unknown.
    """
    del continued
    ids = []
    if tools:
      ids += self._message(types.Message('system', self._describe(tools)))
    for message in messages:
      ids += self._message(message)
    if add_generation_prompt:
      ids.append(self.tokenizer.id_of(tokenizer_lib.role_marker('assistant')))
    return ids

  def render_completion(self, content: str) -> list[int]:
    """Returns the ids that a policy would draw to write an assistant message: no role marker."""
    ids = self.tokenizer.encode(content, allow_markers=self._call_markers)
    return ids if self._ends_in_call(content) else ids + [self.tokenizer.end_id]

  def render_with_mask(self, messages: Sequence[types.Message], *,
                       tools: Sequence[Mapping[str, Any]] = ()) -> tuple[list[int], list[bool]]:
    """Returns the ids of a whole chat and which of them the assistant wrote.

    Returns:
      [n] ids, equal to `render(messages, tools=tools)`, and [n] bools: content and closing marker
      of assistant messages, not the role marker, which is given.
    """
    ids = self.render((), tools=tools)
    mask = [False] * len(ids)
    for message in messages:
      if message.role == 'assistant':
        completion = self.render_completion(message.content)
        ids += self.render((), add_generation_prompt=True) + completion
        mask += [False] + [True] * len(completion)
      else:
        new = self._message(message)
        ids += new
        mask += [False] * len(new)
    return ids, mask

  def _message(self, message: types.Message) -> list[int]:
    if message.role not in tokenizer_lib.ROLES:
      raise ValueError(f'unknown role {message.role!r}; known: {tokenizer_lib.ROLES}')
    marker = self.tokenizer.id_of(tokenizer_lib.role_marker(message.role))
    if message.role == 'assistant':
      return [marker, *self.render_completion(message.content)]
    return [marker, *self.tokenizer.encode(message.content), self.tokenizer.end_id]

  def _ends_in_call(self, content: str) -> bool:
    return bool(self._call_ends) and content.endswith(self._call_ends)
