"""Which blocks hold the beginnings of contexts: a radix tree over tokens, a block an edge.

A context that begins as another did takes over the blocks that they have in common, and copies the one in which they
part. What no context uses any more stays until its room is needed: the least recently met leaf goes first.
"""

from __future__ import annotations

import itertools
from typing import Iterator

import numpy as np

# Nodes compared token by token where a context leaves the tree inside a block, the latest of those that begin alike.
_CANDIDATES = 32


class Block:
  """A block of the cache, as the host knows it.

  Attributes:
    id: Its place in the cache.
    users: Contexts that hold it.
    nodes: Nodes of the tree that speak of it.
    pins: Copies of it that are still to be made.
    sealed: Leading tokens that others rely on: whoever holds it alone may write behind them.
    due: Step of the work to come that writes it; -1 where its content is there.
  """

  __slots__ = ('id', 'users', 'nodes', 'pins', 'sealed', 'due')

  def __init__(self, number: int):
    self.id, self.users, self.nodes, self.pins, self.sealed, self.due = number, 0, 0, 0, 0, -1


class Node:
  """The tokens of an edge, up to a block of them, and the block that begins with them; a shorter edge is a leaf."""

  __slots__ = ('tokens', 'block', 'parent', 'children', 'alike', 'met')

  def __init__(self, tokens: np.ndarray, block: Block | None, parent: Node | None):
    self.tokens, self.block, self.parent = tokens, block, parent
    self.children: dict[bytes, Node] = {}
    self.alike: dict[int, list[Node]] = {}  # children by first token, latest last
    self.met = 0

  @property
  def gone(self) -> bool:
    """Whether it was taken out of the tree."""
    return self.parent is None and self.block is not None


class PrefixTree:
  """The beginnings of contexts that the cache holds, for each policy apart."""

  def __init__(self, block: int):
    """Makes an empty tree over blocks of `block` tokens."""
    self._block = block
    self.clear()

  def clear(self):
    """Forgets everything, which frees no block."""
    self._roots: dict[str, Node] = {}
    self._clock = itertools.count(1)

  def root(self, policy: str) -> Node:
    """Returns the node of the empty context."""
    return self._roots.setdefault(policy, Node(np.zeros(0, np.int32), None, None))

  def match(self, policy: str, tokens: np.ndarray) -> tuple[list[Node], Node | None, int]:
    """Returns the nodes that `tokens`, [n] int32, begins with, and the one it shares tokens with beyond, and how many.

    The last is None, and 0, where there is none.
    """
    node, path = self.root(policy), []
    for at in range(0, len(tokens) - self._block + 1, self._block):
      child = node.children.get(tokens[at:at + self._block].tobytes())
      if child is None:
        break
      path.append(child)
      node = child
    rest = tokens[len(path) * self._block:(len(path) + 1) * self._block]
    best, common = self._nearest(node, rest)
    for met in (*path, *([best] if best else [])):
      met.met = next(self._clock)
    return path, best, common

  def _nearest(self, node: Node, rest: np.ndarray) -> tuple[Node | None, int]:
    if not len(rest):
      return None, 0
    exact = node.children.get(rest.tobytes())
    if exact is not None:
      return exact, len(rest)
    best, common = None, 0
    for child in reversed(node.alike.get(int(rest[0]), [])[-_CANDIDATES:]):
      n = min(len(child.tokens), len(rest))
      differ = np.flatnonzero(child.tokens[:n] != rest[:n])
      same = int(differ[0]) if len(differ) else n
      if same > common:
        best, common = child, same
    return best, common

  def add(self, parent: Node, tokens: np.ndarray, block: Block) -> Node:
    """Returns the child of `parent` with these tokens, 1 to a block of them; if there is none yet, of this block."""
    key = tokens.tobytes()
    child = parent.children.get(key)
    if child is None:
      child = parent.children[key] = Node(tokens.copy(), block, parent)
      parent.alike.setdefault(int(tokens[0]), []).append(child)
      block.nodes += 1
      block.sealed = max(block.sealed, len(tokens))
    child.met = next(self._clock)
    return child

  def idle(self) -> list[Node]:
    """Returns the leaves whose blocks no context uses and no work is to write, the least recently met first."""
    leaves = [n for n in self._walk() if not (n.children or n.block.users or n.block.pins) and n.block.due < 0]
    return sorted(leaves, key=lambda n: n.met)

  def remove(self, leaf: Node):
    """Takes a leaf out, which has no parent then; its block is free if nobody else holds it."""
    del leaf.parent.children[leaf.tokens.tobytes()]
    leaf.parent.alike[int(leaf.tokens[0])].remove(leaf)
    leaf.parent = None  # a context with other blocks of the same tokens may still refer to it
    leaf.block.nodes -= 1
    if not leaf.block.nodes:
      leaf.block.sealed = 0

  def _walk(self) -> Iterator[Node]:
    stack = list(self._roots.values())
    while stack:
      node = stack.pop()
      stack.extend(node.children.values())
      if node.block is not None:
        yield node
