"""The group's own label: what most of its answers say."""

from __future__ import annotations

import collections
from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('majority_vote')
class MajorityVote:
  """Parts 'agrees', 1 for the group's most frequent answer, else 0, and 'consensus', its share.

      consensus = trajectories with the most frequent answer / trajectories of the group

  Of several most frequent answers the first counts. A blank answer is no vote, and a group without
  a vote has consensus 0. The total is 'agrees': nothing knows the right answer.

  Source: ADPO (Agent0), code aiming-lab/Agent0.  Deviation: none.
  """

  needs = ()
  names = ('agrees', 'consensus', 'total')
  turn_names = ()

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the parts of each trajectory."""
    del iteration
    groups: dict[str, list[str]] = {}
    for t in trajectories:
      groups.setdefault(t.group_id, []).append(_answer(t))
    votes = {group: _majority(answers) for group, answers in groups.items()}
    out = []
    for t in trajectories:
      label, share = votes[t.group_id]
      agrees = float(bool(label) and _answer(t) == label)
      out.append({'agrees': agrees, 'consensus': share, 'total': agrees})
    return out


def _answer(trajectory: types.Trajectory) -> str:
  return (trajectory.answer or '').strip()


def _majority(answers: Sequence[str]) -> tuple[str, float]:
  counts = collections.Counter(a for a in answers if a)
  if not counts:
    return '', 0.0
  label, count = counts.most_common(1)[0]
  return label, count / len(answers)
