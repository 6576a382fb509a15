"""Branches where the policy has become less sure after a tool's answer: ARPO, and AEPO's balanced form."""

from __future__ import annotations

import math
from typing import Any, Sequence

from agentrl.agents import base, rounds
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Task
from agentrl.rollout.session import Session


def branches(uniform: float, rise: float, *, weight: float = 0.2, threshold: float = 0.5) -> bool:
  """Returns whether a row branches, ARPO's way: with probability threshold + weight * rise.

      clip(U - weight (H - H_0), 0, 1) <= threshold

  Args:
    uniform: U, in [0, 1).
    rise: H - H_0: entropy of the last turn over that of the first.
    weight: Of the rise; at 0 the probability is the threshold.
    threshold: In [0, 1].
  Source: ARPO, code RUC-NLPIR/ARPO vllm_rollout_with_tools.py.  Deviation: the paper writes the probability as
    alpha + beta (H - H_0) and branches where it exceeds a threshold; this is the release, a draw with that probability.
  """
  return min(max(uniform - weight * rise, 0.0), 1.0) <= threshold


def branches_balanced(uniform: float, rise: float, made: int, *, weight: float = 0.2, threshold: float = 0.5,
                      penalty: float = 0.05) -> bool:
  """Returns whether a row branches, AEPO's way: ever less likely the more branches the question has.

      clip((U + weight (H - H_0)) max(0, 1 - penalty b), 0, 1) >= threshold

  Args:
    uniform: U, in [0, 1).
    rise: H - H_0.
    made: b, branches of the question so far; never reset.
    weight: Of the rise; at 0 and without branches the probability is 1 - threshold.
    threshold: In [0, 1].
    penalty: A branch.
  Source: AEPO, code read in third-party copies of its tree.  Deviation: none known.
  """
  return min(max((uniform + weight * rise) * max(0.0, 1.0 - penalty * made), 0.0), 1.0) >= threshold


def monitored_rows(size: int, first: float, later: float) -> int:
  """Returns with how many rows of its own a group begins, judged by one that has been played.

      clip(int(size sigmoid((H_first - H_later) / 2)) + 1, 1, size)

  Example:
    >>> monitored_rows(8, 1.0, 1.0), monitored_rows(8, 9.0, 1.0), monitored_rows(8, 1.0, 9.0)
    (5, 8, 1)
  """
  share = 1.0 / (1.0 + math.exp(-(first - later) / 2.0))
  return min(max(int(size * share) + 1, 1), size)


@base.AGENTS.register('branch_entropy')
class BranchEntropy(base.Agent):
  """Begins with fewer rows than the group is to have, and branches some of them after tool calls.

  The rows of a group meet after every turn; each then branches at most `most` times, while there are rows to be given
  out. When all have ended before that, fresh ones begin, one at a time, so that a group ends with exactly its size.
  Branches copy what came before: its tokens are trained on in every copy, and credit map 'prefix_mean' gives them the
  mean advantage of all (hard attribution; without it, soft).

  Balanced, the first row is played alone, and how unsure the policy was in its first turn, compared with the turns
  after a tool's answer, says how many of the group's rows begin from nothing; it is one of them.

  Source: ARPO, code RUC-NLPIR/ARPO: groups of 16, 8 rows to begin with, weight 0.2, threshold 0.5, at most one branch a
    row and round, 20 tokens. AEPO, copies of its tree: penalty 0.05.
  Deviation: entropies are those of the whole vocabulary instead of the ten likeliest tokens. Missing rows are always
    sampled, never filled by repeating the last. AEPO's monitoring rollout counts as one of the group's (our choice; the
    source is silent).
  """

  def __init__(self, environment: Any, template: Any, *, initial: int | None = None, weight: float = 0.2,
               threshold: float = 0.5, most: int = 1, tokens: int = 20, balanced: bool = False,
               penalty: float = 0.05):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      initial: Rows that begin from nothing; None for half of the group, or, if balanced, as many as monitoring says.
      weight: Of the rise of entropy.
      threshold: See `branches`.
      most: Branches of a row in one round.
      tokens: Tokens at the start of a turn whose entropy counts.
      balanced: Whether to branch AEPO's way.
      penalty: See `branches_balanced`.
    Raises:
      ValueError: if a number is out of range.
    """
    if (initial is not None and initial < 1) or most < 1 or tokens < 1 or not 0 <= threshold <= 1 or penalty < 0:
      raise ValueError(f'initial={initial}, most={most} and tokens={tokens} must be at least 1, threshold={threshold} '
                       f'in [0, 1] and penalty={penalty} not negative')
    self._environment, self._template = environment, template
    self._initial, self._most, self._tokens = initial, most, tokens
    self._weight, self._threshold = weight, threshold
    self._balanced, self._penalty = balanced, penalty

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns the programs of the rows that begin from nothing."""
    del iteration
    monitor = self._balanced and self._initial is None
    roots = 1 if monitor else min(self._initial or max(1, group_size // 2), group_size)
    group = rounds.Rounds(Player(self._environment, self._template, task), _Rule(self, group_size, monitor),
                          group_size, roots)
    return [group.root] * roots

  def branches(self, session: Session, made: int) -> bool:
    """Returns whether a row branches after its last turn, where its question has `made` branches."""
    turns = session.trajectory.turns
    rise = self.entropy(session, -1) - self.entropy(session, 0)
    settings = dict(weight=self._weight, threshold=self._threshold)
    u = rounds.uniform(session)
    if self._balanced:
      return branches_balanced(u, rise, made, penalty=self._penalty, **settings)
    return bool(turns) and branches(u, rise, **settings)

  def entropy(self, session: Session, turn: int) -> float:
    """Returns the entropy at the start of a turn; see `rounds.turn_entropy`."""
    return rounds.turn_entropy(session, session.trajectory.turns[turn], self._tokens)

  @property
  def most(self) -> int:
    """Branches of a row in one round."""
    return self._most


class _Rule:
  """What one group does."""

  def __init__(self, agent: BranchEntropy, size: int, monitor: bool):
    self._agent, self._size, self._monitoring = agent, size, monitor
    self._made = 0

  def decide(self, rows: Sequence[Session], free: int) -> list[int]:
    if self._monitoring:
      return [0] * len(rows)
    decided = []
    for row in rows:
      # One draw a row and round: several branches are made together, as a beam.
      n = min(free, self._agent.most) if self._agent.branches(row, self._made) else 0
      decided.append(n)
      free -= n
      self._made += n
    return decided

  def fresh(self, ended: Session, free: int) -> int:
    if not self._monitoring:
      return 1
    self._monitoring = False
    turns = ended.trajectory.turns
    if len(turns) < 2:
      return monitored_rows(self._size, 0.0, 0.0) - 1
    later = [self._agent.entropy(ended, k) for k in range(1, len(turns))]
    return monitored_rows(self._size, self._agent.entropy(ended, 0), sum(later) / len(later)) - 1
