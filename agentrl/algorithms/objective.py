"""An objective: channels and regularisers, and the two steps by which they become a gradient.

    loss_batch = objective.prepare(batch, step)              once per optimiser batch, whole
    loss, metrics = objective.loss(outputs, micro_batch)     per micro-batch, inside the gradient

`prepare` knows everything that depends on other rows: group statistics, whitening, denominators.
What it returns has rows as the leading axis of every leaf and needs nothing else, so `loss` may be
called on any split of the rows; losses, gradients and metric sums of the parts add up to those of
the whole.

    def update(params, batch, step):
      def add(carry, part):
        policy = lambda p: objective.loss(PolicyOutputs(*apply(p, part.tokens, part.positions,
                                                               part.segment_ids)), part)
        grads, metrics = jax.grad(policy, has_aux=True)(params)
        return jax.tree.map(jnp.add, carry, grads), metrics
      parts = split_rows(objective.prepare(batch, step), num_micro_batches)
      grads, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
      return grads, summarise(metrics)

With several optimiser batches from one rollout batch, call `estimate` on the whole rollout batch
and `weigh` on each optimiser batch; `prepare` is the one after the other.

Axes: B rows, T tokens, N trajectories, C channels, X regularisers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import credit, ratios
from agentrl.algorithms.channel import Channel, Regulariser
from agentrl.core import masked
from agentrl.core.types import TrainBatch


SAMPLER_LOG_PROB = 'sampler_log_prob'  # token part, as in training.packing.TOKEN_PARTS


class PolicyOutputs(NamedTuple):
  """What the policy being trained says about the tokens of a (micro-)batch.

  Attributes:
    log_probs: [B, T] float32, nats. Of tokens[b, t] given the tokens before it in its sequence.
    entropies: [B, T] float32, nats. Of the distribution tokens[b, t] is drawn from; None if
      unknown.
    values: [B, T] float32. Value of what precedes tokens[b, t]; None without a value head.
  """

  log_probs: Any
  entropies: Any = None
  values: Any = None


class LossBatch(NamedTuple):
  """An optimiser batch ready for the loss; rows lead every field, so it splits and shards by rows.

  Attributes:
    tokens: [B, T] int32, as in TrainBatch; here and in the next four for the forward pass.
    positions: [B, T] int32.
    segment_ids: [B, T] int32.
    turn_ids: [B, T] int32.
    loss_mask: [B, T] bool. Without the tokens of trajectories of weight 0.
    behaviour_log_probs: [B, T] float32, nats.
    reference_log_probs: [B, T] float32, nats.
    values: [B, T] float32. Of the policy before the update.
    returns: [B, T] float32.
    advantages: [B, C, T] float32.
    token_weights: [B, C, T] float32. Channel c's loss is the sum of weight times token loss.
    regulariser_weights: [B, X, T] float32. The same for the regularisers, coefficients included.
    row_share: [B] float32. 1 / rows that hold tokens, 0 for a row of padding. Adds up to 1, so it
      is the denominator of metrics that are sums already.
    steps: [B] int32. Updates made before this one, the same in all rows.
    parts: Name to [B, T] float32: what a clip, a ratio or a regulariser reads; a part of a
      trajectory stands on all of its tokens. '<channel>/<map>' is 1 where the map reached a bound.
    mask_ids: [B, T] int32, as in TrainBatch, for the forward pass; None without masks.
  """

  tokens: Any
  positions: Any
  segment_ids: Any
  turn_ids: Any
  loss_mask: Any
  behaviour_log_probs: Any
  reference_log_probs: Any
  values: Any
  returns: Any
  advantages: Any
  token_weights: Any
  regulariser_weights: Any
  row_share: Any
  steps: Any
  parts: Any
  mask_ids: Any = None


class Metrics(NamedTuple):
  """Metrics of a (micro-)batch that combine without bias: add the sums, take the largest maximum.

  Attributes:
    sums: Name to (numerator, denominator), scalars; divide last.
    maxima: Name to scalar.
  """

  sums: dict[str, tuple[Any, Any]]
  maxima: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A policy-optimisation algorithm as a record of pure functions.

  Attributes:
    name: In messages.
    channels: The policy-gradient terms.
    regularisers: The terms added to them.
  Raises:
    ValueError: if there is no channel, names repeat, or nothing gives the returns a term needs.
  """

  name: str
  channels: tuple[Channel, ...]
  regularisers: tuple[Regulariser, ...] = ()

  def __post_init__(self):
    names = [c.name for c in self.channels] + [r.name for r in self.regularisers]
    if not self.channels or len(set(names)) != len(names):
      raise ValueError(f'objective {self.name!r} needs at least one channel and names that differ; '
                       f'it has {names}')
    sources = [c.advantage.name for c in self.channels if c.advantage.gives_returns]
    readers = [r.name for r in self.regularisers if r.needs_values]
    if readers and len(sources) != 1:
      raise ValueError(f'regulariser {readers[0]!r} needs returns from exactly one channel and '
                       f'cannot go with the advantages {[a.name for a in self._advantages]}; '
                       "take advantage 'gae' in one channel, or no value loss")

  @property
  def _advantages(self):
    return [c.advantage for c in self.channels]

  @property
  def needs_values(self) -> bool:
    """Whether the policy must have a value head."""
    return any(part.needs_values for part in (*self._advantages, *self.regularisers))

  @property
  def needs_reference(self) -> bool:
    """Whether the batch must carry reference log-probs."""
    return any(part.needs_reference for part in (*self._advantages, *self.regularisers))

  @property
  def needs_entropies(self) -> bool:
    """Whether the policy's outputs must carry entropies."""
    return any(r.needs_entropies for r in self.regularisers)

  @property
  def reads(self) -> tuple[str, ...]:
    """Names of the parts of trajectories or tokens that the batch must carry, sorted."""
    choices = [x for c in self.channels
               for x in (c.advantage, c.ratio, c.clip, *c.rows, *c.maps, *c.filters)]
    return tuple(sorted({name for x in (*choices, *self.regularisers) for name in x.reads}))

  @property
  def _loss_reads(self):
    read = [x for c in self.channels for x in (c.ratio, c.clip)]
    return sorted({name for x in (*read, *self.regularisers) for name in x.reads})

  @property
  def min_group(self) -> int:
    """Samples a question below which there is no signal."""
    return max(a.min_group for a in self._advantages)

  def check(self, *, group_size: int, value_head: bool, reference: bool, updates: int = 2,
            recomputed: bool = True):
    """Refuses a run that this objective cannot train; call it before anything is built.

    Args:
      group_size: Samples a question.
      value_head: Whether the policy has one.
      reference: Whether the run keeps a reference policy.
      updates: Updates that are made on the trajectories of one step.
      recomputed: Whether the learner computes the behaviour's log-probs anew.
    Raises:
      ValueError: naming both choices and a valid alternative.
    """
    used = ', '.join(repr(a.name) for a in self._advantages)
    if group_size < self.min_group:
      raise ValueError(
          f'objective {self.name!r} with advantage {used} compares the samples of a group and '
          f'cannot go with a group size of {group_size}: every advantage would be 0; take a group '
          f"size of at least {self.min_group}, or an objective that needs no group, such as 'ppo'")
    if self.needs_values and not value_head:
      raise ValueError(
          f'objective {self.name!r} with advantage {used} reads values and cannot go with a policy '
          "without a value head; give the policy one, or take an objective without values, such as "
          "'grpo'")
    if self.needs_reference and not reference:
      raise ValueError(
          f'objective {self.name!r} has a KL term and cannot go with a run that keeps no reference '
          'policy; keep one, or set its KL coefficients to 0')
    still = [r.name for r in self.regularisers if r.needs_drift]
    if still and updates < 2:
      raise ValueError(
          f'regulariser {still[0]!r} of objective {self.name!r} is 0 until the policy has moved since '
          'it sampled and cannot go with a single update a step; take rl.minibatches or rl.epochs of '
          'at least 2, or leave it out')
    if SAMPLER_LOG_PROB in self.reads and not recomputed:
      raise ValueError(
          f'objective {self.name!r} compares the log-probs of sampler and learner and cannot go with '
          'behaviour log-probs that are the sampler\'s own; set rl.recompute_behaviour, or leave the '
          "credit maps 'mismatch_...' out")

  def estimate(self, batch: TrainBatch) -> TrainBatch:
    """Returns the batch with advantages and returns filled in.

    Call it on the whole rollout batch: groups and whitening statistics span it.

    Args:
      batch: What its `advantages` and `returns` hold is not read. `group_ids` may be any numbers.
        `baseline_mask` must be False for padding of N.
    Returns:
      The batch with `advantages` [C, B, T] and `returns` [B, T], float32, gradient stopped, 0
      outside the loss mask and for trajectories of weight 0.
    """
    _check_batch(batch)
    planes, returns = [], jnp.zeros(batch.tokens.shape, jnp.float32)
    for channel in self.channels:
      mask = _kept(batch, _channel_weights(channel, batch))
      estimate = channel.advantage.function(batch, mask)
      plane = channel.credit.function(estimate.advantages, batch.trajectory_ids, mask)
      for change in channel.maps:
        plane = jnp.where(mask, change.function(batch, plane, mask), 0.0)
      planes.append(plane)
      if estimate.returns is not None:
        returns = estimate.returns
    return batch._replace(advantages=jnp.stack(planes), returns=returns)

  def weigh(self, batch: TrainBatch, step: Any = 0) -> LossBatch:
    """Returns an optimiser batch with the weight of every token in the loss.

    Args:
      batch: A batch that `estimate` has filled in, or some of its rows with all of its [N] fields.
        All rows that make up one optimiser step, across micro-batches and devices.
      step: Updates made so far; read by schedules. May be traced.
    """
    _check_batch(batch)
    chex.assert_shape(batch.advantages, (len(self.channels), *batch.tokens.shape))
    batch = batch._replace(step=step)
    token_weights = [_scaled(c.aggregation, c.weight, batch, _channel_weights(c, batch, plane))
                     for c, plane in zip(self.channels, batch.advantages)]
    extra = [_regulariser_weights(r, batch) for r in self.regularisers]
    rows, length = batch.tokens.shape
    no_terms = jnp.zeros((rows, 0, length), jnp.float32)
    filled = jnp.any(batch.segment_ids > 0, axis=1).astype(jnp.float32)
    shared = {k: v for k, v in batch._asdict().items() if k in LossBatch._fields}
    return LossBatch(**{
        **shared,
        'loss_mask': _kept(batch, batch.weights),
        'advantages': jnp.swapaxes(batch.advantages, 0, 1),
        'token_weights': jnp.stack(token_weights, axis=1),
        'regulariser_weights': jnp.stack(extra, axis=1) if extra else no_terms,
        'row_share': masked.safe_divide(filled, jnp.sum(filled)),
        'steps': jnp.full(rows, step, jnp.int32),
        'parts': {**{name: _on_tokens(batch, name) for name in self._loss_reads}, **_marks(self.channels, batch)},
    })

  def prepare(self, batch: TrainBatch, step: Any = 0) -> LossBatch:
    """Returns `weigh(estimate(batch), step)`: all that is needed when every batch is used once."""
    return self.weigh(self.estimate(batch._replace(step=step)), step)

  def loss(self, outputs: PolicyOutputs, batch: LossBatch) -> tuple[chex.Array, Metrics]:
    """Returns this part's contribution to the loss, and its metrics.

    Args:
      outputs: Of the policy being trained, for the rows of `batch`. Nothing outside the loss mask
        is read, and its gradient is exactly 0 there.
      batch: Any rows of what `weigh` gave.
    Returns:
      A float32 scalar to be minimised, summing over all rows' parts to the loss of the batch; and
      metrics: 'loss/<term>' with the term's weight included, the token mean of each regulariser
      under its own name, and per channel the ratio, the fractions clipped and the advantages.
    Raises:
      ValueError: if the outputs lack something that a term needs.
      AssertionError: at trace time, if ranks, shapes or dtypes differ.
    """
    self._check_outputs(outputs, batch)
    log_probs = jnp.where(batch.loss_mask, outputs.log_probs, 0.0)
    outputs = outputs._replace(log_probs=log_probs)
    share, terms, sums, maxima = jnp.sum(batch.row_share), {}, {}, {}
    for i, channel in enumerate(self.channels):
      terms[channel.name], part = _channel_loss(channel, i, log_probs, batch)
      sums.update(part.sums)
      maxima.update(part.maxima)
    for i, regulariser in enumerate(self.regularisers):
      value = regulariser.function(outputs, batch)
      terms[regulariser.name] = jnp.sum(batch.regulariser_weights[:, i] * value)
      sums[regulariser.name] = _mean_parts(value, batch.loss_mask)
    total = sum(terms.values())
    for name, term in {**terms, 'total': total}.items():
      sums[f'loss/{name}'] = (term, share)
    sums = {**_diagnostics(self, outputs, batch), **sums}
    return total, jax.lax.stop_gradient(Metrics(sums, maxima))

  def _check_outputs(self, outputs, batch):
    given = {'values': self.needs_values, 'entropies': self.needs_entropies}
    for field, needed in given.items():
      if needed and outputs._asdict()[field] is None:
        raise ValueError(f'objective {self.name!r} reads {field}, and the policy outputs have '
                         'none; give them, or take the term that needs them out of the objective')
    present = [x for x in outputs if x is not None]
    chex.assert_shape(present, batch.loss_mask.shape)
    chex.assert_type(present, jnp.float32)


