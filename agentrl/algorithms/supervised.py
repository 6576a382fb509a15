"""Imitation of demonstrations: the likelihood of their tokens, as a policy gradient whose reward is always 1."""

from __future__ import annotations

from agentrl.algorithms import OBJECTIVES, choices, compose
from agentrl.algorithms.objective import Objective


@OBJECTIVES.register('supervised')
def supervised(*, aggregation: str = 'tok_mean', max_tokens: int | None = None) -> Objective:
  """Returns the negative log-likelihood of the tokens in the loss mask.

      loss = agg -R_i log p_t

  The batch's `rewards` weigh demonstrations: 1 each for plain imitation.

  Args:
    aggregation: As for `grpo`.
    max_tokens: Tokens; for 'sum_over_constant'.
  Example:
    >>> supervised().needs_values
    False
  """
  return compose.single_channel(
      'supervised', choices.advantage('reward_to_go', whiten=False), choices.ratio('off'), choices.clip('log_likelihood'),
      choices.aggregation(aggregation, **compose.given(max_tokens=max_tokens)))
