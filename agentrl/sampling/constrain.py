"""Which tokens may come next, so that every call a policy writes is one for a tool on offer. Needs the extra 'constrain'.

A call format says what a turn may be (`CallFormat.grammar`), llguidance which of the tokenizer's pieces can go on from
where a turn stands. A `Cursor` follows one turn. The decode loop asks the `MaskTable` of its sampler at every step, on
the host: the answer is a function of the tokens drawn, so nothing has to be undone where a slot is rolled back, and a
turn that is cut into calls gets the same masks.

A mask is packed: bit v % 32 of word v // 32 tells whether token v may be drawn.

Axes: S slots, n tokens of a call, W tokens of a step (1 without speculation), V vocabulary.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from agentrl.models.transformer import unpack
from agentrl.tokens.grammars import TurnGrammar

# Distinct masks that are kept to be shared; beyond, what is in use stays with its trajectories.
_MOST_SHARED = 1 << 14


def words(vocab_size: int) -> int:
  """Returns the 32-bit words of a packed mask."""
  return -(-vocab_size // 32)


class Grammar:
  """What a turn may be, in the pieces of a tokenizer: shared by all turns."""

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
    self._vocabulary = self._library.LLTokenizer(
        self._library.TokenizerWrapper(_Pieces(tokenizer, {*closing, *ends}, self.ends)), n_vocab=tokenizer.vocab_size,
        eos_token=list(self.ends))
    problem = self._problem(turn)
    if problem:
      self._blame_a_tool(call_format, tools, ids)
      raise ValueError(f'call format {call_format.name!r} has no grammar for the tools '
                       f'{[t["name"] for t in tools]} together: {problem}')
    self.vocab_size = tokenizer.vocab_size
    self._starts = [self._library.LLMatcher(self._vocabulary, g) for g in (turn.turn, turn.guard) if g]
    self._shared: dict[bytes, bytes] = {}

  def _problem(self, turn: TurnGrammar) -> str:
    validate = self._library.LLMatcher.validate_grammar_with_warnings
    found = [validate(g, self._vocabulary) for g in (turn.turn, turn.guard) if g]
    return next((messages[0] for failed, messages in found if failed), '')

  def _blame_a_tool(self, call_format, tools, ids):
    for tool in tools:
      problem = self._problem(call_format.grammar([tool], ids))
      if problem:
        raise ValueError(f'no grammar for calls of tool {tool["name"]!r}: {problem.splitlines()[0]}; its schema is '
                         f'{tool.get("parameters")}; simplify it, or set rollout.constrain to False')

  def start(self) -> Cursor:
    """Returns a cursor at the beginning of a turn."""
    return Cursor(self)

  def matchers(self) -> list[Any]:
    """Returns llguidance's state at the beginning of a turn, one a grammar."""
    return [m.deep_copy() for m in self._starts]

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
      cursor.follow(tokens[:i + 1])
    return out


def allows(mask: bytes, token: int) -> bool:
  """Returns whether a packed mask lets a token be drawn."""
  return bool(mask[token >> 3] >> (token & 7) & 1)


