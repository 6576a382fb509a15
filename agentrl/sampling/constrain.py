"""Which tokens may come next, so that every call a policy writes is one for a tool on offer. Needs the extra 'constrain'.

A call format says what a turn may be (`CallFormat.grammar`), llguidance which of the tokenizer's pieces can go on from
where a turn stands. A `Cursor` follows one turn. The decode loop asks the `MaskTable` of its sampler at every step, on
the host: the answer is a function of the tokens drawn, so nothing has to be undone where a slot is rolled back, and a
turn that is cut into calls gets the same masks.

A mask is packed: bit v % 32 of word v // 32 tells whether token v may be drawn.

Axes: S slots, n tokens of a call, W tokens of a step (1 without speculation), V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, Mapping, Sequence
import zlib

from absl import logging
import jax
from jax.experimental.buffer_callback import buffer_callback
import jax.numpy as jnp
import numpy as np

from agentrl.models.transformer import unpack
from agentrl.tokens.grammars import TurnGrammar

ALL = np.uint32(0xFFFFFFFF)
# Distinct masks that are kept to be shared; beyond, what is in use stays with its trajectories.
_MOST_SHARED = 1 << 14


def words(vocab_size: int) -> int:
  """Returns the 32-bit words of a packed mask."""
  return -(-vocab_size // 32)


class Grammar:
  """What a turn may be, in the pieces of a tokenizer: shared by all turns.

  Attributes:
    checksum: Of the grammar; another one's is another.
    ends: Ids that end a turn.
  """

  def __init__(self, call_format: Any, tools: Sequence[Mapping[str, Any]], tokenizer: Any, ends: Sequence[int]):
    """Compiles a call format's grammar for some tools.

    Args:
      call_format: See `agentrl.tokens.formats.CallFormat`.
      tools: Each with 'name' and 'parameters', a JSON schema.
      tokenizer: Of the policy.
      ends: Ids that end a turn and are no part of a call; not drawn within one.
    Raises:
      ValueError: naming the tool and its schema, if there is no grammar of it; or if llguidance is not installed.
    """
    self._library = _llguidance()
    ids = {marker: tokenizer.id_of(marker) for marker in tokenizer.markers}
    turn = call_format.grammar(tools, ids)
    closing = {ids[m] for m in turn.tokens if m in ids}
    self.ends = tuple(i for i in ends if i not in closing)
    if not self.ends:
      raise ValueError(f'call format {call_format.name!r} takes all that ends a turn, {tokenizer.decode(ends)!r}, for '
                       'markers of its own; take another')
    pieces = tokenizer.token_bytes()
    special = {*closing, *ends}
    self._vocabulary = self._library.LLTokenizer(
        self._library.TokenizerWrapper(_Pieces(tokenizer, pieces, special, self.ends)), n_vocab=len(pieces),
        eos_token=list(self.ends))
    problem = self._problem(turn)
    if problem:
      self._blame_a_tool(call_format, tools, ids)
      raise ValueError(f'call format {call_format.name!r} has no grammar for the tools '
                       f'{[t["name"] for t in tools]} together: {problem}')
    self.checksum = zlib.crc32(repr((turn, self.ends)).encode())
    self.words = words(len(pieces))
    self.nothing = bytes(4 * self.words)
    self.unspelled = Unspelled(turn.unspelled, [None if i in special else p for i, p in enumerate(pieces)])
    self._start = self._library.LLMatcher(self._vocabulary, turn.turn)
    self._shared: dict[bytes, bytes] = {}

  def _problem(self, turn: TurnGrammar) -> str:
    failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(turn.turn, self._vocabulary)
    return messages[0] if failed else ''

  def _blame_a_tool(self, call_format, tools, ids):
    for tool in tools:
      problem = self._problem(call_format.grammar([tool], ids))
      if problem:
        raise ValueError(f'no grammar for calls of tool {tool["name"]!r}: {problem.splitlines()[0]}; its schema is '
                         f'{tool.get("parameters")}; simplify it, or set rollout.constrain to False')

  def start(self) -> Cursor:
    """Returns a cursor at the beginning of a turn."""
    return Cursor(self)

  def matcher(self) -> Any:
    """Returns llguidance's state at the beginning of a turn."""
    return self._start.deep_copy()

  def share(self, mask: bytes) -> bytes:
    """Returns an equal mask that others hold as well."""
    if len(self._shared) >= _MOST_SHARED:
      self._shared.clear()
    return self._shared.setdefault(mask, mask)

  def masks(self, tokens: Sequence[int]) -> list[bytes | None]:
    """Returns the mask that each token of a turn is drawn under; None from one on that the grammar does not allow."""
    cursor, out = self.start(), []
    for i, token in enumerate(tokens):
      mask = cursor.mask()
      out.append(mask if mask is not None and allows(mask, token) else None)
      if out[-1] is None:
        return out + [None] * (len(tokens) - i - 1)
      cursor.take(int(token))
    return out


