"""A sentencepiece tokenizer: text never turns into a marker, and a number splits one way only."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from typing import Collection, Iterable, Sequence

import sentencepiece

ROLES = ('system', 'user', 'assistant', 'tool')
END = '<|end|>'
PAD = '<pad>'
# sentencepiece writes a space as this letter; the letter itself is encoded by its bytes.
_SPACE = '\u2581'
# What stands around copied text: merged into a neighbour, it would make a copy split otherwise.
ISOLATED = ('"', '-', ' + ', ' - ', ' * ', '( ', ' )', ', ', '): ', ' and ')


def role_marker(role: str) -> str:
  """Returns the marker that opens a message.

  Example:
    >>> role_marker('user')
    '<|user|>'
  """
  return f'<|{role}|>'


class Tokenizer:
  """Text to ids and back. `decode(encode(x)) == x` for every text without lone surrogates.

  Markers (of roles, of calls and of a message's end) are single pieces that encoding makes only
  where the caller allows it: what a tool or a user wrote is only ever text.
  """

  def __init__(self, model: bytes, markers: Sequence[str]):
    """Loads a model.

    Args:
      model: A serialised sentencepiece model.
      markers: Pieces of the model that are markers.
    Raises:
      ValueError: if the model lacks a marker or the padding piece.
    """
    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self._markers = {marker: self._control_id(marker) for marker in markers}
    self._marker_of_id = {id_: marker for marker, id_ in self._markers.items()}
    self._pad_id = self._control_id(PAD)
    self._space_bytes = [self._processor.piece_to_id(f'<0x{b:02X}>') for b in _SPACE.encode()]

  def _control_id(self, piece: str) -> int:
    id_ = self._processor.piece_to_id(piece)
    if self._processor.id_to_piece(id_) != piece or not self._processor.is_control(id_):
      raise ValueError(f'the model has no control piece {piece!r}')
    return id_

  @property
  def vocab_size(self) -> int:
    """Number of ids, padding and bytes included."""
    return self._processor.get_piece_size()

  @property
  def pad_id(self) -> int:
    """Id that fills rows; no text encodes to it."""
    return self._pad_id

  @property
  def end_id(self) -> int:
    """Id of the marker that closes a message."""
    return self._markers[END]

  @property
  def markers(self) -> tuple[str, ...]:
    """All markers: of roles and ends first, then the caller's."""
    return tuple(self._markers)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids at which a policy's turn may end: the end marker and every closing marker `</...>`."""
    return tuple(id_ for m, id_ in self._markers.items() if m == END or m.startswith('</'))

  def id_of(self, marker: str) -> int:
    """Returns the id of a marker.

    Raises:
      KeyError: if it is none; the message lists the markers.
    """
    if marker not in self._markers:
      raise KeyError(f'{marker!r} is no marker; there are {list(self._markers)}')
    return self._markers[marker]

  def encode(self, text: str, allow_markers: bool | Collection[str] = False) -> list[int]:
    """Returns the ids of a text.

    Args:
      text: Any text; lone surrogates become '?'.
      allow_markers: Whether marker strings become their pieces: True for all, or those that may.
        The others are spelled out as text. For text that tools or users wrote, leave it False.
    Returns:
      [n] ids; [] for ''.
    """
    allowed = self._markers if allow_markers is True else allow_markers or ()
    ids = []
    for part in split_on(text, allowed):
      ids += [self._markers[part]] if part in allowed else self._encode_plain(part)
    return ids

  def _encode_plain(self, text: str) -> list[int]:
    text = text.encode('utf-8', errors='replace').decode('utf-8')
    ids = []
    for i, part in enumerate(text.split(_SPACE)):
      ids += (self._space_bytes if i else []) + self._processor.encode(part)
    return ids

  def decode(self, ids: Iterable[int], strip_markers: bool = False) -> str:
    """Returns the text of ids; bytes that are no UTF-8 become U+FFFD, padding becomes nothing.

    Args:
      ids: [n] ids, numpy or python integers.
      strip_markers: Whether markers are left out instead of written.
    """
    parts = []
    runs = itertools.groupby((int(i) for i in ids), key=lambda i: self._marker_of_id.get(i))
    for marker, run in runs:
      if marker is None:
        parts.append(self._processor.decode([i for i in run if i != self._pad_id]))
      elif not strip_markers:
        parts.append(marker * len(list(run)))
    return ''.join(parts)

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """Returns each id's piece for display, with spaces as spaces."""
    return [self._processor.id_to_piece(int(i)).replace(_SPACE, ' ') for i in ids]

  def token_bytes(self) -> list[bytes]:
    """Returns what each id adds to the bytes of a text, markers and padding as `decode` writes them."""
    return [self._bytes_of(i) for i in range(self.vocab_size)]

  def _bytes_of(self, id_: int) -> bytes:
    piece = self._processor.id_to_piece(id_)
    if self._processor.is_byte(id_):
      return bytes([int(piece[3:5], 16)])
    if id_ in self._marker_of_id or self._processor.is_unknown(id_) or id_ == self._pad_id:
      return self.decode([id_]).encode()
    return piece.replace(_SPACE, ' ').encode()

  def save(self, path: str):
    """Writes one file, atomically."""
    meta = json.dumps({'format': 'agentrl-tokenizer-1', 'markers': list(self._markers)}).encode()
    temporary = f'{path}.tmp{os.getpid()}'
    with open(temporary, 'wb') as file:
      file.write(meta + b'\n' + self._model)
    os.replace(temporary, path)

  @classmethod
  def load(cls, path: str) -> Tokenizer:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if it is something else.
    """
    with open(path, 'rb') as file:
      meta, _, model = file.read().partition(b'\n')
    try:
      header = json.loads(meta)
      if header['format'] != 'agentrl-tokenizer-1':
        raise ValueError(f"format {header['format']!r}")
      return cls(model, header['markers'])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
      raise ValueError(f'{path} is no saved tokenizer: {error}') from error


def split_on(text: str, markers: Collection[str]) -> list[str]:
  """Returns the text in parts, each a marker or what stands between two; '' is no part."""
  if not markers:
    return [text] if text else []
  longest_first = sorted(markers, key=lambda m: (-len(m), m))
  pattern = '(' + '|'.join(re.escape(marker) for marker in longest_first) + ')'
  return [part for part in re.split(pattern, text) if part]


def train_tokenizer(texts: Iterable[str], *, markers: Sequence[str] = (), vocab_size: int = 1536,
                    digit_group: int = 2, isolated: Sequence[str] = ISOLATED,
                    max_piece_length: int = 48) -> Tokenizer:
  """Returns a byte-pair tokenizer of the texts; the same texts give the same tokenizer.

  Pieces may span spaces, so that a phrase that comes often (a question's template) is one piece.
  Numbers split into groups from the left whatever is around them, so that a number has the same
  pieces wherever it stands.

  Args:
    texts: What to learn the pieces from; markers in them are skipped.
    markers: Call markers, in addition to those of roles and ends.
    vocab_size: Ids in all, an upper bound: 256 of them are bytes. Fewer if the texts do not give so
      many.
    digit_group: Digits a piece, 1 to 3; 10, 110 or 1,110 of the ids are for them.
    isolated: Strings that are always a piece of their own: quotes around what is copied, for
      instance.
    max_piece_length: Letters a piece has at most.
  Raises:
    ValueError: if the digit group is out of range, markers repeat or the vocabulary is too small.
  Example:
    >>> tokenizer = train_tokenizer(['What is 1234 + 5?'], vocab_size=400)
    >>> tokenizer.pieces(tokenizer.encode('12345'))
    ['12', '34', '5']
  """
  if not 1 <= digit_group <= 3:
    raise ValueError(f'digit_group must be 1, 2 or 3, got {digit_group}')
  every = tuple(role_marker(role) for role in ROLES) + (END,) + tuple(markers)
  if len(set(every)) != len(every):
    raise ValueError(f'markers repeat: {every}')
  groups = [''.join(digits) for n in range(1, digit_group + 1)
            for digits in itertools.product('0123456789', repeat=n)]
  fixed = 2 + len(every) + 256 + len(groups) + len(isolated)
  if vocab_size <= fixed:
    raise ValueError(f'vocab_size {vocab_size} has no room for text: {fixed} pieces are fixed')
  plain = [part for text in texts for part in split_on(text, every) if part not in every]
  if not plain:
    raise ValueError('there is no text to learn pieces from')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(plain),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      byte_fallback=True,
      character_coverage=1.0,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      treat_whitespace_as_suffix=True,
      split_by_whitespace=False,
      split_by_number=False,
      split_by_unicode_script=False,
      max_sentencepiece_length=max_piece_length,
      max_sentence_length=1 << 20,
      control_symbols=list(every),
      user_defined_symbols=[s.replace(' ', _SPACE) for s in (*groups, *isolated)],
      pad_id=0,
      pad_piece=PAD,
      unk_id=1,
      bos_id=-1,
      eos_id=-1,
      num_threads=1,
      minloglevel=2)
  return Tokenizer(model.getvalue(), every)