class Cursor:
  """Where a turn stands in its grammar."""

  def __init__(self, grammar: Grammar):
    self.grammar = grammar
    self._matchers = grammar.matchers()
    self._taken: list[int] = []
    self._begun = 0  # tokens before the message in progress: a turn that goes on past an end begins anew
    self._buffer = np.zeros(words(grammar.vocab_size), np.uint32)

  def follow(self, tokens: Sequence[int]):
    """Goes to where the turn consists of these tokens, forwards or backwards."""
    same = next((i for i, (a, b) in enumerate(zip(self._taken, tokens)) if a != b), min(len(self._taken), len(tokens)))
    if same < self._begun:
      self._matchers, self._taken, self._begun, same = self.grammar.matchers(), [], 0, 0
    if same < len(self._taken):
      for matcher in self._matchers:
        matcher.rollback(len(self._taken) - same)
      del self._taken[same:]
    for token in tokens[same:]:
      self.take(token)

  def take(self, token: int):
    """Goes one token on."""
    self._taken.append(int(token))
    for matcher in self._matchers:
      matcher.consume_token(int(token))
    if token in self.grammar.ends:
      self._matchers, self._begun = self.grammar.matchers(), len(self._taken)

  def drop(self, count: int):
    """Goes back over the last tokens."""
    if count:
      self.follow(self._taken[:len(self._taken) - count])

  @property
  def taken(self) -> int:
    """Tokens of the turn so far."""
    return len(self._taken)

  def mask(self) -> bytes | None:
    """Returns the packed mask of the next token; None where nothing is known, as where a turn left its grammar."""
    out = None
    for matcher in self._matchers:
      matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, self._buffer.nbytes)
      if matcher.is_error():
        logging.log_first_n(logging.ERROR, 'A turn is sampled without constraint from here on: %s', 3, matcher.get_error())
        return None
      out = self._buffer.copy() if out is None else out & self._buffer
    if not out.any():
      logging.log_first_n(logging.ERROR, 'The grammar of calls leaves no token after %s', 3, self._taken)
      return None
    return self.grammar.share(out.tobytes())


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
    self.begin({})

  def begin(self, cursors: Mapping[int, Cursor]):
    """Takes the slots to constrain in the next call of `decode`, each at where its turn stands; others draw freely."""
    self._cursors = dict(cursors)
    self._first = {slot: cursor.taken for slot, cursor in cursors.items()}
    self._masks: dict[int, list[bytes | None]] = {slot: [] for slot in cursors}
    self._out[...] = np.uint32(0xFFFFFFFF)

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
    masks = jax.pure_callback(self._answer, shape, self._spread(jnp.concatenate(asked, axis=1)))
    return unpack(self._spread(masks), self._vocab_size)

  def _spread(self, x: jax.Array) -> jax.Array:
    return x if self.everywhere is None else jax.lax.with_sharding_constraint(x, self.everywhere)

  def _answer(self, asked: Any) -> np.ndarray:
    width = self._out.shape[1]
    asked = np.asarray(asked)
    for slot, cursor in self._cursors.items():
      count, *row = asked[slot, :width + asked[slot, 0]].tolist()
      known = cursor.taken - self._first[slot]
      if known > count:
        cursor.drop(known - count)
      elif known == count and len(self._masks[slot]) > count and width == 1:
        continue  # it has ended; its last mask stands
      for token in row[width - 1 + known:]:
        cursor.take(token)
      self._look_ahead(slot, cursor, count, row[:width - 1])
    return self._out

  def _look_ahead(self, slot: int, cursor: Cursor, count: int, proposals: list[int]):
    """Notes the masks after `count` tokens and after each proposal that may be drawn; leaves the cursor where it is."""
    masks, ahead = self._masks[slot], 0
    del masks[count:]
    for i, proposal in enumerate((*proposals, -1)):
      mask = cursor.mask()
      masks.append(mask)
      self._out[slot, i] = _row(mask, self._out.shape[2])
      if proposal < 0 or mask is not None and not allows(mask, proposal):
        break
      cursor.take(proposal)
      ahead += 1
    cursor.drop(ahead)


def _row(mask: bytes | None, length: int) -> np.ndarray:
  """Returns a mask as [V / 32] uint32; ids that the tokenizer does not know are not drawn."""
  if mask is None:
    return np.full(length, 0xFFFFFFFF, np.uint32)
  row = np.frombuffer(mask, np.uint32)
  return np.pad(row, (0, length - len(row))) if len(row) < length else row


class _Pieces:
  """A tokenizer as llguidance reads it."""

  def __init__(self, tokenizer: Any, special: set[int], ends: Sequence[int]):
    """Wraps a tokenizer whose `special` ids stand for no text."""
    mark = lambda i, text: b'\xff' + (text or str(i).encode()) if i in special else text
    self.tokens = [mark(i, text) for i, text in enumerate(tokenizer.token_bytes())]
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
