"""A verdict on each turn: good or bad."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards import chains

SCHEMES = ('label', 'allocation')


@base.SHAPINGS.register('step_label')
class StepLabel:
  """Part of turns 'step_label': plus `size` for a good turn, minus `size` for a bad one, or a share of the outcome.

      label:       step_label[k] = size or -size
      allocation:  step_label[k] = outcome w_k / sum of w      outcome 1 or -1; w_k = 1 for good turns of a success and bad
                                                               ones of a failure, else `minor`

  In the chain world a turn is good that told something new about a needed fact, or gave the right
  answer: what a labeller that sees the whole trajectory and its outcome could know.

  Source: ADCA-GRPO (AgentEvolver), code modelscope/AgentEvolver: 0.2 both times; the allocation's shares are to be read
    by 'suffix_sum' with alpha 1 and no outcome of its own (`part` ''), our reading.  Deviation: a rule instead of a
    language model.
  """

  needs = ()
  names = ()
  turn_names = ('step_label',)

  def __init__(self, size: float = 0.2, scheme: str = 'label', minor: float = 0.2):
    """Binds the settings.

    Args:
      size: Of a label; above 0.
      scheme: 'label' or 'allocation'.
      minor: Weight of a turn against the outcome, in (0, 1].
    Raises:
      ValueError: if a number is out of range, or the scheme unknown.
    """
    if size <= 0 or not 0 < minor <= 1:
      raise ValueError(f'size={size} must be above 0 and minor={minor} in (0, 1]')
    if scheme not in SCHEMES:
      raise ValueError(f'scheme={scheme!r} is none of {", ".join(SCHEMES)}')
    self._size, self._allocates, self._minor = size, scheme == 'allocation', minor

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'step_label': self._values(t)} for t in trajectories]

  def _values(self, trajectory: types.Trajectory) -> list[float]:
    good = _good(trajectory)
    if not self._allocates:
      return [self._size if g else -self._size for g in good]
    right = chains.is_right(trajectory.task, trajectory)
    weights = [1.0 if g == right else self._minor for g in good]
    return [(1.0 if right else -1.0) * w / sum(weights) for w in weights]


def _good(trajectory: types.Trajectory) -> list[bool]:
  found = chains.turn_values(trajectory.task, trajectory)
  return [bool(needed) and value >= 0 for needed, value in zip(found['needed'], found['value'])]
