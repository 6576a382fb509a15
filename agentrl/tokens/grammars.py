"""What a turn may be, as a grammar: pieces that call formats put theirs together from. Needs no jax.

A grammar describes a whole turn, so that nothing in it parses as a call that is none: free text without the strings that
close or spoil a call, and calls for the tools on offer. It is written in the Lark dialect of llguidance, which
`agentrl.sampling.constrain` compiles.
"""

from __future__ import annotations

import json
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

ANY = '/(?s:.*)/'
# Between the parts of a JSON value: a blank, or a line break with indentation. Unbounded, a policy may never stop.
_BLANKS = r'\x20|\n\x20{0,16}'
_BLANK = f'BLANK: /{_BLANKS}/\nblank: BLANK?\n'
_APPLICATORS = ('allOf', 'anyOf', 'oneOf', '$ref', 'not')


class TurnGrammar(NamedTuple):
  """What a turn may be.

  Attributes:
    turn: Grammar of it, with a rule `start`.
    tokens: Markers that it knows as single tokens, by id, rather than by their text.
    unspelled: Strings that no other tokens may spell out, not even where the grammar would let them.
  """

  turn: str
  tokens: tuple[str, ...] = ()
  unspelled: tuple[str, ...] = ()


def literal(text: str) -> str:
  """Returns a string as a grammar writes it."""
  return json.dumps(text, ensure_ascii=False)


def pattern(text: str) -> str:
  """Returns the regular expression of a string, without slashes around it."""
  return ''.join(c if c.isascii() and c.isalnum() else f'\\x{{{ord(c):x}}}' for c in text)


def without(strings: Iterable[str], base: str = ANY) -> str:
  """Returns a terminal: `base`, if none of the strings occurs in it."""
  alternatives = '|'.join(pattern(s) for s in strings)
  return f'({base} & ~/(?s:.*)({alternatives})(?s:.*)/)' if alternatives else base


def token(name: str, ids: Mapping[str, int]) -> str:
  """Returns a marker as a single token.

  Raises:
    ValueError: if the tokenizer has no such token.
  """
  if name not in ids:
    raise ValueError(f'{name!r} is no single token of the tokenizer, and text that spells it out cannot be told from an '
                     'argument; train the tokenizer with it among its markers, or take call format \'xml\'')
  return f'<[{ids[name]}]>'


def json_calls(tools: Sequence[Mapping[str, Any]], *, arguments: str = 'arguments') -> str:
  """Returns the rule `call`: a JSON object with the name of one of the tools and arguments that fit it.

  Args:
    tools: Each with 'name' and 'parameters', a JSON schema.
    arguments: Key of the arguments.
  Raises:
    ValueError: if there are no tools, or one takes no object.
  """
  if not tools:
    raise ValueError('there are no tools that could be called')
  rules = [f'call: {" | ".join(f"call_{i}" for i in range(len(tools)))}\n', _BLANK]
  for i, tool in enumerate(tools):
    rules.append(f'call_{i}: "{{" blank {literal(json.dumps("name"))} blank ":" blank '
                 f'{literal(json.dumps(tool["name"], ensure_ascii=False))} blank "," blank '
                 f'{literal(json.dumps(arguments))} blank ":" blank {json_arguments(tool)} blank "}}"\n')
  return ''.join(rules)


def json_arguments(tool: Mapping[str, Any]) -> str:
  """Returns the non-terminal of a tool's arguments as a JSON object.

  Objects have the properties that are named and no others, unless the schema says more about those.

  Raises:
    ValueError: if the tool takes no object.
  """
  schema = dict(tool.get('parameters') or {})
  if schema.setdefault('type', 'object') != 'object':
    raise ValueError(f'tool {tool["name"]!r} takes no object but {schema["type"]!r}: {schema}')
  if not set(_APPLICATORS) & set(schema):
    schema.setdefault('properties', {})
  return '%json ' + json.dumps({**_closed(schema), 'x-guidance': {'whitespace_pattern': _BLANKS}}, ensure_ascii=False)


def _closed(schema: Any) -> Any:
  if not isinstance(schema, Mapping):
    return schema
  out = dict(schema)
  for key in ('properties', '$defs', 'definitions'):
    if isinstance(out.get(key), Mapping):
      out[key] = {name: _closed(inner) for name, inner in out[key].items()}
  for key in ('items', 'additionalProperties'):
    if key in out:
      out[key] = _closed(out[key])
  for key in ('anyOf', 'oneOf', 'prefixItems'):
    if isinstance(out.get(key), list):
      out[key] = [_closed(inner) for inner in out[key]]
  # What is put together from several schemas has the properties of all of them.
  if 'properties' in out and not set(_APPLICATORS) & set(out):
    out.setdefault('additionalProperties', False)
  return out


def content(tool: Mapping[str, Any], argument: str, excluded: Sequence[str]) -> str:
  """Returns the terminal of a string argument that is written as it stands.

  Args:
    tool: With 'name' and 'parameters'.
    argument: Its name. Of its schema, enumerations and lengths are kept to.
    excluded: Strings that would end it, or make something else of it.
  Raises:
    ValueError: if nothing is left to write.
  """
  schema = (tool.get('parameters') or {}).get('properties', {}).get(argument, {})
  options = schema.get('enum', [schema['const']] if 'const' in schema else None)
  if options is not None:
    fitting = [o for o in options if isinstance(o, str) and not any(s in o for s in excluded)]
    if not fitting:
      raise ValueError(f'tool {tool["name"]!r}: none of {options} for {argument!r} can be written without {excluded}')
    return f'/{"|".join(pattern(o) for o in fitting)}/'
  least, most = schema.get('minLength', 0), schema.get('maxLength', '')
  return without(excluded, f'/(?s:.){{{least},{most}}}/' if least or most != '' else ANY)
