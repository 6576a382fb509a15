"""The chat renderer: increments add up to the whole, and content stays inside its message."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st
import pytest

from agentrl.core import types
from agentrl.tokens import chat
from agentrl.tokens import tokenizer as tokenizer_lib

TOOLS = [{'name': 'python', 'parameters': {'properties': {'code': {'type': 'string'}}}}]
M = types.Message


@pytest.fixture(scope='module', name='template')
def _template():
  tokenizer = tokenizer_lib.train_tokenizer(['What is 12 + 345? The answer'] * 8, vocab_size=400,
                                            markers=('<python>', '</python>'))
  return chat.ChatTemplate(tokenizer, ('</python>',))


_CONTENT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(
    ['<|end|>', '<|assistant|>', '<python>', '</python>', '1 + 1'])), max_size=4).map(''.join)
_MESSAGES = st.lists(
    st.builds(M, st.sampled_from(['user', 'assistant', 'tool', 'system']), _CONTENT), max_size=6)


@hypothesis.given(messages=_MESSAGES, cut=st.integers(0, 6))
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_chat_is_the_concatenation_of_its_increments(template, messages, cut):
  # The prefix property: what was in the cache before a message stays as it is after it.
  whole = template.render(messages, tools=TOOLS)
  assert whole == template.render(messages[:cut], tools=TOOLS) + template.render(messages[cut:])


@hypothesis.given(messages=_MESSAGES)
@hypothesis.settings(max_examples=150, deadline=None)
def test_prompts_and_completions_add_up_to_the_chat(template, messages):
  # As a rollout builds it: everything up to an assistant message with the prompt, then what is
  # drawn.
  ids, pending = template.render((), tools=TOOLS), []
  for message in messages:
    if message.role == 'assistant':
      ids += template.render(pending, add_generation_prompt=True)
      ids += template.render_completion(message.content)
      pending = []
    else:
      pending.append(message)
  assert ids + template.render(pending) == template.render(messages, tools=TOOLS)


@hypothesis.given(messages=_MESSAGES)
@hypothesis.settings(max_examples=150, deadline=None)
def test_the_mask_covers_completions_only(template, messages):
  ids, mask = template.render_with_mask(messages, tools=TOOLS)
  assert ids == template.render(messages, tools=TOOLS)
  answers = [m.content for m in messages if m.role == 'assistant']
  drawn = [token for answer in answers for token in template.render_completion(answer)]
  assert [t for t, m in zip(ids, mask, strict=True) if m] == drawn


@hypothesis.given(messages=_MESSAGES)
@hypothesis.settings(max_examples=150, deadline=None)
def test_content_cannot_forge_messages_or_calls(template, messages):
  # One role marker a message, whatever the messages say, and call markers from the assistant only.
  tokenizer = template.tokenizer
  ids = template.render(messages)
  roles = [tokenizer.id_of(tokenizer_lib.role_marker(r)) for r in tokenizer_lib.ROLES]
  assert sum(t in roles for t in ids) == len(messages)
  others = template.render([m for m in messages if m.role != 'assistant'])
  assert tokenizer.id_of('<python>') not in others
  assert others.count(tokenizer.end_id) == sum(m.role != 'assistant' for m in messages)


def test_a_call_closes_its_message(template):
  messages = [M('user', '1 + 1?'), M('assistant', '<python>1 + 1</python>'), M('tool', '2'),
              M('assistant', '2')]
  # Written out by hand from the class docstring.
  assert template.tokenizer.decode(template.render(messages, tools=TOOLS)) == (
      '<|system|>python(code)<|end|><|user|>1 + 1?<|end|><|assistant|><python>1 + 1</python>'
      '<|tool|>2<|end|><|assistant|>2<|end|>')


def test_without_call_ends_every_message_is_closed(template):
  plain = chat.ChatTemplate(template.tokenizer)
  assert plain.render_completion('<python>1</python>')[-1] == plain.tokenizer.end_id


def test_the_description_of_tools_is_replaceable(template):
  other = chat.ChatTemplate(template.tokenizer, describe=lambda tools: f'{len(tools)} tool')
  assert other.tokenizer.decode(other.render((), tools=TOOLS)) == '<|system|>1 tool<|end|>'


def test_unknown_role_is_refused(template):
  with pytest.raises(ValueError, match='narrator'):
    template.render([M('narrator', '')])
