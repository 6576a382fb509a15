"""A checkpoint's own tokenizer, behind the interface of `agentrl.tokens.tokenizer.Tokenizer`."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
from typing import Any, Collection, Iterable, Mapping, Sequence

import tokenizers

from agentrl.tokens.tokenizer import split_on

# Pieces that structure a turn in some checkpoints without being declared special there.
CALL_MARKERS = ('<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>', '<think>', '</think>')
# Between a marker's first letter and the rest it makes plain text of it, and is taken out when text is encoded.
BREAK = '\ue000'
_SAVED = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'config.json')


class HFTokenizer:
  """Text to ids and back, as the checkpoint does it, except that text never turns into a marker unless allowed.

  Markers are the tokens that tokenizer.json declares special, and `CALL_MARKERS` where it has them.
  """

  def __init__(self, model: str, *, settings: Mapping[str, Any] | None = None, stop_ids: Sequence[int] = (),
               markers: Sequence[str] = CALL_MARKERS):
    """Loads a tokenizer.

    Args:
      model: Text of a tokenizer.json.
      settings: tokenizer_config.json: which tokens begin, end and pad.
      stop_ids: Ids that end a turn, the first of which is `end_id`; () for the one that the settings name as
        "eos_token".
      markers: Added tokens that are markers though not declared special; those that do not exist are left out.
    Raises:
      ValueError: if nothing says what ends a turn, or `model` is no tokenizer.
    """
    self.settings = dict(settings or {})
    self._model = model
    try:
      parsed = json.loads(model)
      self._full = tokenizers.Tokenizer.from_str(model)
    except Exception as error:  # pylint: disable=broad-except  # the library raises plain Exceptions
      raise ValueError(f'this is no tokenizer.json: {error}') from error
    added = parsed.get('added_tokens', [])
    self._markers = {t['content']: t['id'] for t in added if t['special'] or t['content'] in markers}
    self._marker_of_id = {id_: marker for marker, id_ in self._markers.items()}
    parsed['added_tokens'] = [t for t in added if t['content'] not in self._markers]
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(parsed))
    self._special = frozenset(t['content'] for t in added if t['special'])
    self._vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
    self._stop_ids = tuple(stop_ids) or self._named('eos_token')
    if not self._stop_ids:
      raise ValueError('nothing says which token ends a turn; add "eos_token" to tokenizer_config.json, or '
                       '"eos_token_id" to generation_config.json')
    self._pad_id = (self._named('pad_token') or self._stop_ids[:1])[0]

  def _named(self, role: str) -> tuple[int, ...]:
    content = content_of(self.settings.get(role))
    if content is None:
      return ()
    id_ = self._full.token_to_id(content)
    if id_ is None:
      raise ValueError(f'tokenizer_config.json names {content!r} as {role}, which tokenizer.json does not have')
    return (id_,)

  @property
  def vocab_size(self) -> int:
    """One more than the largest id. Embeddings may have more rows: see `ModelConfig.known_tokens`."""
    return self._vocab_size

  @property
  def pad_id(self) -> int:
    """Id that fills rows."""
    return self._pad_id

  @property
  def end_id(self) -> int:
    """Id of the token that closes the policy's turn."""
    return self._stop_ids[0]

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids at which generation stops."""
    return self._stop_ids

  @property
  def stops(self) -> tuple[str, ...]:
    """Texts of `stop_ids`."""
    return tuple(self._full.id_to_token(i) for i in self._stop_ids)

  @property
  def markers(self) -> tuple[str, ...]:
    """All markers."""
    return tuple(self._markers)

  @property
  def special(self) -> frozenset[str]:
    """The markers that tokenizer.json declares special: those of structure, not of calls."""
    return self._special

  def id_of(self, marker: str) -> int:
    """Returns the id of a marker.

    Raises:
      KeyError: if it is none; the message lists the markers.
    """
    if marker not in self._markers:
      raise KeyError(f'{marker!r} is no marker; there are {list(self._markers)}')
    return self._markers[marker]

  def encode(self, text: str, allow_markers: bool | Collection[str] = False) -> list[int]:
    """Returns the ids of a text, without tokens that a model would be started with.

    Args:
      text: Any text; lone surrogates become '?'. `BREAK` is taken out.
      allow_markers: Whether marker strings become their tokens: True for all, or those that may. The others are
        spelled out as text. For text that tools or users wrote, leave it False.
    """
    text = text.encode('utf-8', errors='replace').decode('utf-8')
    if allow_markers is True and BREAK not in text:
      return self._full.encode(text, add_special_tokens=False).ids
    allowed = self._markers if allow_markers is True else allow_markers or ()
    ids = []
    for part in split_on(text, allowed):
      ids += [self._markers[part]] if part in allowed else self._encode_plain(part.replace(BREAK, ''))
    return ids

  def _encode_plain(self, text: str) -> list[int]:
    ids = self._plain.encode(text, add_special_tokens=False).ids
    if not self._marker_of_id.keys() & set(ids):
      return ids
    # A model whose own pieces spell markers: each is cut after its first letter.
    parts = [p for part in split_on(text, self._markers) for p in (
        (part[:1], part[1:]) if part in self._markers else (part,))]
    return [i for part in parts for i in self._plain.encode(part, add_special_tokens=False).ids]

  def decode(self, ids: Iterable[int], strip_markers: bool = False) -> str:
    """Returns the text of ids; bytes that are no UTF-8 become U+FFFD, padding becomes nothing.

    Args:
      ids: [n] ids, numpy or python integers.
      strip_markers: Whether markers are left out instead of written.
    """
    pad = None if self._pad_id in self._stop_ids else self._pad_id
    runs = itertools.groupby((int(i) for i in ids if i != pad), key=lambda i: self._marker_of_id.get(i))
    parts = []
    for marker, run in runs:
      if marker is None:
        parts.append(self._full.decode(list(run), skip_special_tokens=False))
      elif not strip_markers:
        parts.append(marker * len(list(run)))
    return ''.join(parts)

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """Returns each id's piece for display."""
    return [self._full.decode([int(i)], skip_special_tokens=False) for i in ids]

  def token_bytes(self) -> list[bytes]:
    """Returns what each id adds to the bytes of a text; ids without a piece add nothing.

    Raises:
      ValueError: if the decoder is neither byte-level nor one of pieces with a letter for the blank.
    """
    decoder = json.dumps(json.loads(self._model).get('decoder'), ensure_ascii=False)
    if 'ByteLevel' not in decoder and _BLANK not in decoder and 'Metaspace' not in decoder:
      raise ValueError(f'the bytes of pieces are not known for the decoder {decoder}')
    plain = self._plain.get_vocab(with_added_tokens=False)
    out = [b''] * self._vocab_size
    for piece, id_ in self._full.get_vocab(with_added_tokens=True).items():
      out[id_] = piece.encode() if piece not in plain else (
          bytes(_BYTE_OF_LETTER[c] for c in piece) if 'ByteLevel' in decoder else _piece_bytes(piece))
    return out

  def save(self, folder: str | os.PathLike):
    """Writes tokenizer.json, tokenizer_config.json and the stop ids into a folder, as `load` reads them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (('tokenizer.json', self._model),
                          ('tokenizer_config.json', json.dumps(self.settings, indent=2)),
                          ('generation_config.json', json.dumps({'eos_token_id': list(self._stop_ids)}))):
      temporary = folder / f'{name}.tmp{os.getpid()}'
      temporary.write_text(content, encoding='utf-8')
      os.replace(temporary, folder / name)

  @classmethod
  def load(cls, folder: str | os.PathLike, *, stops: Sequence[str] = (),
           markers: Sequence[str] = CALL_MARKERS) -> HFTokenizer:
    """Reads a checkpoint's tokenizer.

    Args:
      folder: With tokenizer.json; tokenizer_config.json, generation_config.json and config.json are read where they
        are there.
      stops: Further tokens that end a turn; those that the tokenizer does not have are left out. The first one that
        it has becomes `end_id`.
      markers: See the constructor.
    Raises:
      FileNotFoundError: if there is no tokenizer.json.
      ValueError: naming the file, if it is something else.
    """
    files = {name: _read(pathlib.Path(folder) / name) for name in _SAVED}
    if files['tokenizer.json'] is None:
      raise FileNotFoundError(f'{folder} has no tokenizer.json')
    try:
      parsed = {name: json.loads(text or '{}') for name, text in files.items()}
      ids = next((f['eos_token_id'] for f in (parsed['generation_config.json'], parsed['config.json'])
                  if f.get('eos_token_id') is not None), ())
      known = {t['content']: t['id'] for t in parsed['tokenizer.json'].get('added_tokens', ())}
      ids = [*(known[s] for s in stops if s in known), *((ids,) if isinstance(ids, int) else ids)]
      return cls(files['tokenizer.json'], settings=parsed['tokenizer_config.json'],
                 stop_ids=tuple(dict.fromkeys(ids)), markers=markers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{folder}: {error}') from error


def _letters() -> dict[str, int]:
  """The letters that stand for bytes in byte-level pieces: those that print as they are, then others from 256 on."""
  printing = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printing]
  return {**{chr(b): b for b in printing}, **{chr(256 + i): b for i, b in enumerate(others)}}


_BYTE_OF_LETTER = _letters()
_BLANK = '\u2581'


def _piece_bytes(piece: str) -> bytes:
  byte = re.fullmatch(r'<0x([0-9A-F]{2})>', piece)
  return bytes([int(byte.group(1), 16)]) if byte else piece.replace(_BLANK, ' ').encode()


def content_of(token: Any) -> str | None:
  """Returns the text of a token as tokenizer_config.json has it: a string, or an object with "content"."""
  return token.get('content') if isinstance(token, Mapping) else token


def _read(path: pathlib.Path) -> str | None:
  return path.read_text(encoding='utf-8') if path.exists() else None
