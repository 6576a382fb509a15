"""Config files: loading, strict overrides from the command line, comparing, writing.

A config file is Python with a function `get_config()` that returns an `ml_collections.ConfigDict`.
`configs/base.py` holds every default once: the reference that other files are checked against.

    config = load('configs/quickstart.py', {'rl.steps': '20'}, reference='configs/base.py')

Why not `ml_collections.config_flags`: of an override with an unknown key it makes a traceback, it
cannot set what is None by default, and it takes `dims=x` for a tuple of strings. Here every such
mistake is a `ConfigError` that names the nearest known key and the type expected;
`command_line.run` turns it into one line on stderr and exit code 2.

What the text of an override may be follows from the type of the default:

    bool          true, false, 1, 0; no text at all means true
    int           an integer, underscores allowed; 1e6 and 1.0 are refused
    float         any number and inf; nan is refused
    str           the text itself, quotes and all
    tuple, list   (1, 2), [1, 2] or 1,2; items of the type that all items of the default have
    None          a Python literal, else the text itself
    placeholder   None, or what its type takes

What the reference has as None can be set back to None.

A section that is empty in the reference is open: a config file may put any keys there, and so may
an override, whose text is read as under None.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import pathlib
import sys
import traceback
from typing import Any, Iterator, Mapping, Sequence

from ml_collections import config_dict
from ml_collections import ConfigDict

_BOOLS = {'true': True, '1': True, 'false': False, '0': False}


class ConfigError(ValueError):
  """A mistake in a config or an override, worded for whoever made it."""


@dataclasses.dataclass(frozen=True)
class _Absent:
  """Stands for the value of a key that a config does not have."""

  def __repr__(self) -> str:
    return '<absent>'


ABSENT = _Absent()


def flatten(config: ConfigDict) -> dict[str, Any]:
  """Returns the values of all keys by dotted path; an empty section stands as an empty ConfigDict.

  Example:
    >>> flatten(ConfigDict({'seed': 0, 'rl': {'steps': 20}}))
    {'rl.steps': 20, 'seed': 0}
  """
  flat = {}
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict) and len(value):
      flat.update({f'{key}.{inner}': v for inner, v in flatten(value).items()})
    else:
      flat[key] = value
  return flat


def load(path_or_module: str | pathlib.Path, overrides: Mapping[str, str | None] | None = None,
         reference: ConfigDict | str | pathlib.Path | None = None) -> ConfigDict:
  """Returns the locked config of a file, overrides applied.

  Args:
    path_or_module: 'configs/quickstart.py', or the module 'configs.quickstart'. What follows a
      colon is passed on: 'sweep.py:3' gives `get_config('3')`. While the file runs, the folder
      above the nearest `configs` folder is on the import path, so that `from configs import base`
      works from any working directory.
    overrides: Text by dotted path, as from the command line; None for an override without text.
    reference: Config, file or module that knows every key and its type; None for no check.
  Returns:
    The config, with locked structure.
  Raises:
    ConfigError: if the file is missing, fails, or does not agree with the reference, or an override
      is wrong.
  """
  paths = [path_or_module] + ([] if isinstance(reference, ConfigDict | None) else [reference])
  with _import_path([_split_argument(p)[0] for p in paths]):
    config = _run_get_config(path_or_module)
    if isinstance(reference, (str, pathlib.Path)):
      reference = _run_get_config(reference)
  if reference is not None:
    try:
      check_keys(config, reference)
    except ConfigError as error:
      raise ConfigError(f'{path_or_module}: {error}') from None
  with config.unlocked():
    apply_overrides(config, overrides or {}, reference)
  return config.lock()


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str | None],
                    reference: ConfigDict | None = None):
  """Sets keys in place from text, by the types of the values they have.

  Args:
    config: Changed in place; not changed at all if one of the overrides is refused.
    overrides: Text by dotted path. A number in the path picks a section of a tuple or list.
    reference: Has the types, where it knows the key; None takes them from the config.
  Raises:
    ConfigError: if a key is unknown or a text does not fit the type of its key.
  Example:
    >>> config = ConfigDict({'rl': {'steps': 20, 'clip': (0.2, 0.2)}})
    >>> apply_overrides(config, {'rl.steps': '50', 'rl.clip': '0.2,0.3'})
    >>> config.rl.steps, config.rl.clip
    (50, (0.2, 0.3))
    >>> apply_overrides(config, {'rl.step': '20'})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    agentrl.core.config.ConfigError: unknown config key 'rl.step'; the nearest is 'rl.steps' ...
  """
  parsed = []
  for path, text in overrides.items():
    open_section = _open_section(config, reference, path)
    if open_section is not None:
      key = path.rpartition('.')[2]
      parsed.append((open_section, key, True if text is None else _convert(text, type(None))))
      continue
    section, key = _locate(config, path)
    default, kind, nullable = section[key], section.get_type(key), section[key] is None
    if reference is not None and path in flatten(reference):
      known, _ = _locate(reference, path)
      nullable = known[key] is None
      kind = kind if known.get_type(key) is type(None) else known.get_type(key)
    parsed.append((section, key, _parse(path, text, default, kind, nullable)))
  for section, key, value in parsed:
    # The file may have narrowed the type that the reference gives, an int for a float.
    with section.ignore_type(), section.unlocked():
      section[key] = value


def check_keys(config: ConfigDict, reference: ConfigDict):
  """Refuses a config with a key that the reference does not have, or a value of another type.

  None fits only where the reference has None. An int fits a float, a list a tuple; a bool is no
  int. Below a section that is empty in the reference, and where it has None, everything fits. This
  is needed beside the config's own lock, which lets None and bools pass and can be opened.

  Args:
    config: To be checked.
    reference: Knows every key.
  Raises:
    ConfigError: naming the key, what is expected and the nearest known key.
  """
  _check_section(config, reference, (), reference)


def diff(old: ConfigDict | Mapping[str, Any],
         new: ConfigDict | Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Returns the keys whose values differ, with the old and the new value; `ABSENT` where missing.

  A tuple equals the list of its items, so that a config read back from JSON equals itself.

  Example:
    >>> diff(ConfigDict({'a': 1, 'b': (1, 2)}), {'a': 2, 'b': [1, 2], 'c': 0})
    {'a': (1, 2), 'c': (<absent>, 0)}
  """
  old, new = (flatten(c if isinstance(c, ConfigDict) else ConfigDict(c)) for c in (old, new))
  keys = list(old) + [key for key in new if key not in old]
  pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys}
  return {key: (a, b) for key, (a, b) in pairs.items()
          if _plain(a) != _plain(b) or isinstance(a, bool) != isinstance(b, bool)}


