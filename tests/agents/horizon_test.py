"""Tests of the rising limit of turns."""

from __future__ import annotations

import pytest

from agentrl.core.types import Boundary, Iteration, Status


@pytest.mark.parametrize('step, turns', [(0, 1), (4, 1), (5, 3), (10, 4), (99, 4)])
def test_the_limit_follows_the_step_and_the_environment(stage, step, turns):
  # A policy that always asks; the engine allows 4 turns.
  stage.script({'<|assistant|>': {'<lookup>': 1.0}, '<lookup>': {'F': 1.0}, 'F': {'4': 1.0}, '4': {'</lookup>': 1.0}})
  agent = stage.agent('horizon', rounds=(1, 3, 9), every=5)
  for t in stage.run(agent, [stage.task()], 2, iteration=Iteration(step, 100), turns=4):
    assert (len(t.turns), t.status, t.boundary) == (turns, Status.TURN_LIMIT, Boundary.POLICY)


@pytest.mark.parametrize('bad', [dict(rounds=(), every=5), dict(rounds=(0, 3), every=5), dict(rounds=(3,), every=0)])
def test_numbers_out_of_range_are_refused(stage, bad):
  with pytest.raises(ValueError, match='at least 1'):
    stage.agent('horizon', **bad)
