"""The parts an objective is put together from: one named choice for each axis of a channel.

A channel is the unit that produces a policy gradient. Most algorithms have one; those that optimise
two rewards apart, or imitate beside reinforcing, have more. The choices hold pure functions and
what they require, so that parts that cannot go together are refused when they are put together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

UNCLIPPED = ('none', 'log_likelihood')
# Credit maps that decide token by token, by the token's own probability.
TOKEN_CHOOSING = ('clip_cov',)
# Credit maps that take one advantage a trajectory and spread it themselves.
OF_TRAJECTORIES = ('prefix_mean',)
Schedule = Callable[[Any], Any]


class Estimate(NamedTuple):
  """What an advantage choice gives.

  Attributes:
    advantages: [N] or [B, T] float32, by the level of the choice.
    returns: [B, T] float32, targets of the value head; None if it gives none.
  """

  advantages: Any
  returns: Any = None


@dataclasses.dataclass(frozen=True)
class Choice:
  """A function and the name it is configured by.

  Signatures, with Axes B rows, T tokens, N trajectories:
    ratio: (log_probs [B, T], LossBatch) -> [B, T].
    clip: (ratio, advantages, log_probs, each [B, T], LossBatch) -> clips.Clipped.
    aggregation: (loss_mask [B, T], trajectory_ids [B, T], weights [N]) -> [B, T].
    map: (TrainBatch, advantages [B, T], loss_mask [B, T]) -> advantages [B, T].
    rows: (TrainBatch) -> factors [N].
    filter: (TrainBatch, advantages [B, T]) -> factors [N].
    marks: (TrainBatch, loss_mask [B, T]) -> [B, T] bool.

  Attributes:
    name: In configs and messages.
    function: See above.
    reads: Names of the parts of trajectories or tokens that it reads.
    marks: Of a map: the tokens at which it reached a bound, whose share is a metric; None where it has none.
  """

  name: str
  function: Callable[..., Any]
  reads: tuple[str, ...] = ()
  marks: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Advantage(Choice):
  """An estimator: (TrainBatch, loss_mask [B, T] of the channel) -> Estimate.

  Attributes:
    level: 'trajectory' or 'token': what one advantage belongs to.
    needs_values: Whether it reads the value head's predictions.
    needs_reference: Whether it reads reference log-probs.
    gives_returns: Whether it gives targets for a value head.
    min_group: Samples a question below which it has no signal.
  """

  level: str = 'trajectory'
  needs_values: bool = False
  needs_reference: bool = False
  gives_returns: bool = False
  min_group: int = 1


@dataclasses.dataclass(frozen=True)
class Credit(Choice):
  """A credit map: (advantages, trajectory_ids [B, T], loss_mask [B, T]) -> [B, T].

  Attributes:
    level: 'trajectory' or 'token': what one advantage it takes belongs to.
  """

  level: str = 'trajectory'


@dataclasses.dataclass(frozen=True)
class Channel:
  """One policy-gradient term.

  Attributes:
    advantage: Estimates how good what was done is.
    credit: Carries that to the tokens.
    ratio: Importance ratio, and its level.
    clip: Loss of a token.
    aggregation: Weights of the token losses.
    weight: Factor of the term; a number, or a function of the step.
    rows: Factors multiplied onto the trajectory weights: which trajectories, and how strongly, this
      channel trains on, its advantages and their whitening included.
    maps: Applied to the advantages of the tokens after the credit map, in order.
    filters: As `rows`, but decided by the advantages, and so after them.
    name: In the metrics.
  Raises:
    ValueError: if two of the choices cannot go together.
  """

  advantage: Advantage
  credit: Credit
  ratio: Choice
  clip: Choice
  aggregation: Choice
  weight: float | Schedule = 1.0
  rows: tuple[Choice, ...] = ()
  maps: tuple[Choice, ...] = ()
  filters: tuple[Choice, ...] = ()
  name: str = 'policy'

  def __post_init__(self):
    if self.advantage.level != self.credit.level:
      fitting = 'per_token' if self.advantage.level == 'token' else 'broadcast'
      raise ValueError(
          f'advantage {self.advantage.name!r} gives one number a {self.advantage.level} and cannot '
          f'go with credit {self.credit.name!r}, which takes one a {self.credit.level}; take '
          f'credit {fitting!r}')
    if self.ratio.name == 'off' and self.clip.name not in UNCLIPPED:
      raise ValueError(f"ratio 'off' is always 1 and cannot go with clip {self.clip.name!r}, which "
                       "would never act; take clip 'log_likelihood', or ratio 'token'")
    whole = [m.name for m in self.maps if m.name in OF_TRAJECTORIES]
    if whole and self.advantage.level == 'token':
      raise ValueError(f'credit map {whole[0]!r} takes one number a trajectory and cannot go with advantage '
                       f"{self.advantage.name!r}, which gives one a token; take advantage 'z'")
    spread = [m.name for m in self.maps if m.name in TOKEN_CHOOSING]
    if spread and self.ratio.name in ('sequence_geo', 'trajectory_prod'):
      raise ValueError(f'credit map {spread[0]!r} chooses single tokens and cannot go with ratio '
                       f"{self.ratio.name!r}, which is one number a sequence; take ratio 'token'")
    if self.clip.name == 'log_likelihood' and self.ratio.name != 'off':
      raise ValueError("clip 'log_likelihood' reads no ratio and cannot go with ratio "
                       f"{self.ratio.name!r}, which would be without effect; take ratio 'off', or "
                       "clip 'none'")


@dataclasses.dataclass(frozen=True)
class Regulariser:
  """A term added to the policy loss.

  `coefficient` and `aggregation` are set where an objective is put together.

  Attributes:
    name: In the metrics.
    function: (PolicyOutputs, LossBatch) -> [B, T] float32, unscaled.
    coefficient: Factor of the term; a number, or a function of the step.
    aggregation: Weights of the token losses.
    needs_values: Whether it reads values and returns.
    needs_reference: Whether it reads reference log-probs.
    needs_entropies: Whether it reads the policy's entropies.
    where: TrainBatch with advantages -> [B, T] float32: factor of the term at each token, from what
      is known of the whole batch; None for 1.
    reads: Names of the parts of trajectories or tokens that `function` and `where` read.
    needs_drift: Whether it is 0 until the policy has moved since it sampled.
    maximised: Whether the coefficient counts negative.
  """

  name: str
  function: Callable[..., Any]
  coefficient: float | Schedule = 1.0
  aggregation: Choice | None = None
  needs_values: bool = False
  needs_reference: bool = False
  needs_entropies: bool = False
  where: Callable[[Any], Any] | None = None
  reads: tuple[str, ...] = ()
  needs_drift: bool = False
  maximised: bool = False