def to_json(config: ConfigDict) -> str:
  """Returns the config as JSON text, keys sorted; tuples become lists.

  Raises:
    ConfigError: naming the first key whose value JSON cannot hold, such as a function.
  """
  for key, value in flatten(config).items():
    try:
      json.dumps(_plain(value))
    except TypeError:
      raise ConfigError(f'config key {key!r} holds {value!r}, which JSON cannot hold; name it by a '
                        'string that the code looks up') from None
  return json.dumps(_plain(config), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
  """Returns the config that `to_json` wrote, with lists where it had tuples."""
  return ConfigDict(json.loads(text))


def _split_argument(path_or_module: str | pathlib.Path) -> tuple[str, str | None]:
  name, colon, argument = str(path_or_module).partition(':')
  return name, argument if colon else None


@contextlib.contextmanager
def _import_path(names: Sequence[str]) -> Iterator[None]:
  """Puts the folders above the `configs` folders of some files on the import path for a while."""
  roots = []
  for name in names:
    folders = [p.parent for p in pathlib.Path(name).resolve().parents if p.name == 'configs']
    roots.extend(str(folder) for folder in folders[:1])
  saved = list(sys.path)
  sys.path[:0] = roots
  try:
    yield
  finally:
    sys.path[:] = saved


def _run_get_config(path_or_module: str | pathlib.Path) -> ConfigDict:
  """Runs a file's `get_config`; what goes wrong in it becomes a ConfigError with file and line."""
  name, argument = _split_argument(path_or_module)
  is_file = name.endswith('.py') or '/' in name
  if is_file and not pathlib.Path(name).is_file():
    siblings = [str(p) for p in sorted(pathlib.Path(name).parent.glob('*.py'))]
    near = [f'; the nearest is {match!r}' for match in difflib.get_close_matches(name, siblings, 1)]
    raise ConfigError(f'no config file {name!r}' + ''.join(near))
  # A config file is a user's program: any error in it is reported as theirs, at this boundary.
  try:
    module = _import_file(name) if is_file else importlib.import_module(name)
    config = module.get_config() if argument is None else module.get_config(argument)
  except Exception as error:
    raise ConfigError(f'config {name!r} failed{_where(error, name)}: {_explain(error)}') from error
  if not isinstance(config, ConfigDict):
    kind = type(config).__name__
    raise ConfigError(f'get_config() of {name!r} returned a {kind}, not a ConfigDict')
  return config


def _import_file(name: str):
  path = pathlib.Path(name).resolve()
  spec = importlib.util.spec_from_file_location(f'agentrl_config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _where(error: Exception, name: str) -> str:
  """Says the last line of the config file, or of its module, that was running."""
  file = pathlib.Path(name).name if name.endswith('.py') else name.rpartition('.')[2] + '.py'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).name == file]
  return f' at line {lines[-1]}' if lines else ''


