"""What a stage trains beside its policy: models that turn a batch into rewards of turns."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.core import registry
from agentrl.core.types import TrainBatch
from agentrl.models.config import ModelConfig
from agentrl.training.sums import Trained

SIDE_MODELS: registry.Registry = registry.Registry('side model', package='agentrl.training.side')


class Setting(NamedTuple):
  """What a side model is compiled for: the policy's shape, and how its batches are cut; see `step.make_update`."""

  model: ModelConfig
  micro_batches: int
  temperature: float = 1.0
  mesh: jax.sharding.Mesh | None = None


class SideModel(Protocol):
  """Learns from each batch of a step and scores it, before the policy is updated.

  Made by `SIDE_MODELS.get(name)(**options)`.

  All that it must find again is in its `Trained` state, which is saved with the run.

  Attributes:
    turn_names: Parts of turns that it gives.
    needs: Parts of trajectories that it reads.
    turn_needs: Parts of turns that it reads.
    needs_reference: Whether it reads reference log-probs.
  """

  turn_names: tuple[str, ...]
  needs: tuple[str, ...]
  turn_needs: tuple[str, ...]
  needs_reference: bool = False

  def bind(self, setting: Setting):
    """Takes what it is compiled for; called once, before anything else."""

  def begin(self, params: Any) -> Trained:
    """Returns its state at the beginning of a stage whose policy has these parameters, which it must copy."""

  def warm_up(self, trained: Trained, batch: TrainBatch, used: int):
    """Compiles all that `learn` needs; changes nothing."""

  def learn(self, trained: Trained, batch: TrainBatch, used: int) -> tuple[Trained, dict[str, Any], dict[str, Any]]:
    """Returns the new state, its parts and metrics; the state given is consumed.

    Args:
      trained: Its state.
      batch: Scored, of the present policy, with all parts that it reads.
      used: Micro-batches that hold anything.
    Returns:
      Parts by name are [B, T] float32, on the last token in the loss of each turn and 0 elsewhere, unless they are
      numbers of tokens and say so. Metrics are scalars, 'applied' among them: 0 if an update was not finite.
    """


def make(label: str, options: Mapping[str, Any]) -> SideModel:
  """Returns the side model that a section of a config describes: its 'name' and options.

  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
    ValueError: if it does not take an option, or refuses its value.
  """
  options, section = dict(options), f'rl.side.{label}'
  name = registry.pop_name(section, options)
  return registry.call(section, SIDE_MODELS.get(name), options)


def part_of(batch: TrainBatch, name: str) -> Any:
  """Returns [N] float32: the total reward, or a part of trajectories."""
  return batch.rewards if name == 'total' else batch.parts[name]


def copied(params: Any) -> Any:
  """Returns a copy of a policy without its value head."""
  return jax.tree.map(jnp.array, {k: v for k, v in params.items() if k != 'value'})


def one_to_one(success: np.ndarray, group_ids: np.ndarray,
               counted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pairs the k-th success of each group with its k-th failure.

  Args:
    success: [N] bool.
    group_ids: [N] int32.
    counted: [N] bool. Whether a trajectory takes part.
  Returns:
    Indices of successes and of failures, [N // 2] int32 each, and weights, [N // 2] float32: 0 for padding.
  Example:
    >>> one_to_one(np.array([1, 0, 1, 1]) > 0, np.array([0, 0, 0, 1]), np.ones(4, bool))[0][:1].tolist()
    [0]
  """
  room = len(success) // 2
  chosen, rejected, weights = (np.zeros(room, t) for t in (np.int32, np.int32, np.float32))
  at = 0
  for group in np.unique(group_ids[counted]):
    own = counted & (group_ids == group)
    for i, j in zip(np.flatnonzero(own & success), np.flatnonzero(own & ~success)):
      chosen[at], rejected[at], weights[at] = i, j, 1.0
      at += 1
  return chosen, rejected, weights
