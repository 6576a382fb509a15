"""Chains of lookups and sums: a small world in which every call's worth is known.

'4FP+3' asks: take 4, apply the relation F, then P, then add 3. What a relation makes of a digit is
a fact of `agentrl.tools.chains`; public ones and sums can be known by heart, private ones need a
call. So the fewest calls that a task takes are known, and so is what each further call is worth.
"""

from __future__ import annotations

import hashlib

import numpy as np

from agentrl.core import types
from agentrl.data import base
from agentrl.tools import chains

_TEST_SHARE = 0.2


@base.SOURCES.register('chains')
class ChainSource:
  """Tasks made on demand: an index always gives the same one.

  Train and test questions are disjoint; the private tables belong to the task and are never shown.
  No chain uses a fact twice. A ground truth is {'answer': str, 'table': int, 'needed': [fact, ...]
  that must be looked up, in order, 'known': [fact or sum, ...] that can be known by heart}.

  Example:
    >>> task = ChainSource('train', size=8, hops=(2, 2))[0]
    >>> len(task.messages[0].content) in (3, 4), task.metadata
    (True, {'family': '2_hops'})
  """

  def __init__(self, split: str, *, size: int = 4_096, test_size: int = 512,
               hops: tuple[int, int] = (2, 4), known_share: float = 0.5, sum_share: float = 0.5,
               seed: int = 0, environment: str = 'chains'):
    """Binds the settings.

    Args:
      split: 'train' or 'test'.
      size: Number of training tasks.
      test_size: Number of held-out tasks.
      hops: Fewest and most steps of a chain, a sum included.
      known_share: Probability that a step can be known by heart, unless the one before it can:
        never two in a row, so that each needs one thought. The first of a one-step chain never is.
      sum_share: Probability that a last step that can be known is a sum.
      seed: Of the tasks.
      environment: Environment that the tasks name.
    Raises:
      ValueError: if a setting is out of range.
    """
    if split not in ('train', 'test'):
      raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    low, high = hops
    if not 1 <= low <= high or size < 1 or test_size < 1:
      raise ValueError(f'hops={hops} must be ordered, and they, size={size} and '
                       f'test_size={test_size} at least 1')
    if not (0.0 <= known_share <= 1.0 and 0.0 <= sum_share <= 1.0):
      raise ValueError(f'known_share={known_share} and sum_share={sum_share} must be in [0, 1]')
    self._split, self._seed = split, seed
    self._size = test_size if split == 'test' else size
    self._hops, self._known_share, self._sum_share = (low, high), known_share, sum_share
    self._environment = environment

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> types.Task:
    if not -self._size <= index < self._size:
      raise IndexError(f'task {index} of {self._size}')
    index %= self._size
    rng = np.random.default_rng([self._seed, index, self._split == 'test'])
    while True:
      start, steps = self._question(rng)
      question, table = f'{start}{"".join(steps)}', int(rng.integers(1 << 31))
      truth = solve(start, steps, table)
      distinct = len({*truth['needed'], *truth['known']}) == len(steps)
      if distinct and is_test_question(question) == (self._split == 'test'):
        break
    return types.Task(
        id=f'chains/{self._split}/{self._seed}/{index}',
        environment=self._environment,
        messages=(types.Message('user', question),),
        ground_truth=truth,
        metadata={'family': f'{len(steps)}_hops'})

  def _question(self, rng: np.random.Generator) -> tuple[int, list[str]]:
    steps: list[str] = []
    count = int(rng.integers(self._hops[0], self._hops[1] + 1))
    known = False
    for i in range(count):
      known = not known and count > 1 and rng.random() < self._known_share
      if known and i == count - 1 and rng.random() < self._sum_share:
        steps.append(f'+{rng.integers(1, chains.MAX_ADDEND + 1)}')
      else:
        letters = chains.PUBLIC if known else chains.PRIVATE
        steps.append(letters[rng.integers(len(letters))])
    return int(rng.integers(chains.DIGITS)), steps


def is_test_question(question: str) -> bool:
  """Whether a question belongs to the test split: a fifth of all do, whatever the settings."""
  digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
  return int.from_bytes(digest, 'big') < _TEST_SHARE * 2**32


def solve(start: int, steps: list[str], table: int) -> dict[str, object]:
  """Returns the ground truth of a chain; see `ChainSource`.

  Example:
    >>> solve(4, ['P', '+3'], table=0)['known'] == ['P4', f"{chains.fact('P4', 0)}+3"]
    True
  """
  value, needed, known = start, [], []
  for step in steps:
    if step.startswith('+'):
      known.append(f'{value}{step}')
      value += int(step)
    else:
      name = f'{step}{value}'
      (needed if step in chains.PRIVATE else known).append(name)
      value = chains.fact(name, table)
  return {'answer': str(value), 'table': table, 'needed': needed, 'known': known}