def split_rows(batch: LossBatch, num_parts: int) -> LossBatch:
  """Returns the batch cut into micro-batches: every leaf [num_parts, B / num_parts, ...].

  Part p takes the rows p, p + num_parts, ...: a batch sharded by rows is cut without moving rows
  between devices.

  Raises:
    ValueError: if the rows do not divide.
  """
  rows = batch.loss_mask.shape[0]
  if rows % num_parts:
    raise ValueError(f'{rows} rows do not divide into {num_parts} micro-batches; take a number of '
                     f'rows that is a multiple of {num_parts}')

  def cut(x):
    return jnp.swapaxes(x.reshape(rows // num_parts, num_parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(cut, batch)


def combine(stacked: Metrics) -> Metrics:
  """Returns the metrics of the whole from those of its parts, stacked on a leading axis."""
  return Metrics(jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked.sums),
                 jax.tree.map(lambda x: jnp.max(x, axis=0), stacked.maxima))


def summarise(metrics: Metrics) -> dict[str, chex.Array]:
  """Returns one scalar a metric, dividing at last; adds the explained variance of the value head.

      explained = 1 - Var(return - value) / Var(return)          0 if the returns do not vary
  """
  means = {name: masked.safe_divide(*pair) for name, pair in metrics.sums.items()}
  if 'value/return' in means:
    spread = means['value/return_square'] - jnp.square(means['value/return'])
    left = means['value/error_square'] - jnp.square(means['value/error'])
    explained = 1.0 - masked.safe_divide(left, spread)
    means['value/explained_variance'] = jnp.where(spread > 0, explained, 0.0)
  return {**means, **metrics.maxima}


def _channel_loss(channel: Channel, index: int, log_probs, batch: LossBatch):
  """One channel's term and what is worth knowing about it."""
  weights, advantages = batch.token_weights[:, index], batch.advantages[:, index]
  ratio = channel.ratio.function(log_probs, batch)
  clipped = channel.clip.function(ratio, advantages, log_probs, batch)
  mask = batch.loss_mask & (weights != 0)
  values = {
      'ratio': ratio,
      'clip_low': clipped.low.astype(jnp.float32),
      'clip_high': clipped.high.astype(jnp.float32),
      'advantage': advantages,
      'advantage_abs': jnp.abs(advantages),
  }
  values.update({f'{m.name}_share': batch.parts[f'{channel.name}/{m.name}'] for m in channel.maps if m.marks})
  sums = {f'{channel.name}/{k}': _mean_parts(v, mask) for k, v in values.items()}
  maxima = {f'{channel.name}/ratio_max': jnp.max(jnp.where(mask, ratio, 0.0))}
  return jnp.sum(weights * clipped.loss), Metrics(sums, maxima)


def _diagnostics(objective: Objective, outputs: PolicyOutputs, batch: LossBatch):
  """Metrics of the batch that belong to no term."""
  mask = batch.loss_mask
  drift = ratios.log_ratio(outputs.log_probs, batch.behaviour_log_probs, mask)
  values = {'behaviour_kl': jnp.exp(drift) - 1.0 - drift}
  if outputs.entropies is not None:
    values['entropy'] = outputs.entropies
  if objective.needs_values:
    error = batch.returns - outputs.values
    values.update({
        'value/return': batch.returns,
        'value/return_square': jnp.square(batch.returns),
        'value/error': error,
        'value/error_square': jnp.square(error),
    })
  return {name: _mean_parts(value, mask) for name, value in values.items()}


def _marks(channels, batch: TrainBatch):
  """Where the maps of channels reach a bound, by channel and map, [B, T] float32."""
  return {f'{c.name}/{m.name}': m.marks(batch, _kept(batch, batch.weights)).astype(jnp.float32)
          for c in channels for m in c.maps if m.marks}


def _mean_parts(value, mask):
  return masked.masked_sum(value, mask), jnp.sum(mask, dtype=jnp.float32)


def _channel_weights(channel: Channel, batch: TrainBatch, advantages=None):
  weights = batch.weights
  for choice in channel.rows:
    weights = weights * choice.function(batch)
  if advantages is not None:
    for choice in channel.filters:
      weights = weights * choice.function(batch, advantages)
  return weights


def _on_tokens(batch: TrainBatch, name: str):
  if name in batch.token_parts:
    return batch.token_parts[name]
  return credit.of_trajectory(batch.parts[name], batch.trajectory_ids)


def _kept(batch: TrainBatch, weights):
  """The loss mask without trajectories of weight 0."""
  return batch.loss_mask & (credit.of_trajectory(weights, batch.trajectory_ids) != 0)


def _regulariser_weights(regulariser: Regulariser, batch: TrainBatch):
  token_weights = _scaled(regulariser.aggregation, regulariser.coefficient, batch, batch.weights)
  if regulariser.where is not None:
    token_weights *= regulariser.where(batch)
  return -token_weights if regulariser.maximised else token_weights


def _scaled(aggregation, factor, batch, weights):
  token_weights = aggregation.function(_kept(batch, weights), batch.trajectory_ids, weights)
  return token_weights * (factor(batch.step) if callable(factor) else factor)


def _check_batch(batch: TrainBatch):
  planes = [batch.tokens, batch.segment_ids, batch.turn_ids, batch.trajectory_ids, batch.loss_mask,
            batch.behaviour_log_probs, batch.reference_log_probs, batch.values]
  numbers = [batch.group_ids, batch.baseline_mask, batch.weights, batch.rewards]
  chex.assert_rank(planes, 2)
  chex.assert_equal_shape(planes)
  chex.assert_rank(numbers, 1)
  chex.assert_equal_shape(numbers)
  chex.assert_type([batch.loss_mask, batch.baseline_mask], bool)
  chex.assert_type([batch.behaviour_log_probs, batch.reference_log_probs, batch.values,
                    batch.weights, batch.rewards], jnp.float32)
