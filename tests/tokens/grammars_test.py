"""Formats' grammars: all that can be drawn under them parses as calls that fit, and what demonstrations show can be drawn.

Turns are drawn at random from what the grammar allows, closing pieces more often than others, so that calls come to an
end. What is invalid is judged by `CallFormat.parse` and the executor's own check of arguments.
"""

from __future__ import annotations

import codecs
import functools
import json
import re

from hypothesis import given, strategies as st
import numpy as np
import pytest

from agentrl.core.types import ToolCall
from agentrl.sampling.constrain import Grammar, allows
from agentrl.tokens import formats, grammars
from agentrl.tokens.tokenizer import train_tokenizer
from agentrl.tools import schema as schemas

TOOLS = [
    {'name': 'get', 'parameters': {
        'type': 'object', 'required': ['q'],
        'properties': {'q': {'type': 'string'}, 'n': {'type': 'integer'}, 'strict': {'type': 'boolean'}}}},
    {'name': 'getter', 'parameters': {'type': 'object', 'properties': {}}},
    {'name': 'now'},
    {'name': 'python', 'parameters': {'type': 'object', 'properties': {'code': {'type': 'string'}}, 'required': ['code']}},
    {'name': 'mode', 'parameters': {'type': 'object', 'properties': {'m': {'enum': ['fast', 'slow', '</mode>']}},
                                    'required': ['m']}},
    {'name': 'deep', 'parameters': {
        'type': 'object', 'required': ['a'], 'properties': {
            'a': {'type': 'object', 'required': ['b'], 'properties': {
                'b': {'type': 'array', 'items': {'enum': ['x', 3, None, True, 1.5]}},
                'c': {'anyOf': [{'type': 'number'}, {'type': 'null'}]}}},
            'm': {'type': 'object', 'additionalProperties': {'type': 'integer'}}}}},
]
PARAMETERS = {t['name']: t.get('parameters', {'properties': {}, 'additionalProperties': False}) for t in TOOLS}
MARKERS = ('<tool_call>', '</tool_call>', '<python>', '</python>', '<mode>', '</mode>', '```', '[TOOL_CALLS]',
           '<|python_tag|>', '<|start|>', '<|message|>', '<|channel|>', '<|constrain|>', '<|call|>', '<|return|>')
FORMATS = {
    'hermes': formats.HermesFormat(), 'hermes_parallel': formats.HermesFormat(parallel=True),
    'xml': formats.XmlFormat((('python', 'code'), ('mode', 'm'))),
    'fenced': formats.FencedFormat((('python', 'code'), ('mode', 'm'))),
    **{name: formats.FORMATS.get(name)() for name in ('mistral', 'llama3', 'harmony')}}
OPENINGS = {'hermes': '<tool_call>', 'hermes_parallel': '<tool_call>', 'xml': '<python>', 'fenced': '```python\n',
            'mistral': '[TOOL_CALLS]', 'llama3': '{', 'harmony': '<|channel|>commentary to=functions.'}
CLOSING = ('"', '}', ']', '\n', '```', '</tool_call>', '</python>', '</mode>', '<|call|>', '<|message|>', '<|end|>', '<|return|>')


@functools.cache
def tokenizer():
  texts = [json.dumps({'name': 'deep', 'arguments': {'a': {'b': ['x', 3], 'c': i}, 'm': {'k': i}}}) for i in range(40)]
  texts += ['```python\nprint(1)\n```\n', 'some < text > </ tool_call> </ python> commentary to=functions.get json analysis']
  return train_tokenizer(texts * 20, markers=MARKERS, vocab_size=800)


def end_of(name):
  return tokenizer().id_of('<|return|>' if name == 'harmony' else '<|end|>')


@functools.cache
def grammar_of(name):
  return Grammar(FORMATS[name], TOOLS, tokenizer(), [end_of(name)])


def pieces_of(mask):
  return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder='little')[:tokenizer().vocab_size])


def random_turn(name, seed, opening='', limit=400):
  """Ids of a turn, drawn from what is allowed; None if it does not end within the limit."""
  rng, cursor, ids = np.random.default_rng(seed), grammar_of(name).start(), []
  stops = {end_of(name), *(tokenizer().id_of(s) for s in FORMATS[name].stops if s in MARKERS)}
  closing = {i for i, piece in enumerate(tokenizer().pieces(range(tokenizer().vocab_size))) if piece in CLOSING}
  for token in tokenizer().encode(opening, allow_markers=True):
    assert allows(cursor.mask(), token)
    cursor.take(token)
    ids.append(token)
  while len(ids) < limit:
    options = pieces_of(cursor.mask())
    preferred = [o for o in options if o in closing] if rng.random() < 0.2 else []
    ids.append(int(rng.choice(preferred or options)))
    cursor.take(ids[-1])
    if ids[-1] in stops or name == 'fenced' and '```\n' in tokenizer().decode(ids[-3:]):
      return ids
  return None


