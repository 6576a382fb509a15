"""The tokenizer: identity on text, markers out of reach of text, numbers that split one way."""

from __future__ import annotations

import re

import hypothesis
from hypothesis import strategies as st
import pytest

from agentrl.tokens import tokenizer as tokenizer_lib

TEXTS = [
    'What is 12 + 345?', 'Solve for x: 3 * x = 27', 'the text: "of the year"', 'gcd(780, 461)\n'
] * 8
CALL_MARKERS = ('<python>', '</python>')


@pytest.fixture(scope='module', name='tokenizer')
def _tokenizer():
  return tokenizer_lib.train_tokenizer(TEXTS, markers=CALL_MARKERS, vocab_size=420)


# Pieces of markers and of bytes, and the letter that sentencepiece writes for a space.
_SPECIAL = ['<|user|>', '<|end|>', '<python>', '</python>', '<pad>', '<unk>', '<0x41>', '\u2581',
            '  ', '\n', '12345']
_TRICKY = st.lists(st.one_of(st.text(), st.sampled_from(_SPECIAL)), max_size=6).map(''.join)


@hypothesis.given(text=_TRICKY)
@hypothesis.example('\u2581\u2581 \u2581')
@hypothesis.example('\x00\r\n\u2028\ufeff')
@hypothesis.settings(max_examples=200, deadline=None)
def test_decode_inverts_encode(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode(tokenizer.encode(text, allow_markers=True)) == text


@hypothesis.given(text=_TRICKY)
@hypothesis.settings(max_examples=200, deadline=None)
def test_text_never_becomes_a_marker_or_padding(tokenizer, text):
  reserved = {tokenizer.id_of(marker) for marker in tokenizer.markers} | {tokenizer.pad_id}
  assert not reserved & set(tokenizer.encode(text))


def test_markers_are_single_ids_where_allowed(tokenizer):
  text = '<|user|><python>1</python>'
  every = tokenizer.encode(text, allow_markers=True)
  assert every == [tokenizer.id_of('<|user|>'), tokenizer.id_of('<python>'), *tokenizer.encode('1'),
                   tokenizer.id_of('</python>')]
  some = tokenizer.encode(text, allow_markers=CALL_MARKERS)
  assert some == tokenizer.encode('<|user|>') + every[1:]


@hypothesis.given(text=st.text(st.characters(exclude_categories=['Cs'])))
def test_the_bytes_of_pieces_make_up_the_text(tokenizer, text):
  pieces = tokenizer.token_bytes()
  assert len(pieces) == tokenizer.vocab_size and pieces[tokenizer.pad_id] == b''
  text += tokenizer.markers[0]
  assert b''.join(pieces[i] for i in tokenizer.encode(text, allow_markers=True)).decode() == text


def test_lone_surrogates_are_replaced(tokenizer):
  # UTF-8 cannot hold them; str.encode with errors='replace' writes '?'.
  assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a?b'


def test_bytes_that_are_no_text_decode_to_replacement(tokenizer):
  # The first byte of a two-byte letter alone is no UTF-8.
  first, _ = tokenizer.encode('ß')
  assert tokenizer.decode([first]) == '\ufffd'


def test_decode_strips_markers_and_padding(tokenizer):
  ids = [tokenizer.id_of('<|user|>'), *tokenizer.encode('12'), tokenizer.pad_id, tokenizer.end_id]
  assert tokenizer.decode(ids) == '<|user|>12<|end|>'
  assert tokenizer.decode(ids, strip_markers=True) == '12'


@pytest.mark.parametrize('group', [1, 2, 3])
@hypothesis.given(number=st.from_regex(r'\A[0-9]{1,12}\Z'),
                  before=st.sampled_from(['', ' ', '-', 'gcd(', '"', 'x1 ']),
                  after=st.sampled_from(['', ' ', ')', '.', '/7', '\n', '"']))
@hypothesis.settings(max_examples=40, deadline=None)
def test_numbers_split_alike_everywhere(group, number, before, after):
  # From the left in groups, as the docstring says: the pieces of the number are its own in any
  # context.
  tokenizer = _GROUPS.setdefault(group, tokenizer_lib.train_tokenizer(
      TEXTS, vocab_size=1500 if group == 3 else 420, digit_group=group))
  expected = re.findall(r'\d{1,%d}' % group, number)
  assert tokenizer.pieces(tokenizer.encode(number)) == expected
  pieces = tokenizer.pieces(tokenizer.encode(before + number + after))
  assert any(pieces[i:i + len(expected)] == expected for i in range(len(pieces)))


_GROUPS = {}


def test_training_is_deterministic(tokenizer):
  again = tokenizer_lib.train_tokenizer(TEXTS, markers=CALL_MARKERS, vocab_size=420)
  assert again.pieces(range(again.vocab_size)) == tokenizer.pieces(range(tokenizer.vocab_size))


def test_vocabulary_is_bounded_and_stops_close(tokenizer):
  assert tokenizer.vocab_size <= 420
  assert set(tokenizer.stop_ids) == {tokenizer.id_of('<|end|>'), tokenizer.id_of('</python>')}


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
  path = str(tmp_path / 'tokenizer')
  tokenizer.save(path)
  loaded = tokenizer_lib.Tokenizer.load(path)
  text = 'Solve 123 <python>ß</python>'
  assert loaded.encode(text, allow_markers=True) == tokenizer.encode(text, allow_markers=True)
  assert loaded.markers == tokenizer.markers
  assert [p.name for p in tmp_path.iterdir()] == ['tokenizer']


@pytest.mark.parametrize('content', [b'', b'{}\n', b'no json', b'[1]\nx',
                                     b'{"format": "agentrl-tokenizer-1", "markers": []}\nbroken'])
def test_load_refuses_other_files_by_name(content, tmp_path):
  path = tmp_path / 'broken'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='broken'):
    tokenizer_lib.Tokenizer.load(str(path))


@pytest.mark.parametrize('settings, message', [
    (dict(digit_group=4), 'digit_group'), (dict(vocab_size=300), 'fixed'),
    (dict(markers=('<|end|>',)), 'repeat')])
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.train_tokenizer(TEXTS, **settings)


def test_no_text_is_refused():
  with pytest.raises(ValueError, match='no text'):
    tokenizer_lib.train_tokenizer(['<|user|>'], vocab_size=420)


def test_unknown_marker_lists_the_known(tokenizer):
  with pytest.raises(KeyError, match='<python>'):
    tokenizer.id_of('<ruby>')
