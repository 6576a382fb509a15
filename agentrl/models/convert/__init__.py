"""Families of published checkpoints, one file each, found by the checkpoint's own `architectures` entry."""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

import numpy as np

from agentrl.core.registry import Registry
from agentrl.models.config import ModelConfig


class Piece(NamedTuple):
  """Where one tensor of a checkpoint lies in the parameters.

      params[path][index] == tensor.reshape(split).transpose(order)

  Attributes:
    name: In the checkpoint.
    shape: In the checkpoint.
    path: Keys of the leaf.
    index: Into the leaf, an int or a slice for each leading dimension; the others are whole.
    split: Shape with the axes that ours has and the checkpoint merges.
    order: Of the axes of `split`, in ours.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  index: tuple[int | slice, ...]
  split: tuple[int, ...]
  order: tuple[int, ...]

  def ours(self, tensor: np.ndarray) -> np.ndarray:
    """Returns the checkpoint's tensor as it lies in the leaf; a view where that is possible."""
    return tensor.reshape(self.split).transpose(self.order)

  def theirs(self, values: np.ndarray) -> np.ndarray:
    """Returns what `ours` was made of."""
    shape = [self.split[i] for i in self.order]
    return values.reshape(shape).transpose(np.argsort(self.order)).reshape(self.shape)


class Family(NamedTuple):
  """How checkpoints of one architecture are read and written.

  Attributes:
    architecture: The entry in config.json's "architectures".
    model_type: The entry "model_type".
    settings: From config.json to the arguments of `ModelConfig`; refuses what the transformer cannot express.
    describe: From a `ModelConfig` to the entries of config.json.
    pieces: The checkpoint's tensors, in its order.
    packed: Ends of the names of the tensors that a checkpoint may have in place of one piece, quantised.
    unpack: From those tensors, in the order of `packed`, to the piece.
    ignored: Patterns of names that hold nothing that is learnt.
  """

  architecture: str
  model_type: str
  settings: Callable[[Mapping[str, Any]], dict[str, Any]]
  describe: Callable[[ModelConfig], dict[str, Any]]
  pieces: Callable[[ModelConfig], list[Piece]]
  packed: tuple[str, ...] = ()
  unpack: Callable[..., np.ndarray] | None = None
  ignored: tuple[str, ...] = ('*.rotary_emb.inv_freq',)


FAMILIES: Registry[Family] = Registry('architecture', 'agentrl.models.convert')


def register(family: Family):
  """Makes a family known under its architecture."""
  FAMILIES.register(family.architecture)(family)


def family_of(architecture: str) -> Family:
  """Returns the family of an architecture.

  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
  """
  # Families are registered under the checkpoint's name, which is not their module's: all are loaded first.
  FAMILIES.names()
  return FAMILIES.get(architecture)

