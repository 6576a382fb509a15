"""Tests of agents whose trajectories have several contexts: planner rows, and forgetting."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl import tools
from agentrl.agents import base as agents
from agentrl.core.types import Iteration, Status, ToolCall, Turn
from agentrl.envs.chains import ChainEnvironment
from agentrl.tokens import formats
from agentrl.tokens.chat import ChatTemplate
from agentrl.training.packing import sequences_of


def trained_words(trajectory):
  """The tokens in the loss, over all sequences of a trajectory, in order."""
  return np.concatenate([s.tokens[s.loss_mask] for s in sequences_of([trajectory])]).tolist()


def drawn_words(stage, trajectory):
  """The tokens of the turns, as their texts say they were drawn."""
  return [i for turn in trajectory.turns for i in
          trajectory.segments[turn.segment].tokens[turn.start:turn.end].tolist()]


def check_each_word_once(stage, t):
  """Identity 18."""
  assert trained_words(t) == drawn_words(stage, t)
  assert ''.join(turn.text for turn in t.turns) == ''.join(
      stage.tokenizer.decode(t.segments[turn.segment].tokens[turn.start:turn.end].tolist()) for turn in t.turns)
  for s in t.segments:
    np.testing.assert_array_equal(np.isfinite(s.log_probs), s.sampled)


def test_every_turn_of_the_planner_sees_the_question_and_the_memory_alone(stage):
  tasks = [stage.task(i) for i in range(4)]
  agent = stage.agent('turn_rows', turns=5)
  got = stage.run(agent, tasks, 3)
  assert max(len(t.turns) for t in got) > 2
  for t in got:
    assert len(t.segments) <= agent.max_segments
    assert [turn.segment for turn in t.turns] == list(range(len(t.turns)))
    check_each_word_once(stage, t)
    memory = ''
    for k, turn in enumerate(t.turns):
      s = t.segments[k]
      question = f'<|user|>{t.task.messages[0].content}<|end|>'
      assert stage.tokenizer.decode(s.tokens[:turn.start].tolist()) == f'{question}{memory}<|assistant|>'
      for call, result in zip(turn.calls, turn.results):
        if call.error is None:
          memory += f'<|assistant|>{stage.environment.call_format.render(call)}'
        memory += f'<|tool|>{result.text}<|end|>'


def test_the_memory_may_be_short_and_turns_few(stage):
  got = stage.run(stage.agent('turn_rows', turns=3, keep=1), [stage.task(i) for i in range(4)], 3)
  assert max(len(t.turns) for t in got) == 3
  for t in got:
    assert len(t.segments) <= 3
    for s in t.segments:
      assert stage.tokenizer.decode(s.tokens.tolist()).count('<|tool|>') <= 2  # one known, one new
    if len(t.turns) == 3 and t.status is not Status.FINISHED:
      assert t.status in (Status.TURN_LIMIT, Status.LENGTH)


def test_the_rule_forgets_the_oldest_until_the_context_fits(stage):
  prompt = 5
  agent = stage.agent('context_segments', budget=24)
  got = stage.run(agent, [stage.task(i) for i in range(5)], 3)
  assert sum(len(t.segments) > 1 for t in got) > 2
  for t in got:
    check_each_word_once(stage, t)
    for before, after in zip(t.segments, t.segments[1:]):
      first = int(np.flatnonzero(after.sampled)[0]) if after.sampled.any() else len(after)
      kept = after.tokens[:first].tolist()
      # The question stays, and the latest of what followed, as it was.
      assert kept[:prompt] == before.tokens[:prompt].tolist()
      tail = kept[prompt:]
      assert len(before) > 24 and len(kept) < len(before)
      assert before.tokens[len(before) - len(tail):].tolist() == tail


@pytest.mark.parametrize('trained', [0, 4, 99])
def test_of_a_groups_segments_some_are_trained_on(stage, trained):
  agent = stage.agent('context_segments', budget=24, trained=trained)
  got = stage.run(agent, [stage.task(i) for i in range(5)], 3, iteration=Iteration(2, 9), learn=True)
  sequences = sequences_of(got)
  at = 0
  for group in range(5):
    own = got[3 * group:3 * group + 3]
    count = sum(len(t.segments) for t in own)
    masks = [sequences[at + k].loss_mask for k in range(count)]
    at += count
    drawn = [s.sampled for t in own for s in t.segments]
    kept = [k for k in range(count) if masks[k].any()]
    assert len(kept) == min(sum(d.any() for d in drawn), trained or 99)
    # A segment is trained on as a whole or not at all.
    assert all((masks[k] == drawn[k]).all() for k in kept)
  again = stage.run(agent, [stage.task(i) for i in range(5)], 3, iteration=Iteration(3, 9), learn=True)
  assert [t.loss_segments for t in again] != [t.loss_segments for t in got] or trained != 4


def test_the_policy_forgets_by_a_call(stage):
  with tools.Executor([tools.make('lookup'), tools.make('prune')]) as executor:
    call_format = formats.make('hermes', list(executor.tools.values()))
    environment = ChainEnvironment(executor, call_format, system_prompt='', max_turns=6)
    template = ChatTemplate(stage.tokenizer, call_format.stops)
    agent = agents.make('context_segments', environment, template, dict(tool='prune', keep=1))
    # Exchanges as they would be: the policy asks twice, then forgets.
    ask, forget = (Turn(0, 0, 0, 0, '', 'stop', (ToolCall(name, {}),)) for name in ('lookup', 'prune'))
    exchanges = [[1, 2], [3], [4, 5, 6]]
    assert agent._kept(ask, 10, exchanges) == exchanges
    assert agent._kept(forget, 10, exchanges) == [[3]]
    assert agent._kept(forget, 10, exchanges[:1]) == []
    bad = Turn(0, 0, 0, 0, '', 'stop', (ToolCall('prune', {}, error='malformed'),))
    assert agent._kept(bad, 10, exchanges) == exchanges


@pytest.mark.parametrize('name, bad, words', [
    ('turn_rows', dict(turns=0), 'turns=0'), ('turn_rows', dict(keep=-1), 'keep=-1'),
    ('context_segments', {}, 'nothing is ever forgotten'),
    ('context_segments', dict(budget=-1), 'budget=-1'),
    ('context_segments', dict(budget=9, max_segments=1), 'max_segments=1'),
    ('context_segments', dict(budget=9, trained=-1), 'trained=-1')])
def test_numbers_out_of_range_are_refused(stage, name, bad, words):
  with pytest.raises(ValueError, match=words):
    stage.agent(name, **bad)