def _explain(error: Exception) -> str:
  # ml_collections appends the whole config to this one message.
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
  text = text.strip('"\'').split(' Other fields present:')[0]
  return f'{type(error).__name__}: {text}'


def _locate(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
  """Returns the section that holds a key, and the key's last name."""
  node: Any = config
  *sections, last = path.split('.')
  for name in sections:
    node = _child(config, path, node, name)
  if not isinstance(node, ConfigDict) or last not in node:
    raise ConfigError(_unknown_key(path, config))
  if isinstance(node[last], ConfigDict):
    keys = ', '.join(f'{path}.{key}' for key in node[last]) or 'none'
    raise ConfigError(f'config key {path!r} is a section without a value; its keys: {keys}')
  return node, last


def _open_section(config: ConfigDict, reference: ConfigDict | None,
                  path: str) -> ConfigDict | None:
  """Returns the section to put a new key in, if the reference leaves it open; None elsewhere."""
  *sections, key = path.split('.')
  known, node = reference, config
  for name in sections:
    if known is None or not isinstance(known.get(name), ConfigDict) or name not in node:
      return None
    known, node = known[name], node[name]
  return node if sections and known is not None and not len(known) and key not in node else None


def _child(config: ConfigDict, path: str, node: Any, name: str) -> Any:
  if isinstance(node, ConfigDict) and name in node:
    return node[name]
  if isinstance(node, (tuple, list)) and name.isdecimal() and int(name) < len(node):
    return node[int(name)]
  raise ConfigError(_unknown_key(path, config))


def _parse(path: str, text: str | None, default: Any, kind: type, nullable: bool) -> Any:
  """Returns the value that a text stands for, given the default and its declared type."""
  if text is None:
    if kind is bool:
      return True
    raise ConfigError(f'config key {path!r} needs a value: --config.{path}={default}')
  if nullable and text == 'None':
    return None
  if kind in (tuple, list):
    return _parse_items(path, text, default or (), kind)
  value = _convert(text, kind)
  if value is ABSENT:
    raise ConfigError(_wrong_type(path, _expected(kind), default, text))
  return value


def _convert(text: str, kind: type) -> Any:
  """Returns the text as a value of a type, ABSENT where it is none."""
  if kind is str:
    return text
  if kind is bool:
    return _BOOLS.get(text.lower(), ABSENT)
  if kind in (int, float):
    try:
      value = kind(text)
    except ValueError:
      return ABSENT
    return ABSENT if math.isnan(value) else value
  if kind is type(None):
    try:
      return ast.literal_eval(text)
    except (SyntaxError, ValueError):
      return text
  return ABSENT


def _parse_items(path: str, text: str, default: Sequence[Any], kind: type) -> tuple | list:
  stripped = text.strip()
  inner = stripped[1:-1] if stripped[:1] + stripped[-1:] in ('()', '[]') else stripped
  try:
    items = ast.literal_eval(f'[{inner}]')
  except (SyntaxError, ValueError):
    items = [item.strip() for item in inner.split(',') if item.strip()]
  kinds = {type(item) for item in default}
  if len(kinds) == 1:
    (item_kind,) = kinds
    items = [float(i) if item_kind is float and type(i) is int else i for i in items]
    if any(type(i) is not item_kind for i in items):
      expected = f'{_expected(kind)} of {item_kind.__name__}'
      raise ConfigError(_wrong_type(path, expected, default, text))
  return kind(items)


def _check_section(config: ConfigDict, reference: ConfigDict, path: tuple[str, ...],
                   root: ConfigDict):
  if path and not len(reference):
    return
  for key in config:
    full = '.'.join(path + (key,))
    if key not in reference:
      raise ConfigError(_unknown_key(full, root))
    value, known, kind = config[key], reference[key], reference.get_type(key)
    if isinstance(value, ConfigDict) and isinstance(known, ConfigDict):
      _check_section(value, known, path + (key,), root)
    elif not _fits(value, known, kind):
      raise ConfigError(_wrong_type(full, _expected(kind), known, value))


def _fits(value: Any, known: Any, kind: type) -> bool:
  if kind is type(None):
    return True
  if value is None:
    return known is None
  if isinstance(value, bool) or kind is bool:
    return isinstance(value, bool) and kind is bool
  accepted = {float: (float, int), tuple: (tuple, list), list: (tuple, list)}
  return isinstance(value, accepted.get(kind, kind))


def _unknown_key(path: str, config: ConfigDict) -> str:
  """Words an unknown key: by the nearest known path, or one whose last name is nearest."""
  flat = flatten(config)
  last = path.rpartition('.')[2]

  def score(key: str) -> float:
    whole = difflib.SequenceMatcher(None, path, key).ratio()
    name = difflib.SequenceMatcher(None, last, key.rpartition('.')[2]).ratio()
    return max(whole, 0.95 * name) + 0.01 * whole

  best = max(flat, key=score, default=None)
  if best is None or score(best) < 0.6:
    return f'unknown config key {path!r}; known sections and keys: {", ".join(config)}'
  value = flat[best]
  kind = 'an open section' if isinstance(value, ConfigDict) else f'{type(value).__name__}, {value!r}'
  return f'unknown config key {path!r}; the nearest is {best!r} ({kind})'


def _wrong_type(path: str, expected: str, default: Any, got: Any) -> str:
  return f'config key {path!r} expects {expected}, such as {default!r}; got {got!r}'


def _expected(kind: type) -> str:
  return {bool: 'true or false', int: 'an int', float: 'a float', str: 'a str', tuple: 'a tuple',
          list: 'a list', ConfigDict: 'a section'}.get(kind, kind.__name__)


def _plain(value: Any) -> Any:
  """Returns a value as JSON would give it back: sections as dicts, tuples as lists."""
  if isinstance(value, (ConfigDict, config_dict.FrozenConfigDict, dict)):
    return {key: _plain(value[key]) for key in value}
  if isinstance(value, (tuple, list)):
    return [_plain(item) for item in value]
  return value
