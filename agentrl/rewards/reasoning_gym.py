"""Scores of reasoning-gym's own verifiers."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Mapping

from absl import logging
from reasoning_gym import factory

from agentrl.core import types
from agentrl.rewards import base

# Longer answers are wrong unread: verifiers parse and compare in time that grows with the length.
MAX_ANSWER_LETTERS = 4_000


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a verifier said.

  Attributes:
    score: In [0, 1]; some families give partial credit.
    error: What the verifier raised; None if it answered.
  """

  score: float
  error: str | None = None


@functools.lru_cache(maxsize=None)
def _verifier(family: str) -> Any:
  # The settings shape questions, not scores; one question of any kind is enough.
  return factory.create_dataset(family, seed=0, size=1)


def score_answer(answer: str | None, entry: Mapping[str, Any]) -> Verdict:
  """Returns the score that reasoning-gym gives an answer; space around the answer is ignored.

  Args:
    answer: What the policy answered; None if nothing.
    entry: {'family', 'question', 'answer', 'metadata'}.
  Raises:
    KeyError: if the entry lacks a key.
    ValueError: if reasoning-gym does not have the family.
  Example:
    >>> entry = {'family': 'gcd', 'question': '', 'answer': '4', 'metadata': {}}
    >>> score_answer('4', entry)
    Verdict(score=1.0, error=None)
  """
  verifier = _verifier(entry['family'])
  entry = {key: entry[key] for key in ('question', 'answer', 'metadata')}
  if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_LETTERS:
    return Verdict(0.0)
  try:
    score = float(verifier.score_answer(answer.strip(), entry))
  except Exception as error:  # pylint: disable=broad-except
    # The boundary to verifiers that are not ours: some raise on answers they cannot parse.
    logging.log_first_n(logging.WARNING, 'reasoning-gym raised on answer %r: %r', 10, answer[:80],
                        error)
    return Verdict(0.0, error=repr(error))
  return Verdict(score if math.isfinite(score) else 0.0)


def is_full(score: float) -> bool:
  """Returns whether a score is full marks, rounding of partial sums aside."""
  return score >= 1.0 - 1e-6


class ReasoningGymAccuracy:
  """Parts 'accuracy' (the verifier's score), 'success' (1 if it is full) and 'verifier_errors'.

  Without partial credit, weigh 'success' instead of 'accuracy'.
  """

  names = ('accuracy', 'success', 'verifier_errors')

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]:
    verdict = score_answer(trajectory.answer, task.ground_truth)
    return {
        'accuracy': verdict.score,
        'success': float(is_full(verdict.score)),
        'verifier_errors': float(verdict.error is not None),
    }


@base.REWARDS.register('reasoning_gym')
def components() -> list[base.Component]:
  """Returns what scores the tasks of `agentrl.data.reasoning_gym`."""
  return [ReasoningGymAccuracy()]

