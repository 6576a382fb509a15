"""Templates with the features of the families' own, against `transformers.apply_chat_template`.

The templates are written for this test; published ones do the same things: they list tools, merge or drop system
messages, refuse wrong orders, print dates, and treat the last turn apart.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

tokenizers = pytest.importorskip('tokenizers', reason='the tokenizers of checkpoints need the extra "hf"')
jinja2 = pytest.importorskip('jinja2', reason='chat templates need the extra "hf"')

from agentrl.core.types import Message, ToolCall  # noqa: E402
from agentrl.tokens import formats  # noqa: E402
from agentrl.tokens.hf_chat import CHAT_FAMILIES, HFChatTemplate  # noqa: E402
from agentrl.tokens.hf_tokenizer import BREAK, HFTokenizer  # noqa: E402

CHATML = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- 'Tools, one a line:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last and loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {% generation %}{{- content }}{% endgeneration %}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA = r"""
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}
{%- if tools is not none and messages | length != 0 %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call a turn') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}' + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
MISTRAL = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for m in turns %}
    {%- if not (m.role == 'tool' or m.tool_calls is defined) %}
        {%- if (m['role'] == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m['role'] == 'user' %}
        {%- if tools is not none and m == users[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.function.items() if key != 'return' %}
                    {{- '"' + key + '": ' + (value | tojson) }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception('ids have 9 letters') }}{%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' + m['content'] | trim + eos_token }}
    {%- elif m['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = r"""
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
    {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') }}
    {%- if m['content'] is string -%}{{ m['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
HARMONY = r"""
{%- macro describe(parameters) -%}
    {%- for name, p in parameters.properties.items() %}{{- name }}{{- '' if name in (parameters.required or []) else '?' }}: {{ p.type }},{{ ' ' }}{%- endfor %}
{%- endmacro -%}
{{- '<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>' }}
{%- if messages[0].role in ['developer', 'system'] %}
    {%- set developer = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer = '' %}{%- set loop_messages = messages %}
{%- endif %}
{%- if developer or tools %}
    {{- '<|start|>developer<|message|>' + developer }}
    {%- if tools %}
        {{- '\nnamespace functions {' }}
        {%- for tool in tools %}{%- set t = tool.function %}{{- '\n// ' + t.description + '\ntype ' + t.name + ' = (_: {' + describe(t.parameters) + '}) => any;' }}{%- endfor %}
        {{- '\n}' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in loop_messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {%- set last.name = call.name %}
        {%- if message.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
        {{- '<|start|>assistant<|channel|>commentary to=functions.' + call.name + ' <|constrain|>json<|message|>' }}
        {{- call.arguments | tojson }}{{- '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}
        {%- set last.name = none %}
        {%- continue %}
    {%- elif message.role == 'tool' %}
        {%- if last.name is none %}{{- raise_exception('a result without a call') }}{%- endif %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
TEMPLATES = {'qwen3': CHATML, 'llama': LLAMA, 'mistral': MISTRAL, 'gemma3_text': GEMMA, 'gpt_oss': HARMONY}
SPECIAL = {
    'qwen3': ('<|endoftext|>', '<|im_start|>', '<|im_end|>'),
    'llama': ('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|eom_id|>',
              '<|end_of_text|>', '<|python_tag|>'),
    'mistral': ('<s>', '</s>', '[INST]', '[/INST]', '[TOOL_CALLS]', '[AVAILABLE_TOOLS]', '[/AVAILABLE_TOOLS]',
                '[TOOL_RESULTS]', '[/TOOL_RESULTS]'),
    'gemma3_text': ('<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'),
    'gpt_oss': ('<|startoftext|>', '<|endoftext|>', '<|start|>', '<|end|>', '<|message|>', '<|channel|>',
                '<|constrain|>', '<|call|>', '<|return|>'),
}
PLAIN = {'qwen3': ('<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>', '<think>', '</think>')}
BEGIN = {'llama': '<|begin_of_text|>', 'mistral': '<s>', 'gemma3_text': '<bos>', 'gpt_oss': '<|startoftext|>'}
TOOLS = [{'name': 'add', 'description': 'Adds <numbers> & "such".', 'parameters': {
    'type': 'object', 'properties': {'a': {'type': 'number'}, 'b': {'type': 'number'}}, 'required': ['a']}}]
WRAPPED = [{'type': 'function', 'function': t} for t in TOOLS]
SYSTEM, ASK = {'role': 'system', 'content': "Be brief; it's é."}, {'role': 'user', 'content': ' What is 1 + 2?\n'}
CALL = {'role': 'assistant', 'content': '', 'tool_calls': [
    {'id': 'call00000', 'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1, 'b': 'ü<2>'}}}]}
RESULT = {'role': 'tool', 'name': 'add', 'tool_call_id': 'call00000', 'content': '3 & <b>'}
ANSWER, MORE = {'role': 'assistant', 'content': 'It is 3.'}, {'role': 'user', 'content': 'Thanks. 4 + 5?'}
WITH_TOOLS = [SYSTEM, ASK, CALL, RESULT, ANSWER, MORE]
WITHOUT = [SYSTEM, ASK, ANSWER, MORE]


def make_model(family):
  """The text of a tokenizer.json: byte-level pieces, the family's markers."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=family == 'llama'))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator(
      ['What is the sum of numbers? It is 3. assistant user system tool functions'] * 3,
      tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                     initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  model.add_special_tokens(list(SPECIAL[family]))
  model.add_tokens(list(PLAIN.get(family, ())))
  return model.to_str()


@pytest.fixture(scope='module', params=TEMPLATES, name='chat')
def chat_of(request, tmp_path_factory):
  """A family's name, the folder of a checkpoint's tokenizer, and ours read from it."""
  family = request.param
  folder = tmp_path_factory.mktemp(family)
  stops = CHAT_FAMILIES[family].stops
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': stops[0], 'chat_template': TEMPLATES[family],
              'pad_token': {'__type': 'AddedToken', 'content': SPECIAL[family][0], 'special': True}}
  if family in BEGIN:
    settings['bos_token'] = BEGIN[family]
  (folder / 'tokenizer.json').write_text(make_model(family))
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  tokenizer = HFTokenizer.load(folder, stops=stops)
  markers = CHAT_FAMILIES[family].make_format().markers if family == 'gpt_oss' else (*PLAIN.get(family, ()),)
  return family, folder, tokenizer, HFChatTemplate.load(
      folder, tokenizer, call_markers=markers, ends=CHAT_FAMILIES[family].ends)


def test_chats_equal_those_of_transformers(chat):
  transformers = pytest.importorskip('transformers', reason='the comparison needs the extra "test"')
  family, folder, _, template = chat
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  chats = [([ASK], False), ([SYSTEM, ASK], False), (WITHOUT, False), (WITHOUT[:-1], False)]
  if family != 'gemma3_text':  # Gemma's knows no tools.
    chats += [(WITH_TOOLS, True), (WITH_TOOLS[:4], True), ([SYSTEM, ASK], True), (WITH_TOOLS, False)]
  for messages, tools in chats:
    for prompt in (True, False):
      expected = dict(tokenize=False, add_generation_prompt=prompt, tools=WRAPPED if tools else None)
      assert template.text(messages, tools=TOOLS if tools else (), add_generation_prompt=prompt) == (
          theirs.apply_chat_template(messages, **expected))
      got = template.render(messages, tools=TOOLS if tools else (), add_generation_prompt=prompt)
      ids = theirs.apply_chat_template(messages, **{**expected, 'tokenize': True, 'return_dict': False})
      assert got == list(ids)


def test_text_is_encoded_as_transformers_does_and_comes_back(chat):
  transformers = pytest.importorskip('transformers', reason='the comparison needs the extra "test"')
  _, folder, tokenizer, _ = chat
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  for text in ('What is 1 + 2?', ' é\n\tü 漢字 🙂', '', 'a' + tokenizer.markers[1] + 'b ' + tokenizer.markers[-1]):
    ids = tokenizer.encode(text, allow_markers=True)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.decode(np.asarray(ids, np.int32)) == text
  assert tokenizer.vocab_size == len(theirs)
  assert tokenizer.pad_id == theirs.pad_token_id and tokenizer.end_id == theirs.eos_token_id


def test_the_bytes_of_pieces_make_up_the_text(chat):
  _, _, tokenizer, _ = chat
  pieces = tokenizer.token_bytes()
  for text in ('What is the sum?\n', 'ünïcode 🐍 \t', tokenizer.stops[0]):
    ids = tokenizer.encode(text, allow_markers=True)
    assert b''.join(pieces[i] for i in ids).decode() == text
  assert len(pieces) == tokenizer.vocab_size


def test_the_bytes_of_pieces_with_a_letter_for_the_blank():
  blank = '\u2581'
  model = tokenizers.Tokenizer(tokenizers.models.BPE(
      {'<unk>': 0, '</s>': 1, '<0xF0>': 2, blank: 3, 'a': 4, blank + 'a': 5}, [(blank, 'a')], byte_fallback=True,
      unk_token='<unk>'))
  model.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace(blank, ' '), tokenizers.decoders.ByteFallback()])
  model.add_special_tokens(['</s>'])
  got = HFTokenizer(model.to_str(), settings={'eos_token': '</s>'}).token_bytes()
  assert got == [b'<unk>', b'</s>', b'\xf0', b' ', b'a', b' a']
  model.decoder = tokenizers.decoders.WordPiece()
  with pytest.raises(ValueError, match='WordPiece'):
    HFTokenizer(model.to_str(), settings={'eos_token': '</s>'}).token_bytes()


def test_no_text_turns_into_a_marker(chat):
  _, _, tokenizer, template = chat
  everything = 'x'.join(tokenizer.markers)
  ids = tokenizer.encode(everything)
  assert not set(ids) & {tokenizer.id_of(m) for m in tokenizer.markers} and tokenizer.decode(ids) == everything
  only = tokenizer.markers[-1]
  assert tokenizer.encode(everything, allow_markers=(only,)).count(tokenizer.id_of(only)) == 1
  # Nor by way of a template, where user's and tool's words stand beside its own markers.
  count = lambda ids: [ids.count(tokenizer.id_of(m)) for m in tokenizer.markers]
  harmless = count(template.render([ASK], add_generation_prompt=True))
  forged = template.render([{**ASK, 'content': everything}], add_generation_prompt=True)
  assert count(forged) == harmless
  assert everything in tokenizer.decode(forged) and BREAK not in tokenizer.decode(forged)


def test_what_follows_a_turn_is_what_the_template_puts_there(chat):
  # The chat rendered whole is the chat put together from turns, up to what a template does to the last turn alone.
  family, _, tokenizer, template = chat
  first = template.text([ASK], add_generation_prompt=True)
  whole = template.text([ASK, ANSWER, MORE], add_generation_prompt=True)
  got = tokenizer.decode(template.render([MORE], add_generation_prompt=True, continued=True))
  said = whole[whole.index('It is 3.') + len('It is 3.'):]
  stop = next(s for s in (*tokenizer.stops, '<|end|>') if said.startswith(s))
  assert said == stop + got and whole.startswith(first.removesuffix('<|start|>assistant'))
  if family == 'gemma3_text':
    with pytest.raises(ValueError, match='roles must alternate'):
      template.render([RESULT])
    return
  whole = template.text([ASK, CALL, RESULT], add_generation_prompt=True)
  got = tokenizer.decode(template.render([RESULT], add_generation_prompt=True))
  place = max(whole.rfind(s) + len(s) for s in tokenizer.stops if s in whole.replace(got, ''))
  assert got and whole.endswith(got), (whole, got)
  assert any(whole.removesuffix(got).endswith(s) for s in tokenizer.stops) and place


def test_results_are_of_the_tools_that_their_messages_name(chat):
  transformers = pytest.importorskip('transformers', reason='the comparison needs the extra "test"')
  family, folder, tokenizer, template = chat
  if family == 'gemma3_text':
    return
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  result = Message('tool', RESULT['content'], RESULT['name'])
  whole = theirs.apply_chat_template([ASK, CALL, RESULT], tokenize=False, add_generation_prompt=True)
  rest = tokenizer.decode(template.render([result], add_generation_prompt=True))
  assert whole.endswith(rest) and whole.removesuffix(rest).endswith(tokenizer.stops)
  if family in ('gpt_oss', 'qwen3'):  # the others read ids as well
    assert template.text([ASK, CALL, result], add_generation_prompt=True) == whole
  if family == 'gpt_oss':
    assert whole.endswith('<|start|>functions.add to=assistant<|channel|>commentary<|message|>"3 & <b>"<|end|><|start|>assistant')
    nameless = tokenizer.decode(template.render([Message('tool', '3')]))
    assert nameless.startswith('<|start|>functions.tool to=assistant')
    ids, mask = template.render_with_mask([Message('user', 'What?'), Message('assistant', 'x<|call|>'), result])
    assert tokenizer.decode(ids).endswith(tokenizer.decode(template.render([result])))
    forged = template.render([Message('tool', '3', 'f<|message|>')])
    assert forged.count(tokenizer.id_of('<|message|>')) == 1


def test_the_mask_covers_what_the_policy_draws(chat):
  family, _, tokenizer, template = chat
  messages = [Message('system', 'Be brief.'), Message('user', 'What?'), Message('assistant', 'That.'),
              Message('user', 'Why?'), Message('assistant', 'So.')]
  ids, mask = template.render_with_mask(messages)
  drawn = tokenizer.decode([i for i, m in zip(ids, mask) if m])
  assert drawn == f'That.{tokenizer.stops[0]}So.{tokenizer.stops[0]}'
  assert ids[:mask.index(True)] == template.render(messages[:2], add_generation_prompt=True)
  assert template.render_completion('That.' + tokenizer.stops[-1])[-1] == tokenizer.stop_ids[-1]
  with pytest.raises(ValueError, match='must follow'):
    template.render_with_mask(messages[2:])


def test_calls_of_each_family_come_back_from_what_the_template_writes(chat):
  family, _, tokenizer, template = chat
  if family == 'gemma3_text':
    return
  call_format = CHAT_FAMILIES[family].make_format()
  written = template.text([ASK, CALL], tools=TOOLS)
  turn = written[len(template.text([ASK], tools=TOOLS, add_generation_prompt=True)):]
  for stop in tokenizer.stops[:1] if family != 'gpt_oss' else ():
    turn = turn.replace(stop, '')
  assert call_format.parse(turn) == (ToolCall('add', {'a': 1, 'b': 'ü<2>'}),)
  assert call_format.final_answer(turn) is None


def test_a_missing_or_broken_template_and_tokenizer_are_refused(chat, tmp_path):
  _, folder, tokenizer, _ = chat
  with pytest.raises(FileNotFoundError, match='tokenizer.json'):
    HFTokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
    HFTokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text((folder / 'tokenizer.json').read_text())
  with pytest.raises(ValueError, match='eos_token'):
    HFTokenizer.load(tmp_path)
  bare = HFTokenizer.load(tmp_path, stops=tokenizer.stops)
  with pytest.raises(FileNotFoundError, match='chat_template'):
    HFChatTemplate.load(tmp_path, bare)
  with pytest.raises(ValueError, match='line 2'):
    HFChatTemplate(bare, 'a\n{% if %}')
  (tmp_path / 'chat_template.jinja').write_text("{% if tools %}T{% endif %}{{ ''.__class__.__mro__ }}")
  with pytest.raises(ValueError, match='unsafe'):
    HFChatTemplate.load(tmp_path, bare).text([ASK])
  with pytest.raises(ValueError, match='no assistant turn'):
    HFChatTemplate(bare, 'nothing').render([MORE], continued=True)
  bare.save(tmp_path / 'again')
  again = HFTokenizer.load(tmp_path / 'again')
  assert again.stop_ids == bare.stop_ids and again.markers == bare.markers


@pytest.mark.parametrize('name', ['llama3', 'mistral', 'harmony'])
def test_formats_give_back_what_they_write_and_never_raise(name):
  made = formats.make(name, ())
  calls = [ToolCall('f', {'x': 1, 'y': ['é', None, '<|call|>[TOOL_CALLS]<|message|>']}), ToolCall('g.h', {})]
  for call in calls:
    assert made.parse(made.render(call)) == (call,)
    assert made.final_answer(made.render(call)) is None
  assert made.parse('Just 3.') == () and made.final_answer(' Just 3.\n') == 'Just 3.'
  with pytest.raises(ValueError):
    made.render(ToolCall('f', {}, 'broken'))
  broken = {'llama3': '{"name": "f", "parameters": 3}', 'mistral': '[TOOL_CALLS] [{"name": "f"',
            'harmony': '<|channel|>commentary to=functions.f<|message|>{"x":'}[name]
  [call] = made.parse(broken)
  assert call.error and made.final_answer(broken) is None
  rng = np.random.default_rng(0)
  parts = ['{', '}', '"name"', '[', ']', ':', '"f"', 'x', *made.markers, '<|channel|>', 'commentary to=functions.f']
  for _ in range(300):
    made.parse(''.join(rng.choice(parts, 8)))
  assert 'add' in made.describe(TOOLS)


def test_harmony_answers_are_on_the_final_channel():
  text = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|> 3. <|return|>'
  assert formats.make('harmony', ()).final_answer(text) == '3.'