def wrong_with(name, ids):
  """What is wrong with the calls of a turn, and how many there are."""
  text = tokenizer().decode([i for i in ids if i != end_of(name)])
  calls = FORMATS[name].parse(text)
  return [(why, text) for c in calls if (why := c.error or schemas.problem(c.arguments, PARAMETERS[c.name]))], len(calls)


@pytest.mark.parametrize('name', FORMATS)
def test_whatever_is_drawn_every_call_is_valid(name):
  calls = 0
  for seed in range(30):
    ids = random_turn(name, seed, OPENINGS[name] if seed % 3 else '')
    if ids is not None:
      wrong, found = wrong_with(name, ids)
      assert not wrong
      calls += found
  assert calls >= 12


json_values = st.fixed_dictionaries({'q': st.text(st.characters(exclude_categories=['Cs', 'Cc'], exclude_characters='\x7f'),
                                                  max_size=12)},
                                    optional={'n': st.integers(-10**6, 10**6), 'strict': st.booleans()})


@pytest.mark.parametrize('name', [n for n in FORMATS if n not in ('xml', 'fenced')])
@given(json_values)
def test_a_call_as_it_is_rendered_can_be_drawn(name, arguments):
  before = 'So: ' if name != 'llama3' else ''
  # In the schema's order, which is the one that the grammar knows.
  arguments = {k: arguments[k] for k in PARAMETERS['get']['properties'] if k in arguments}
  check_rendered(name, ToolCall('get', arguments), before if name != 'harmony' else '')


@pytest.mark.parametrize('name, call', [
    ('xml', ToolCall('python', {'code': 'a < b\n</ tool\n'})), ('fenced', ToolCall('python', {'code': 'for i in x:\n  y `z`'})),
    ('xml', ToolCall('mode', {'m': 'fast'})), ('fenced', ToolCall('mode', {'m': 'slow'})),
    *((n, ToolCall('deep', {'a': {'b': ['x', 3, None, 1.5], 'c': None}, 'm': {'k': 1, 'l': -2}}))
      for n in FORMATS if n not in ('xml', 'fenced')),
    *((n, ToolCall(tool, {})) for n in FORMATS if n not in ('xml', 'fenced') for tool in ('now', 'getter'))])
def test_calls_of_every_kind_can_be_drawn(name, call):
  check_rendered(name, call, {'fenced': 'Run\n', 'xml': 'Run '}.get(name, ''))


def check_rendered(name, call, before):
  text = before + FORMATS[name].render(call)
  if any(m in json.dumps(dict(call.arguments), ensure_ascii=False) for m in MARKERS):
    return  # such an argument is written with escapes that a policy does not need
  ids = tokenizer().encode(text, allow_markers=True)
  ids += [end_of(name)] if not text.endswith(FORMATS[name].stops or ('nothing',)) else []
  refused = [i for i, mask in enumerate(grammar_of(name).masks(ids)) if mask is None]
  assert not refused, tokenizer().pieces(ids[:refused[0] + 1])


@pytest.mark.parametrize('name', FORMATS)
def test_words_without_calls_are_free_but_for_what_would_make_a_broken_one(name):
  text = 'Well, 3 < 4 > 2 and {"a": [1]} holds.\nSo {'
  ids = tokenizer().encode(text) + [end_of(name)]
  assert None not in grammar_of(name).masks(ids)
  free = grammar_of(name).start()
  free.follow(tokenizer().encode('Well, '))
  left_out = set(range(tokenizer().vocab_size)) - set(pieces_of(free.mask()))
  # Padding, bytes that begin no character, and markers of the format.
  markers = {tokenizer().id_of(m) for m in FORMATS[name].markers}
  assert left_out - markers == {i for i, text in enumerate(tokenizer().token_bytes()) if not begins(text)} - markers


def begins(text):
  """Whether bytes are some, and the beginning of a text."""
  try:
    codecs.getincrementaldecoder('utf-8')().decode(text)
  except UnicodeDecodeError:
    return False
  return bool(text)


