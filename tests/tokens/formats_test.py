"""Tests of the call formats. Texts are written out by hand; the round trip is an identity."""

from __future__ import annotations

import doctest
import types as python_types

import hypothesis
from hypothesis import strategies as st
import pytest

from agentrl.core.types import ToolCall
from agentrl.tokens import formats

XML = formats.XmlFormat((('python', 'code'), ('calculator', 'expression')))
HERMES = formats.HermesFormat()
FENCED = formats.FencedFormat()
FORMATS = [XML, HERMES, FENCED]

# Text that is likely to hold what the formats themselves are made of.
PIECES = ['<', '>', '/', '"', "'", '\\', '{', '}', '\n', '\r', ' ', '`', '``', '```', 'python',
          '<python>', '</python>', '<calculator>', '<tool_call>', '</tool_call>', 'é', '\x00',
          '\u2028']
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5)).map(''.join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8)


@hypothesis.given(name=TEXT.filter(bool), arguments=st.dictionaries(TEXT, JSON, max_size=3))
def test_hermes_reads_back_every_call(name, arguments):
  call = ToolCall(name, arguments)
  assert HERMES.parse('I think.\n' + HERMES.render(call)) == (call,)


@hypothesis.given(name=st.sampled_from(['python', 'calculator']), content=TEXT)
def test_xml_reads_back_every_call_that_it_agrees_to_write(name, content):
  call = ToolCall(name, {dict(XML.arguments)[name]: content})
  if any(marker in content for marker in XML.markers):
    with pytest.raises(ValueError, match='cannot stand inside'):
      XML.render(call)
  else:
    assert XML.parse('I think. ' + XML.render(call)) == (call,)


@hypothesis.given(content=TEXT)
def test_fenced_reads_back_every_call_that_it_agrees_to_write(content):
  call = ToolCall('python', {'code': content})
  if '```' in content:
    with pytest.raises(ValueError, match='cannot stand inside'):
      FENCED.render(call)
  else:
    rendered = 'I think.\n' + FENCED.render(call)
    assert FENCED.parse(rendered) == (call,)


@hypothesis.given(text=TEXT)
def test_no_text_makes_a_format_raise(text):
  for call_format in FORMATS:
    for call in call_format.parse(text):
      assert call.error is None or (call.error and not call.arguments)


@hypothesis.given(content=TEXT.filter(lambda t: not any(m in t for m in XML.markers)))
def test_a_rendered_call_ends_at_its_first_stop(content):
  """Sampling stops at the first stop string, so it must be the call's end and nothing before it."""
  for call_format, arguments in ((XML, {'code': content}), (HERMES, {'any': content}),
                                 (FENCED, {'code': content.replace('`', '')})):
    text = call_format.render(ToolCall('python', arguments))
    ends = [text.index(s) + len(s) for s in call_format.stops if s in text]
    assert min(ends) == len(text)


@pytest.mark.parametrize('text, names, error', [
    ('<python>1+1', ['python'], '<python> is not closed'),
    ('1+1</python>', ['python'], '</python> without <python>'),
    ('<python><calculator>1</calculator></python>', ['python'], '<calculator> inside <python>'),
    ('<python><python>1</python>', ['python'], '<python> inside <python>'),
    ('<calculator>1</python>', ['calculator'], '</python> inside <calculator>'),
])
def test_malformed_xml_is_one_call_that_says_why(text, names, error):
  calls = XML.parse(text)
  assert [c.name for c in calls] == names
  assert calls[0].error == error
  assert XML.final_answer(text) is None


def test_a_call_after_a_malformed_one_is_read():
  calls = XML.parse('<python><calculator>1</python> then <calculator>2</calculator>')
  assert calls == (ToolCall('python', {}, '<calculator> inside <python>'),
                   ToolCall('calculator', {'expression': '2'}))


def test_xml_unknown_tags_are_text():
  assert XML.parse('<b>4</b>') == ()
  assert XML.final_answer(' <b>4</b>\n') == '<b>4</b>'


