"""The calls of each turn against those that the task is known to take."""

from __future__ import annotations

import collections
from typing import Any, Mapping, Sequence

import numpy as np
from scipy import optimize

from agentrl.core import types
from agentrl.rewards import base

ASSIGNMENTS = ('hungarian', 'greedy')


@base.SHAPINGS.register('match_turn')
class MatchTurn:
  """Part of turns 'match', and part 'match_sum', their sum.

  A turn that calls has the mean similarity of its calls to the true calls that they are assigned to,
  `unmatched` for a call that is assigned to none. The last turn, without a call, has the F1 score of
  the answer's words. True calls are ground truth 'calls', a list of {'name', 'arguments'}, or one
  lookup for each of the chain world's 'needed'.

  Source: MatchTIR, code quchangle1/MatchTIR.  Deviation: none from the paper; the release assigns
    greedily.
  """

  needs = ()
  names = ('match_sum',)
  turn_names = ('match',)

  def __init__(self, assignment: str = 'hungarian', unmatched: float = 0.0):
    """Binds the settings.

    Args:
      assignment: 'hungarian', of the largest sum, or 'greedy', the most similar pair first.
      unmatched: What a call is worth that is assigned to no true call.
    Raises:
      ValueError: if the assignment is unknown.
    """
    if assignment not in ASSIGNMENTS:
      raise ValueError(f'assignment={assignment!r} is none of {", ".join(ASSIGNMENTS)}')
    self._assign = assign_hungarian if assignment == 'hungarian' else assign_greedy
    self._unmatched = unmatched

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, Any]]:
    """Returns the parts of each trajectory."""
    del iteration
    out = []
    for t in trajectories:
      values = self._turns(t)
      out.append({'match': values, 'match_sum': sum(values)})
    return out

  def _turns(self, trajectory: types.Trajectory) -> list[float]:
    calls = [(k, call) for k, turn in enumerate(trajectory.turns) for call in turn.calls]
    gold = true_calls(trajectory.task)
    scores = np.array([[similarity(call, g) for g in gold] for _, call in calls])
    pairs = self._assign(scores) if calls and gold else []
    worth: dict[int, list[float]] = {}
    matched = {i: scores[i, j] for i, j in pairs}
    for i, (k, _) in enumerate(calls):
      worth.setdefault(k, []).append(matched.get(i, self._unmatched))
    values = [float(np.mean(worth[k])) if k in worth else 0.0 for k in range(len(trajectory.turns))]
    if trajectory.turns and not trajectory.turns[-1].calls:
      values[-1] = word_f1(trajectory.answer or '', trajectory.task.ground_truth['answer'])
    return values


def true_calls(task: types.Task) -> list[types.ToolCall]:
  """Returns the calls that the task is known to take; see `MatchTurn`."""
  truth = task.ground_truth
  if 'calls' in truth:
    return [types.ToolCall(c['name'], c['arguments']) for c in truth['calls']]
  return [types.ToolCall('lookup', {'fact': name}) for name in truth['needed']]


def similarity(call: types.ToolCall, true: types.ToolCall) -> float:
  """Returns how far a call is the true one, in [0, 1].

      (same name + Jaccard index of the arguments' names + equal arguments) / (2 + true arguments)

  Example:
    >>> similarity(types.ToolCall('a', {'x': 1}), types.ToolCall('a', {'x': 2}))
    0.6666666666666666
  """
  own, other = (collections.Counter(c.arguments.keys()) for c in (call, true))
  union = sum((own | other).values())
  keys = sum((own & other).values()) / union if union else 1.0
  equal = sum(name in call.arguments and call.arguments[name] == value
              for name, value in true.arguments.items())
  return (float(call.name == true.name) + keys + equal) / (2 + len(true.arguments))


def assign_hungarian(scores: np.ndarray) -> list[tuple[int, int]]:
  """Returns the pairs (row, column) with the largest sum of scores, each used once; above 0 only.

  Args:
    scores: [n, m], at least 0.
  """
  rows, columns = optimize.linear_sum_assignment(scores, maximize=True)
  return [(int(i), int(j)) for i, j in zip(rows, columns) if scores[i, j] > 0]


def assign_greedy(scores: np.ndarray) -> list[tuple[int, int]]:
  """Returns pairs (row, column), the largest score first, each used once; above 0 only.

  Args:
    scores: [n, m], at least 0.
  """
  pairs, left = [], scores.astype(float)
  while left.size and left.max() > 0:
    i, j = (int(k) for k in np.unravel_index(np.argmax(left), left.shape))
    pairs.append((i, j))
    left[i, :], left[:, j] = 0, 0
  return pairs


def word_f1(answer: str, true: str) -> float:
  """Returns the harmonic mean of precision and recall of the words, counted with repeats.

  Example:
    >>> word_f1('the answer is 4', '4')
    0.4
  """
  given, wanted = collections.Counter(answer.split()), collections.Counter(true.split())
  shared = sum((given & wanted).values())
  return 2.0 * shared / (sum(given.values()) + sum(wanted.values())) if shared else 0.0
