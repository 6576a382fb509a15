"""Losses of pairs: what was preferred is made likelier than what was not.

Every loss here reads sums over the sampled tokens of each trajectory and nothing else, so it does not matter in which
rows, micro-batches or devices the tokens of a pair lie; `training.sums` turns one into a gradient. To add a loss,
register a factory under its name, here or in a file of its own.

Axes: B rows, T tokens, N trajectories, P pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping, NamedTuple

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import schedules
from agentrl.core import masked, registry

PREFERENCES: registry.Registry[Callable[..., Any]] = registry.Registry('preference loss', package='agentrl.algorithms')


class Pairs(NamedTuple):
  """Who is preferred to whom.

  Attributes:
    chosen: [P] int32. Index of the preferred trajectory.
    rejected: [P] int32. Index of the other.
    weights: [P] float32. Share of the pair in the loss; 0 for padding.
  """

  chosen: Any
  rejected: Any
  weights: Any


class PairScores(NamedTuple):
  """What the losses read of each pair; [P] float32 each, log-probs in nats, summed over sampled tokens.

  Attributes:
    chosen: Log-prob of the preferred trajectory.
    rejected: Of the other.
    reference_chosen: The same under the reference; no gradient flows to it.
    reference_rejected: Likewise.
    chosen_tokens: Sampled tokens.
    rejected_tokens: Likewise.
  """

  chosen: Any
  rejected: Any
  reference_chosen: Any
  reference_rejected: Any
  chosen_tokens: Any
  rejected_tokens: Any

  @property
  def margins(self) -> Any:
    """[P]: how much further the policy has gone than the reference in preferring the chosen one, nats."""
    return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)


@dataclasses.dataclass(frozen=True)
class Preference:
  """A loss of pairs.

  Attributes:
    name: In messages.
    function: (PairScores, step) -> [P] float32, one loss a pair.
    needs_reference: Whether it reads the reference's log-probs.
  """

  name: str
  function: Callable[[PairScores, Any], Any]
  needs_reference: bool = True


def make(name: str, **options) -> Preference:
  """Returns the loss of that name.

  Args:
    name: 'dpo', 'ipo', 'orpo', 'exo', 'sum', or one registered.
    **options: Of its factory.
  Raises:
    UnknownNameError: if there is none; the known ones are listed.
    ValueError: if it does not take an option, or refuses its value.
  Example:
    >>> make('dpo', beta=.2).needs_reference, make('orpo').needs_reference
    (True, False)
  """
  return registry.call(f'preference loss {name!r}', PREFERENCES.get(name), options)


def dpo_loss(margins: chex.Array, *, beta: float, label_smoothing: float = 0.0) -> chex.Array:
  """Returns the loss of direct preference optimisation.

      loss = -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)

  with m the margin. The gradient lowers the rejected and raises the chosen trajectory by the same amount,
  beta sigmoid(-beta m), so what both share cancels. At the reference it is log 2.

  Args:
    margins: [P] float32, nats.
    beta: Inverse temperature; larger keeps the policy closer to the reference.
    label_smoothing: s, probability that a pair is the wrong way round; in [0, 0.5).
  Source: Rafailov et al., arXiv 2305.18290; smoothing: Mitchell, conservative DPO (recalled).  Deviation: none.
  Example:
    >>> round(float(dpo_loss(jnp.zeros(1), beta=.1)[0]), 4)
    0.6931
  """
  chex.assert_rank(margins, 1)
  scaled = beta * margins
  return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(scaled) - label_smoothing * jax.nn.log_sigmoid(-scaled)


def ipo_loss(margins: chex.Array, *, beta: float) -> chex.Array:
  """Returns the squared distance of the margin from 1 / (2 beta): it stops pushing where DPO never does.

  Args:
    margins: [P] float32, nats.
    beta: Inverse of twice the margin aimed at.
  Source: Azar et al., arXiv 2310.12036 (recalled, not checked).  Deviation: none; margins are sums, not means a token.
  """
  chex.assert_rank(margins, 1)
  return jnp.square(margins - 0.5 / beta)


def exo_loss(margins: chex.Array, *, beta: float, label_smoothing: float) -> chex.Array:
  """Returns the reverse KL divergence from the preference labels to the policy's implicit preference.

      p = sigmoid(beta m);  loss = p log(p / (1 - s)) + (1 - p) log((1 - p) / s)

  Mode-seeking where DPO is mean-seeking: it is 0 at p = 1 - s and grows past it.

  Args:
    margins: [P] float32, nats.
    beta: Inverse temperature.
    label_smoothing: s, in (0, 0.5): without it the labels would be certain and the loss infinite.
  Source: Ji et al., efficient exact optimisation, arXiv 2402.00856 (recalled, not checked).  Deviation: none.
  """
  chex.assert_rank(margins, 1)
  scaled = beta * margins
  better, worse = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
  return (jnp.exp(better) * (better - jnp.log1p(-label_smoothing))
          + jnp.exp(worse) * (worse - jnp.log(label_smoothing)))


def orpo_loss(chosen_means: chex.Array, rejected_means: chex.Array, *, weight: float) -> chex.Array:
  """Returns imitation of the chosen trajectory plus a push of the odds, without a reference.

      loss = -l_w - weight log sigmoid(logit(l_w) - logit(l_l)),    logit(l) = l - log(1 - exp(l))

  Args:
    chosen_means: [P] float32, nats a token. Mean log-prob of the preferred trajectory's sampled tokens.
    rejected_means: [P] float32, nats a token.
    weight: Of the odds ratio.
  Source: Hong et al., arXiv 2403.07691 (recalled, not checked).  Deviation: means are kept below -1e-6, where the
    odds end.
  """
  chex.assert_rank([chosen_means, rejected_means], 1)
  odds = [l - jnp.log(-jnp.expm1(l)) for l in (jnp.minimum(x, -1e-6) for x in (chosen_means, rejected_means))]
  return -chosen_means - weight * jax.nn.log_sigmoid(odds[0] - odds[1])


@PREFERENCES.register('dpo')
def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Preference:
  """See `dpo_loss`."""
  _check('dpo', beta=beta)
  if not 0.0 <= label_smoothing < 0.5:
    raise ValueError(f"label_smoothing={label_smoothing} of preference loss 'dpo' must lie in [0, 0.5)")
  return Preference('dpo', lambda s, _: dpo_loss(s.margins, beta=beta, label_smoothing=label_smoothing))


@PREFERENCES.register('ipo')
def ipo(*, beta: float = 0.1) -> Preference:
  """See `ipo_loss`."""
  _check('ipo', beta=beta)
  return Preference('ipo', lambda s, _: ipo_loss(s.margins, beta=beta))


@PREFERENCES.register('exo')
def exo(*, beta: float = 0.1, label_smoothing: float = 1e-3) -> Preference:
  """See `exo_loss`."""
  _check('exo', beta=beta)
  if not 0.0 < label_smoothing < 0.5:
    raise ValueError(f"label_smoothing={label_smoothing} of preference loss 'exo' must lie in (0, 0.5), as the loss "
                     "is infinite without; take 'dpo' for labels that are certain")
  return Preference('exo', lambda s, _: exo_loss(s.margins, beta=beta, label_smoothing=label_smoothing))


@PREFERENCES.register('orpo')
def orpo(*, weight: float = 0.1) -> Preference:
  """See `orpo_loss`."""
  _check('orpo', weight=weight)

  def function(scores, unused_step):
    return orpo_loss(masked.safe_divide(scores.chosen, scores.chosen_tokens),
                     masked.safe_divide(scores.rejected, scores.rejected_tokens), weight=weight)

  return Preference('orpo', function, needs_reference=False)


@PREFERENCES.register('sum')
def several(*, terms: Mapping[str, Mapping[str, Any]]) -> Preference:
  """Adds losses; each term is a loss's name and options, and a 'weight', which may be a schedule of the updates."""
  made = []
  for label, term in terms.items():
    options = dict(term)
    weight = schedules.make(f'preference loss sum, {label}', options.pop('weight', 1.0))
    made.append((make(registry.pop_name(f'preference loss sum, {label}', options), **options), weight))

  def function(scores, step):
    return sum((weight(step) if callable(weight) else weight) * part.function(scores, step) for part, weight in made)

  return Preference('sum', function, any(part.needs_reference for part, _ in made))


