"""GRPO: advantages from comparing the samples of one question; no value head."""

from __future__ import annotations

from agentrl.algorithms import OBJECTIVES, choices, compose
from agentrl.algorithms.objective import Objective


@OBJECTIVES.register('grpo')
def grpo(*, advantage: str = 'z', ddof: int | None = None, eps: float | None = None,
         singleton: str | None = None, ratio: str = 'token', clip: str = 'asym',
         clip_low: float | None = None, clip_high: float | None = None,
         clip_dual: float | None = None, aggregation: str = 'tok_mean',
         max_tokens: int | None = None, kl_coef: float = 0.0, kl_estimator: str = 'k3',
         entropy_coef: float = 0.0) -> Objective:
  """Returns the GRPO objective, and by its choices the methods close to it.

      loss = agg max(-A_i r_t, -A_i clip(r_t, 1 - low, 1 + high))
             + kl_coef agg KL_t - entropy_coef agg H_t
      A_i = (R_i - mean_g) / (std_g + eps)

  Close relatives:
    Dr.GRPO: advantage='center', aggregation='sum_over_constant', max_tokens=...
    RLOO: advantage='loo', ratio='off', clip='log_likelihood', aggregation='seq_mean_tok_sum'
    LOOP: advantage='loo', clip='recip', clip_high=.1, aggregation='seq_mean_tok_mean'
    DAPO's loss: clip_high=.28, clip_dual=10.
    CISPO: clip='weight_sg'
    GSPO: ratio='sequence_geo', clip_low=3e-4, clip_high=4e-4, aggregation='seq_mean_tok_mean';
      these two bounds are recalled, not checked against the paper

  An option left at None keeps the default of the choice that reads it; one that no choice reads is
  refused.

  Args:
    advantage: 'z', 'center' or 'loo'.
    ddof: Of the deviation in 'z'; 0.
    eps: Added to it; 1e-6.
    singleton: What a group of one gets, 'zero' or 'raw' (its reward); 'zero'.
    ratio: 'token', 'segment_geo', 'sequence_geo', 'trajectory_prod' or 'off'.
    clip: 'asym', 'recip', 'weight_sg', 'one_sided_neg', 'none' or
      'log_likelihood'.
    clip_low: Distance of the lower bound from 1; 0.2.
    clip_high: Distance of the upper bound from 1; 0.2.
    clip_dual: Bound of the ratio for negative advantages; none.
    aggregation: 'tok_mean', 'seq_mean_tok_mean' (the paper's), 'seq_mean_tok_sum' or
      'sum_over_constant'.
    max_tokens: Tokens; for 'sum_over_constant'.
    kl_coef: Weight of the KL penalty to the reference. The paper's 0.04 is recalled, not checked.
    kl_estimator: 'k1', 'k2', 'k3' or 'abs', with or without '+'.
    entropy_coef: Weight of the entropy bonus.
  Raises:
    ValueError: if a name is unknown, or two options cannot go together.
  Source: Shao et al., arXiv 2402.03300.  Deviation: averages over tokens by default, no KL penalty
  by
    default.
  Example:
    >>> objective = grpo(clip_high=.28)
    >>> objective.needs_values, objective.min_group
    (False, 2)
  """
  if advantage not in ('z', 'center', 'loo'):
    raise ValueError(f"grpo compares the samples of a group and cannot go with advantage "
                     f"{advantage!r}; take 'z', 'center' or 'loo'")
  aggregate = choices.aggregation(aggregation, **compose.given(max_tokens=max_tokens))
  return compose.single_channel(
      'grpo',
      choices.advantage(advantage, **compose.given(ddof=ddof, eps=eps, singleton=singleton)),
      choices.ratio(ratio),
      choices.clip(clip, **compose.given(low=clip_low, high=clip_high, dual=clip_dual)),
      aggregate,
      (compose.kl(kl_coef, kl_estimator, aggregate), compose.entropy(entropy_coef, aggregate)))
