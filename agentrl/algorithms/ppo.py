"""PPO over tokens: advantages from a value head on the policy's trunk; needs no group."""

from __future__ import annotations

from agentrl.algorithms import OBJECTIVES, choices, compose
from agentrl.algorithms.objective import Objective


@OBJECTIVES.register('ppo')
def ppo(*, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True, kl_in_reward: float = 0.0,
        clip: float = 0.2, clip_high: float | None = None, clip_dual: float | None = None,
        value_coef: float = 0.5, value_clip: float | None = 0.5, aggregation: str = 'tok_mean',
        max_tokens: int | None = None, kl_coef: float = 0.0, kl_estimator: str = 'k3',
        entropy_coef: float = 0.0) -> Objective:
  """Returns the PPO objective, with generalised advantages over the policy's own tokens.

      loss = agg max(-A_t r_t, -A_t clip(r_t, 1 - clip, 1 + clip)) + value_coef agg value loss_t
             + kl_coef agg KL_t - entropy_coef agg H_t
      A_t = whitened GAE(gamma, lam) of the final reward - kl_in_reward (b_t - q_t)

  with b the behaviour's and q the reference's log-probability.

  Args:
    gamma: Discount a token, in [0, 1].
    lam: Weight of longer returns, in [0, 1].
    whiten: Whether advantages get mean 0 and variance 1 over the batch.
    kl_in_reward: Weight of the divergence from the reference in the reward, a nat.
    clip: Distance of the ratio's bounds from 1.
    clip_high: Of the upper bound, if it differs.
    clip_dual: Bound of the ratio for negative advantages; None for none.
    value_coef: Weight of the value loss; 0 leaves the value head untrained.
    value_clip: Furthest useful move of a value, in the unit of the reward; None for no limit.
    aggregation: Of all terms: 'tok_mean', 'seq_mean_tok_mean', 'seq_mean_tok_sum' or
      'sum_over_constant'.
    max_tokens: Tokens; for 'sum_over_constant'.
    kl_coef: Weight of the KL penalty to the reference in the loss.
    kl_estimator: 'k1', 'k2', 'k3' or 'abs', with or without '+'.
    entropy_coef: Weight of the entropy bonus.
  Raises:
    ValueError: if a name is unknown, or two options cannot go together.
  Source: Schulman et al., arXiv 1707.06347.  Deviation: environment tokens are no steps.
  Example:
    >>> objective = ppo(lam=.95)
    >>> objective.needs_values, objective.min_group
    (True, 1)
  """
  aggregate = choices.aggregation(aggregation, **compose.given(max_tokens=max_tokens))
  high = clip if clip_high is None else clip_high
  return compose.single_channel(
      'ppo',
      choices.advantage('gae', gamma=gamma, lam=lam, whiten=whiten, kl_in_reward=kl_in_reward),
      choices.ratio('token'),
      choices.clip('asym', low=clip, high=high, **compose.given(dual=clip_dual)),
      aggregate,
      (compose.value(value_coef, value_clip, aggregate),
       compose.kl(kl_coef, kl_estimator, aggregate), compose.entropy(entropy_coef, aggregate)))