def sums_of_trajectories(values: chex.Array, trajectory_ids: chex.Array, count: int) -> chex.Array:
  """Returns [N] the sums of the tokens' values over each trajectory, wherever in the rows they lie.

  Args:
    values: [B, T] float32; 0 where not to be counted.
    trajectory_ids: [B, T] int32; -1 where padded.
    count: N.
  Example:
    >>> sums_of_trajectories(jnp.array([[1., 2., 4.]]), jnp.array([[1, 1, -1]]), 2).tolist()
    [0.0, 3.0]
  """
  chex.assert_rank([values, trajectory_ids], 2)
  ids = jnp.where(trajectory_ids < 0, count, trajectory_ids)
  return jax.ops.segment_sum(values.ravel(), ids.ravel(), num_segments=count + 1)[:count]


def pair_loss(preference: Preference, log_probs: chex.Array, reference: chex.Array, tokens: chex.Array, pairs: Pairs,
              step: Any = 0) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Returns the weighted mean of a loss over pairs, and metrics.

      loss = sum_p weights_p loss_p,    the weights adding up to 1 or less, see `normalised`

  Args:
    preference: The loss of a pair.
    log_probs: [N] float32, nats: summed over each trajectory's sampled tokens.
    reference: [N] float32: the same under the reference, 0 without one.
    tokens: [N] float32: how many tokens those are.
    pairs: Weights included.
    step: Updates made so far.
  Returns:
    A float32 scalar, and scalars: 'accuracy' (share of pairs with a margin above 0), 'margin', 'chosen' and 'rejected'
    (nats beyond the reference).
  """
  chex.assert_rank([log_probs, reference, tokens, *pairs], 1)
  reference = jax.lax.stop_gradient(reference)
  there = pairs.weights > 0
  # Before the loss, so that nothing of a pair that is left out comes in through the gradient either.
  of = lambda x, index: jnp.where(there, x[index], 0.0)
  scores = PairScores(of(log_probs, pairs.chosen), of(log_probs, pairs.rejected), of(reference, pairs.chosen),
                      of(reference, pairs.rejected), of(tokens, pairs.chosen), of(tokens, pairs.rejected))
  mean = lambda x: masked.safe_divide(jnp.sum(pairs.weights * x), jnp.sum(pairs.weights))
  metrics = {
      'accuracy': mean((scores.margins > 0).astype(jnp.float32)), 'margin': mean(scores.margins),
      'chosen': mean(scores.chosen - scores.reference_chosen),
      'rejected': mean(scores.rejected - scores.reference_rejected),
  }
  loss = jnp.sum(jnp.where(there, pairs.weights * preference.function(scores, step), 0.0))
  return loss, jax.lax.stop_gradient(metrics)


def normalised(weights: chex.Array, labels: chex.Array, count: int) -> chex.Array:
  """Returns weights that make a mean over pairs, or the mean of one mean a label.

      w_p = weights_p / (count * sum of the weights of p's label)

  Args:
    weights: [P] float32, at least 0.
    labels: [P] int32, below `count`: which objective a pair belongs to.
    count: Labels there are; 1 for a plain mean.
  Returns:
    [P] float32. A label without a pair adds nothing.
  Example:
    >>> normalised(jnp.ones(3), jnp.array([0, 0, 1]), 2).tolist()
    [0.25, 0.25, 0.5]
  """
  totals = jax.ops.segment_sum(weights, labels, num_segments=count)
  return masked.safe_divide(weights, count * totals[labels])


def _check(name: str, **numbers: float):
  for option, number in numbers.items():
    if not 0.0 < number < float('inf'):
      raise ValueError(f'{option}={number} of preference loss {name!r} must be above 0 and finite')
