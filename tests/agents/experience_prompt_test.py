"""Tests of guided rollouts: who is guided, and that nothing of the hint is left to train on."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.core.types import Iteration, Status, ToolCall, Trajectory, Turn


def test_the_hint_guides_and_is_gone_from_what_is_trained_on(stage):
  tasks, memory = [stage.task(i) for i in range(3)], {'2_hops': ['lookup', 'lookup']}
  agent = stage.agent('experience_prompt', share=0.5)
  got = stage.run(agent, tasks, 4, iteration=Iteration(2, 9, memory))
  plain = stage.run(stage.agent('react'), tasks, 4)
  for t, other in zip(got, plain):
    [s] = t.segments
    text = stage.tokenizer.decode(s.tokens.tolist())
    assert '<|system|>' not in text and text.startswith(f'<|user|>{t.task.messages[0].content}<|end|><|assistant|>')
    guided = t.sample < 2
    assert t.rewards.get('guided', 0.0) == float(guided)
    # Unguided rows are those of the plain agent; nothing stored speaks of guided ones.
    known = np.isfinite(s.log_probs)
    np.testing.assert_array_equal(known, s.sampled & (not guided))
    if not guided:
      np.testing.assert_array_equal(s.tokens, other.segments[0].tokens)
    for turn in t.turns:
      assert stage.tokenizer.decode(s.tokens[turn.start:turn.end].tolist()) == turn.text
  assert agent.needs_recompute and agent.names == ('guided',)


def test_a_row_that_ends_badly_loses_the_hint_too(stage):
  stage.script({'<|assistant|>': {'7': 1.0}, '7': {'7': 1.0}})
  got = stage.run(stage.agent('experience_prompt', share=1.0), [stage.task()], 2,
                  iteration=Iteration(2, 9, {'2_hops': ['lookup']}), turn_tokens=5)
  for t in got:
    assert t.status is Status.LENGTH and t.segments[0].sampled.sum() == 5
    assert '<|system|>' not in stage.tokenizer.decode(t.segments[0].tokens.tolist())


def test_the_success_with_fewest_calls_is_what_is_kept(stage):
  agent, memory = stage.agent('experience_prompt'), {}

  def result(success, *calls):
    turn = Turn(0, 0, 0, 0, '', 'stop', tuple(ToolCall(name, {}) for name in calls))
    return Trajectory(stage.task(), 0, 'g', 0, turns=[turn], rewards={'success': success})

  for given, expected in [((0.0, 'noise'), None), ((1.0,), None), ((1.0, 'lookup', 'noise'), ['lookup', 'noise']),
                          ((1.0, 'lookup'), ['lookup']), ((1.0, 'noise'), ['lookup'])]:
    agent.learn([result(*given)], Iteration(0, 9, memory))
    assert memory.get('2_hops') == expected


def test_without_experience_nobody_is_guided(stage):
  got = stage.run(stage.agent('experience_prompt', share=1.0), [stage.task()], 3)
  assert not any(t.rewards.get('guided') for t in got)


@pytest.mark.parametrize('share', [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(stage, share):
  with pytest.raises(ValueError, match=f'share={share}'):
    stage.agent('experience_prompt', share=share)
