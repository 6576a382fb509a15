"""Finding an extension by its name: a new one is one new file, and nothing else changes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any, Callable, Generic, Mapping, TypeVar

T = TypeVar('T')


class UnknownNameError(LookupError):
  """A name that nothing is registered under; the message lists the names that are known."""


def call(section: str, factory: Callable[..., T], settings: Mapping[str, Any]) -> T:
  """Returns `factory(**settings)`, where the settings were written by a user.

  Args:
    section: Of the config, for the message.
    factory: What to call.
    settings: Its keyword arguments.
  Raises:
    ValueError: if it does not take one of them, or needs another; lists what it takes.
  """
  signature = inspect.signature(factory)
  try:
    signature.bind(**settings)
  except TypeError as error:
    raise ValueError(f'{section}: {error}; known: {", ".join(signature.parameters)}') from None
  return factory(**settings)


def pop_name(section: str, options: dict[str, Any]) -> str:
  """Takes the name of a choice out of its options.

  Raises:
    ValueError: if there is none, or it is no text.
  """
  name = options.pop('name', None)
  if not isinstance(name, str):
    raise ValueError(f"{section}: {{'name': {name!r}, **{options}}} needs a name, which choice it is")
  return name


class Registry(Generic[T]):
  """Values (usually factories) by name, of one kind.

  With `package`, a name that is not registered yet is looked for in the module `<package>.<name>`,
  which registers itself when it is imported, and then in all modules of the package.

  Example:
    >>> shapes = Registry('shape')
    >>> @shapes.register('square')
    ... def square(side):
    ...   return side * side
    >>> shapes.get('square')(3)
    9
    >>> shapes.get('squar')  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    agentrl.core.registry.UnknownNameError: unknown shape 'squar'; did you ... Known: square
  """

  def __init__(self, kind: str, package: str | None = None):
    """Makes an empty registry.

    Args:
      kind: What the values are, for messages: 'tool', 'algorithm', ...
      package: Package whose modules register themselves; None looks nowhere.
    """
    self.kind = kind
    self._package = package
    self._values: dict[str, T] = {}

  def register(self, name: str) -> Callable[[T], T]:
    """Returns a decorator that registers its argument under `name` and hands it back.

    Raises:
      ValueError: when the decorator is applied, if the name is taken.
    """
    def decorate(value: T) -> T:
      if name in self._values:
        raise ValueError(f'{self.kind} {name!r} is registered already, as {self._values[name]!r}')
      self._values[name] = value
      return value
    return decorate

  def get(self, name: str) -> T:
    """Returns the value registered under `name`.

    Raises:
      UnknownNameError: if there is none.
    """
    if name not in self._values:
      self._import(name)
    known = self.names() if name not in self._values else ()
    if name in self._values:
      return self._values[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else '.'
    raise UnknownNameError(f'unknown {self.kind} {name!r}{hint} Known: {", ".join(known)}')

  def names(self) -> list[str]:
    """Returns every known name, sorted, after importing the package's modules."""
    if self._package is not None:
      for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
        if not module.name.startswith('_'):
          self._import(module.name)
    return sorted(self._values)

  def _import(self, name: str):
    if self._package is None or not name.isidentifier():
      return
    module = f'{self._package}.{name}'
    if importlib.util.find_spec(module) is not None:
      importlib.import_module(module)
