"""Earlier cases and which of them to show: a bank of (question, plan, outcome), found by likeness or by learned use.

Everything is plain data, so that it can be saved with a run; no jax, no tokenizer.
"""

from __future__ import annotations

import collections
import math
import zlib
from typing import Any, Sequence

import numpy as np

from agentrl.core.types import Trajectory

Case = dict[str, Any]  # 'state' and 'plan', texts; 'reward', a number
_RATE = 0.5


def embed(text: str, size: int) -> np.ndarray:
  """Returns [size] float64 of length 1: hashed counts of the characters of a text and of neighbouring pairs of them.

  Example:
    >>> bool(embed('4FP', 32) @ embed('4FP', 32) > embed('4FP', 32) @ embed('9K', 32))
    True
  """
  counts = collections.Counter([*text, *(text[i:i + 2] for i in range(len(text) - 1))])
  out = np.zeros(size)
  for piece, count in counts.items():
    out[zlib.crc32(piece.encode()) % size] += count
  return out / max(1e-9, float(np.linalg.norm(out)))


class CaseBank:
  """Cases, and a classifier of pairs that says how likely a case is to be of use for a question.

      P(useful | s, c) = sigmoid(w [e(s) * e(c), e(s) e(c), reward of c, 1])

  with e the embedding of a question; w is learned by gradient steps on the cross-entropy of what became of questions that
  were shown c.

  Source: Memento, code Agent-on-the-Fly/Memento.  Deviation: the source classifies with SimCSE-RoBERTa, trained anew for
    3 epochs at 2e-5; here it is a logistic regression on hashed characters, trained as cases come in.
  """

  def __init__(self, memory: dict[str, Any], *, size: int = 32, capacity: int = 512):
    """Binds a memory of JSON types, which this bank reads and writes, and nothing else.

    Raises:
      ValueError: if a setting is below 1.
    """
    if size < 1 or capacity < 1:
      raise ValueError(f'size={size} and capacity={capacity} of a case bank must be at least 1')
    self._memory, self._size, self._capacity = memory, size, capacity
    memory.setdefault('cases', [])
    memory.setdefault('weights', [0.0] * (size + 3))

  @property
  def cases(self) -> list[Case]:
    """All of them, oldest first."""
    return self._memory['cases']

  def add(self, state: str, plan: str, reward: float):
    """Takes a case in, unless it is known; the oldest one leaves where there is no room."""
    case = {'state': state, 'plan': plan, 'reward': float(reward)}
    if case not in self.cases:
      self.cases.append(case)
      del self.cases[:-self._capacity]

  def nearest(self, state: str, count: int) -> list[Case]:
    """Returns the cases of the most similar questions, by cosine; of equals the earlier."""
    own = embed(state, self._size)
    return self._top([float(own @ embed(c['state'], self._size)) for c in self.cases], count)

  def most_useful(self, state: str, count: int) -> list[Case]:
    """Returns the cases of largest P(useful); of equals the earlier."""
    return self._top([self.useful(state, c) for c in self.cases], count)

  def useful(self, state: str, case: Case) -> float:
    """Returns P(useful)."""
    return 1.0 / (1.0 + math.exp(-float(np.asarray(self._memory['weights']) @ self._features(state, case))))

  def learn(self, state: str, case: Case, useful: bool):
    """Makes one step on the cross-entropy of one pair."""
    weights = np.asarray(self._memory['weights'])
    step = _RATE * (float(useful) - self.useful(state, case)) * self._features(state, case)
    self._memory['weights'] = (weights + step).tolist()

  def _features(self, state: str, case: Case) -> np.ndarray:
    a, b = embed(state, self._size), embed(case['state'], self._size)
    return np.concatenate([a * b, [a @ b, case['reward'], 1.0]])

  def _top(self, scores: Sequence[float], count: int) -> list[Case]:
    order = np.argsort(-np.asarray(scores, np.float64), kind='stable')[:count]
    return [self.cases[i] for i in order]


def plan_of(trajectory: Trajectory) -> str:
  """Returns what was called, in order, as one line; '' for nothing."""
  return ' '.join(f'{c.name} {" ".join(map(str, c.arguments.values()))}'.strip()
                  for turn in trajectory.turns for c in turn.calls)


def text_of(cases: Sequence[Case]) -> str:
  """Returns cases as the policy is shown them.

  Example:
    >>> text_of([{'state': '4F', 'plan': 'lookup F4', 'reward': 1.0}])
    '4F lookup F4 yes'
  """
  return ' '.join(f'{c["state"]} {c["plan"]} {"yes" if c["reward"] > 0 else "no"}' for c in cases)