@pytest.mark.parametrize('body, name, error', [
    ('{"name": "f", "arguments": {"x": 1, "x": 2}}', '', "'x' is given twice"),
    ('{"name": "f", "arguments": {"x": 1}', '', "invalid JSON: Expecting ',' delimiter"),
    ('', '', 'invalid JSON'),
    ('[1]', '', 'a call is a JSON object'),
    ('{"arguments": {}}', '', '"name" must be'),
    ('{"name": 3, "arguments": {}}', '', '"name" must be'),
    ('{"name": "f"}', 'f', '"arguments" must be an object'),
    ('{"name": "f", "arguments": "x"}', 'f', '"arguments" must be an object'),
    ('{"name": "f", "arguments": {}, "id": 1}', 'f', 'a call has only'),
    ('{"name": "f", "arguments": {"x": NaN}}', '', 'NaN is not a JSON value'),
    ('{"name": "f", "arguments": {"x": "\\ud800"}}', '', 'not valid Unicode'),
    ('[' * 100_000, '', 'nested too deeply'),
    ('{"name": "f", "arguments": {"x": ' + '1' * 5000 + '}}', '', 'digits'),
])
def test_malformed_hermes_is_one_call_that_says_why(body, name, error):
  (call,) = HERMES.parse(f'<tool_call>{body}</tool_call>')
  assert (call.name, call.arguments) == (name, {})
  assert error in call.error


def test_hermes_calls_in_one_turn_keep_their_order():
  calls = (ToolCall('f', {'x': 1}), ToolCall('g', {}))
  text = 'a' + HERMES.render(calls[0]) + 'b' + HERMES.render(calls[1])
  assert HERMES.parse(text) == calls


@pytest.mark.parametrize('text, error', [
    ('```python\n1+1', 'the code block is not closed'),
    ('```python\n```python\n1\n```\n', 'text after the closing ```'),
])
def test_malformed_fenced_is_one_call_that_says_why(text, error):
  assert FENCED.parse(text) == (ToolCall('python', {}, error),)


def test_fenced_blocks_in_other_languages_are_text():
  text = '```text\n```\n```python\n1\n```\n'
  assert FENCED.parse(text) == (ToolCall('python', {'code': '1'}),)
  assert FENCED.final_answer('See:\n```text\n4\n```\n') == 'See:\n```text\n4\n```'


def test_the_answer_is_the_text_without_outer_blanks():
  assert XML.final_answer('  42 \n') == '42'
  assert HERMES.final_answer('42') == '42'
  assert XML.final_answer('<python>1</python>') is None


@pytest.mark.parametrize('call_format', FORMATS)
def test_a_malformed_call_and_a_parallel_format(call_format):
  with pytest.raises(ValueError, match='malformed'):
    call_format.render(ToolCall('python', {}, 'bad'))
  parallel = type(call_format)(**{**vars(call_format), 'parallel': True})
  assert parallel.stops == () and call_format.stops


def test_xml_refuses_what_is_not_one_string():
  for call in (ToolCall('python', {'code': 1}), ToolCall('python', {}),
               ToolCall('other', {'x': 'y'}), ToolCall('python', {'code': 'a', 'more': 'b'})):
    with pytest.raises(ValueError, match='not one string'):
      XML.render(call)


def _tool(name, **properties):
  required = [k for k, v in properties.items() if 'default' not in v]
  return python_types.SimpleNamespace(
      name=name, description='', parameters={'properties': properties, 'required': required})


def test_xml_format_takes_the_required_argument_of_each_tool():
  text, number = {'type': 'string'}, {'type': 'integer'}
  made = formats.xml_format([_tool('a', n={**number, 'default': 1}, x=text), _tool('b', y=text)])
  assert made.arguments == (('a', 'x'), ('b', 'y'))
  assert made.markers == ('<a>', '</a>', '<b>', '</b>')
  assert made.stops == ('</a>', '</b>')
  for bad in (_tool('c', x=text, y=text), _tool('c', x=number), _tool('c')):
    with pytest.raises(ValueError, match="tool 'c'"):
      formats.xml_format([bad])


def test_descriptions_show_how_each_tool_is_called():
  tools = [{'name': 'python', 'description': 'Runs code.', 'parameters': {'type': 'object'}}]
  assert '<python>code</python>: Runs code.' in XML.describe(tools)
  assert '"name": "python"' in HERMES.describe(tools)
  assert 'python' in FENCED.describe(tools)


def test_formats_are_found_by_name():
  assert formats.FORMATS.names() == ['fenced', 'harmony', 'hermes', 'llama3', 'mistral', 'xml']
  assert formats.FORMATS.get('xml')((('f', 'x'),)).stops == ('</f>',)


def test_doctest():
  assert doctest.testmod(formats).failed == 0