@pytest.mark.parametrize('name, text', [
    ('hermes', 'x </tool_call>'), ('hermes', '<tool_call>{"name": "nope"'), ('hermes', '<tool_call>{"name": "get", "x"'),
    ('hermes', '<tool_call>{"name": "get", "arguments": {"n": 1}'), ('hermes', '<tool_call>{"name": "get", "arguments": {"q": 1'),
    ('hermes', '<tool_call>{"name": "getter", "arguments": {"a"'), ('hermes', '<tool_call></tool_call>'),
    ('xml', 'x </python>'), ('xml', '<python>1</mode>'), ('xml', '<python><python>'), ('xml', '<mode>f</mode>'),
    ('fenced', '```mode\nfaster'), ('fenced', '```python\n1``` x'), ('mistral', '[TOOL_CALLS] []'), ('mistral', '[TOOL_CALLS] {'),
    ('llama3', ' {"a"'), ('llama3', '<|python_tag|>x'), ('harmony', '<|channel|>commentary to=functions.nope'),
    ('harmony', '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{}')])
def test_what_no_call_begins_with_cannot_be_drawn(name, text):
  assert None in grammar_of(name).masks(tokenizer().encode(text, allow_markers=True))


@pytest.mark.parametrize('name', ['hermes', 'xml', 'fenced', 'harmony', 'mistral'])
def test_a_turn_does_not_end_within_a_call(name):
  ids = tokenizer().encode(OPENINGS[name], allow_markers=True)
  masks = grammar_of(name).masks([*ids, end_of(name)])
  assert None not in masks[:-1] and masks[-1] is None


def test_tags_are_not_spelled_out_even_within_an_argument():
  for spelled in ('<tool_call>', '</tool_call>'):
    ids = tokenizer().encode('<tool_call>{"name": "get", "arguments": {"q": "', allow_markers=True)
    masks = grammar_of('hermes').masks(ids + tokenizer().encode(spelled))
    assert None not in masks[:len(ids) + 1] and masks[-1] is None


def test_a_schema_that_no_grammar_is_made_for_is_refused_with_its_tool():
  bad = {'name': 'odd', 'parameters': {'type': 'object', 'properties': {'x': {'type': 'string', 'format': 'int64'}}}}
  with pytest.raises(ValueError, match=r"tool 'odd': .*its schema is .*'format': 'int64'"):
    Grammar(FORMATS['hermes'], [*TOOLS, bad], tokenizer(), [tokenizer().end_id])
  with pytest.raises(ValueError, match="tool 'list' takes no object but 'array'"):
    Grammar(FORMATS['hermes'], [{'name': 'list', 'parameters': {'type': 'array'}}], tokenizer(), [tokenizer().end_id])


@pytest.mark.parametrize('format_, tools, words', [
    (FORMATS['hermes'], [], 'no tools that could be called'), (FORMATS['xml'], TOOLS[:2], "none of the tools .*'getter'.* has a tag"),
    (FORMATS['fenced'], TOOLS[:2], 'has blocks'),
    (formats.XmlFormat((('m', 'x'),)), [{'name': 'm', 'parameters': {'properties': {'x': {'enum': ['</m>']}}}}],
     "none of .*</m>.* can be written without")])
def test_tools_that_a_format_cannot_call_are_refused(format_, tools, words):
  with pytest.raises(ValueError, match=words):
    format_.grammar(tools, {'<tool_call>': 1, '</tool_call>': 2})


def test_a_format_whose_tags_are_no_tokens_is_refused():
  with pytest.raises(ValueError, match="'<tool_call>' is no single token"):
    FORMATS['hermes'].grammar(TOOLS, {})
  with pytest.raises(ValueError, match='takes all that ends a turn'):
    Grammar(FORMATS['harmony'], TOOLS, tokenizer(), [tokenizer().end_id])


@given(st.text(max_size=8), st.lists(st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=3), min_size=1, max_size=3))
def test_patterns_of_strings_escape_all_that_means_something(text, strings):
  """Rust's syntax is near enough to Python's for what is written here."""
  python = lambda p: re.sub(r'\\x\{([0-9a-f]+)\}', lambda m: re.escape(chr(int(m.group(1), 16))), p)
  assert re.fullmatch(python(grammars.pattern(text)), text)
  assert not any(re.fullmatch(python(grammars.pattern(s)), text) for s in strings if s != text)
