"""Finding an extension by its name: a new one is one new file, and nothing else changes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from typing import Callable, Generic, TypeVar

T = TypeVar('T')


class UnknownNameError(LookupError):
  """A name that nothing is registered under; the message lists the names that are known."""


class Registry(Generic[T]):
  """Values (usually factories) by name, of one kind.

  With `package`, a name that is not registered yet is looked for in the module `<package>.<name>`,
  which registers itself when it is imported.

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
    if name in self._values:
      return self._values[name]
    known = self.names()
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