def allows(mask: bytes, token: int) -> bool:
  """Returns whether a packed mask lets a token be drawn."""
  return bool(mask[token >> 3] >> (token & 7) & 1)


class Unspelled:
  """Which tokens would complete a string that others have begun: strings that stand for something as single tokens only.

  What has been written counts by its tail alone: the longest one that a string begins with.
  """

  def __init__(self, strings: Sequence[str], pieces: Sequence[bytes | None]):
    """Prepares the pieces of a tokenizer.

    Args:
      strings: None of which is to be spelled out.
      pieces: Bytes of each token; None for those that are no text.
    """
    self._strings = [s.encode() for s in strings]
    self._longest = max(map(len, self._strings), default=1) - 1
    self._pieces = pieces
    ends, begins = {s[-1] for s in self._strings}, {s[0] for s in self._strings}
    self._may_end = [i for i, p in enumerate(pieces) if p and ends & set(p)]
    self._may_begin = {i for i, p in enumerate(pieces) if p and begins & set(p)}
    self._rows: dict[bytes, np.ndarray] = {}

  def after(self, tail: bytes, token: int) -> bytes:
    """Returns the tail behind one more token."""
    if not tail and token not in self._may_begin:
      return b''
    text = (tail + (self._pieces[token] or b'\xff'))[-self._longest:] if self._longest else b''
    return next((text[i:] for i in range(len(text)) if any(s.startswith(text[i:]) for s in self._strings)), b'')

  def row(self, tail: bytes) -> np.ndarray:
    """Returns the packed mask of the tokens that complete no string behind a tail."""
    if tail not in self._rows:
      row = np.full(words(len(self._pieces)), ALL)
      for i in self._may_end:
        if any(s in tail + self._pieces[i] for s in self._strings):
          row[i // 32] &= ~np.uint32(1 << i % 32)
      self._rows[tail] = row
    return self._rows[tail]


class Cursor:
  """Where a turn stands in its grammar."""

  def __init__(self, grammar: Grammar):
    self.grammar = grammar
    self._matcher = grammar.matcher()
    self._taken: list[int] = []
    self._tails = [b'']  # before each token, and behind the last
    self._begun = 0  # tokens before the message in progress: a turn that goes on past an end begins anew

  def follow(self, tokens: Sequence[int]):
    """Goes to where the turn consists of these tokens, forwards or backwards."""
    same = next((i for i, (a, b) in enumerate(zip(self._taken, tokens)) if a != b), min(len(self._taken), len(tokens)))
    if same < self._begun:
      self._matcher, self._taken, self._tails, self._begun, same = self.grammar.matcher(), [], [b''], 0, 0
    self.drop(len(self._taken) - same)
    for token in tokens[same:]:
      self.take(int(token))

  def take(self, token: int):
    """Goes one token on."""
    self._taken.append(token)
    self._tails.append(self.grammar.unspelled.after(self._tails[-1], token))
    if token in self.grammar.ends:
      self._matcher, self._begun = self.grammar.matcher(), len(self._taken)
    else:
      self._matcher.consume_token(token)

  def drop(self, count: int):
    """Goes back over the last tokens."""
    left = len(self._taken) - count
    if left < self._begun:
      self.follow(self._taken[:left])
    elif count:
      self._matcher.rollback(count)
      del self._taken[left:], self._tails[left + 1:]

  @property
  def taken(self) -> int:
    """Tokens of the turn so far."""
    return len(self._taken)

  def mask(self) -> bytes | None:
    """Returns the packed mask of the next token, `Grammar.words` words; None where nothing is known."""
    row = np.zeros(self.grammar.words, np.uint32)
    return self.write(row, row.ctypes.data)

  def write(self, row: np.ndarray, address: int) -> bytes | None:
    """Puts the mask of the next token into a row, and returns it.

    Where nothing is known, as where a turn has left its grammar, the row lets every token be drawn.

    Args:
      row: [Grammar.words] uint32.
      address: Of its first byte.
    """
    self._matcher.unsafe_compute_mask_ptr(address, row.nbytes)
    np.bitwise_and(row, self.grammar.unspelled.row(self._tails[-1]), out=row)
    mask = row.tobytes()
    if mask != self.grammar.nothing and not self._matcher.is_error():
      return self.grammar.share(mask)
    logging.log_first_n(logging.ERROR, 'The grammar of calls has nothing to say after tokens %s: %s', 3, self._taken,
                        self._matcher.get_error())
    row[:] = ALL
    return None


class MaskTable:
  """Answers the decode loop of one sampler: the masks of all slots at a step."""

  def __init__(self, slots: int, vocab_size: int, width: int = 1):
    """Makes a table.

    Args:
      slots: S.
      vocab_size: V, of the policy.
      width: W.
    """
    self.everywhere: jax.sharding.Sharding | None = None  # on a mesh, of what the host is asked and answers
    self._vocab_size = vocab_size
    self._out = np.zeros((slots, width, words(vocab_size)), np.uint32)
    self._address = self._out.ctypes.data
    self.begin({})

  def begin(self, cursors: Mapping[int, Cursor]):
    """Takes the slots to constrain in the next call of `decode`, each at where its turn stands; others draw freely."""
    self._cursors = dict(cursors)
    self._first = {slot: cursor.taken for slot, cursor in cursors.items()}
    self._masks: dict[int, list[bytes | None]] = {slot: [] for slot in cursors}
    self._out[...] = ALL
    for slot, cursor in cursors.items():
      self._out[slot, :, cursor.grammar.words:] = 0  # ids that the tokenizer does not know

  def drawn(self, slot: int, count: int) -> tuple[bytes | None, ...]:
    """Returns the masks that the first `count` tokens of the call were drawn under in a slot."""
    return tuple(self._masks[slot][:count]) if slot in self._masks else (None,) * count

  def allowed(self, counts: jax.Array, tokens: jax.Array, proposals: jax.Array | None = None) -> jax.Array:
    """Returns [S, W, V] bool inside a jitted loop: which tokens may be drawn next, and after each proposal.

    Args:
      counts: [S] int32. Tokens drawn so far in this call.
      tokens: [S, n] int32. Which those are.
      proposals: [S, W - 1] int32; None if there are none.
    """
    asked = [counts[:, None], *([] if proposals is None else [proposals]), tokens]
    shape = jax.ShapeDtypeStruct(self._out.shape, jnp.uint32)
    ask = functools.partial(jax.pure_callback, self._answer, shape)
    if self.everywhere is None:
      # On CPUs the host reads and writes the device's own memory; a pure_callback costs a millisecond.
      ask = functools.partial(jax.lax.platform_dependent, cpu=buffer_callback(self._answer_into, shape), default=ask)
    return unpack(self._spread(ask(self._spread(jnp.concatenate(asked, axis=1)))), self._vocab_size)

  def _spread(self, x: jax.Array) -> jax.Array:
    return x if self.everywhere is None else jax.lax.with_sharding_constraint(x, self.everywhere)

  def _answer_into(self, _: Any, out: Any, asked: Any):
    np.asarray(out)[...] = self._answer(asked)

  def _answer(self, asked: Any) -> np.ndarray:
    width = self._out.shape[1]
    rows = np.asarray(asked).tolist()
    for slot, cursor in self._cursors.items():
      row, masks = rows[slot], self._masks[slot]
      count, known = row[0], cursor.taken - self._first[slot]
      if known == count and len(masks) > count and width == 1:
        continue  # it has ended; its last mask stands
      if known > count:
        cursor.drop(known - count)
      for token in row[width + known:width + count]:
        cursor.take(token)
      del masks[count:]
      masks.append(self._write(slot, 0, cursor))
      if width > 1:
        self._look_ahead(slot, cursor, row[1:width])
    return self._out

  def _look_ahead(self, slot: int, cursor: Cursor, proposals: list[int]):
    """Adds the masks after each proposal that may be drawn; leaves the cursor where it is."""
    masks, ahead = self._masks[slot], 0
    for i, proposal in enumerate(proposals, 1):
      if proposal < 0 or masks[-1] is not None and not allows(masks[-1], proposal):
        break
      cursor.take(proposal)
      ahead += 1
      masks.append(self._write(slot, i, cursor))
    cursor.drop(ahead)

  def _write(self, slot: int, place: int, cursor: Cursor) -> bytes | None:
    _, width, length = self._out.shape
    return cursor.write(self._out[slot, place, :cursor.grammar.words], self._address + 4 * length * (slot * width + place))


class _Pieces:
  """A tokenizer as llguidance reads it."""

  def __init__(self, tokenizer: Any, pieces: Sequence[bytes], special: set[int], ends: Sequence[int]):
    """Wraps a tokenizer whose `special` ids stand for no text."""
    mark = lambda i, text: b'\xff' + (text or str(i).encode()) if i in special else text
    self.tokens = [mark(i, text) for i, text in enumerate(pieces)]
    self.special_token_ids = sorted(special)
    self.eos_token_id = ends[0]
    self.bos_token_id = None
    self._tokenizer = tokenizer

  def __call__(self, text: str | bytes) -> list[int]:
    text = text if isinstance(text, str) else text.decode('utf-8', errors='replace')
    return self._tokenizer.encode(text, allow_markers=True)


def _llguidance() -> Any:
  try:
    import llguidance  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ValueError("constrained decoding needs llguidance: pip install -e '.[constrain]'") from error
  return llguidance
