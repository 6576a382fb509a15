"""Tests of calls that are tried again: what is shared, what is trained on, whose group it is."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.core.types import Status
from agentrl.training.packing import sequences_of


def test_suffixes_are_a_group_of_their_own_with_nothing_else_in_their_loss(stage):
  agent, tasks = stage.agent('suffix_resample', suffixes=4, before=1), [stage.task(i) for i in range(4)]
  got = stage.run(agent, tasks, 3)
  anchored = 0
  for task in tasks:
    rows = [t for t in got if t.task.id == task.id and not t.rewards.get('suffix')]
    suffixes = [t for t in got if t.task.id == task.id and t.rewards.get('suffix')]
    assert len(rows) == 3 and {t.group_id for t in rows} == {task.id}
    for t in rows:
      failed = any(not r.ok for r in t.results)
      assert t.rewards['flawed'] == float(failed or t.status is not Status.FINISHED)
    assert len(suffixes) <= (4 if any(not r.ok for t in rows for r in t.results) else 0)
    assert len(rows) + len(suffixes) <= agent.max_trajectories(3)
    for t, sequence in zip(suffixes, sequences_of(suffixes)):
      anchored += 1
      assert t.group_id == f'{task.id}/suffix' and t.status is Status.FINISHED
      turn, start = t.turns[-1], t.loss_from
      # The loss is on what was drawn here, all of it and nothing else.
      assert sequence.loss_mask[start:].all() and not sequence.loss_mask[:start].any()
      assert turn.start <= start < turn.end == len(t.segments[0])
      assert turn.text == stage.tokenizer.decode(t.segments[0].tokens[turn.start:].tolist())
      assert t.rewards['executes'] == float(bool(turn.results) and all(r.ok for r in turn.results))
      # What comes before is an anchor's, whose call of that turn failed.
      prefix = t.segments[0].tokens[:start]
      assert any((prefix == a.segments[0].tokens[:start]).all() and len(a.turns) > turn.index and
                 any(not r.ok for r in a.turns[turn.index].results) for a in rows)
    assert len({tuple(t.segments[0].tokens) for t in suffixes}) > 1 or not suffixes
  assert anchored


def test_the_cut_is_before_the_call_and_within_its_turn(stage):
  # A thought of one letter, then a call of a fact that there is not.
  stage.script({'<|assistant|>': {'H': 1.0}, 'H': {'<lookup>': 1.0}, '<lookup>': {'F': 1.0}, 'F': {'</lookup>': 1.0}})
  for before, shared in ((0, 1), (1, 0), (100, 0)):
    agent = stage.agent('suffix_resample', suffixes=2, before=before)
    *rows, one, two = stage.run(agent, [stage.task()], 1, turns=2)
    assert [t.rewards['flawed'] for t in rows] == [1.0]
    for t in (one, two):
      assert t.loss_from == t.turns[-1].start + shared and t.turns[-1].text == 'H<lookup>F</lookup>'
      assert t.rewards['executes'] == 0.0 and t.results[-1].error == 'no_such_fact'


def test_a_suffix_that_answers_has_no_call_to_judge_and_is_left_out(stage):
  # A thought, then a call of a fact that there is not, or an end, as often.
  stage.script({'<|assistant|>': {'H': 1.0}, 'H': {'<lookup>': 0.5, '<|end|>': 0.5}, '<lookup>': {'F': 1.0},
                'F': {'</lookup>': 1.0}})
  got = stage.run(stage.agent('suffix_resample', suffixes=32, before=0), [stage.task()], 8, turns=2)
  suffixes = [t for t in got if t.rewards.get('suffix')]
  # All 32 answer, or none does, in one case of 2^31 each.
  assert 0 < len(suffixes) < 32
  assert all(t.answer is None and t.results for t in suffixes)


def test_without_a_failed_call_there_is_nothing_to_try_again(stage):
  stage.script({'<|assistant|>': {'7': 1.0}, '7': {'<|end|>': 1.0}})
  got = stage.run(stage.agent('suffix_resample'), [stage.task()], 3)
  assert len(got) == 3 and all(t.rewards['flawed'] == 0.0 for t in got)


@pytest.mark.parametrize('bad', [dict(suffixes=1), dict(before=-1)])
def test_numbers_out_of_range_are_refused(stage, bad):
  [(name, value)] = bad.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    stage.agent('suffix_resample', **bad)


def test_the_tools_are_where_they_were(stage, chain_executor):
  """The call that failed has been forgotten by the tool: the suffix's call has the same number."""
  stage.script({'<|assistant|>': {'<lookup>': 1.0}, '<lookup>': {'F': 1.0},
                'F': {'</lookup>': 0.9, **{d: 0.01 for d in '0123456789'}},
                **{d: {'</lookup>': 1.0} for d in '0123456789'}})
  pages = []
  tool, real = chain_executor.tools['lookup'], chain_executor.tools['lookup'].call

  async def noting(state, arguments):
    pages.append((state[0].seed, state[0].calls))
    return await real(state, arguments)

  tool.call = noting
  try:
    got = stage.run(stage.agent('suffix_resample', suffixes=3, before=0), [stage.task()], 1, turns=3)
  finally:
    del tool.call
  suffixes = [t for t in got if t.rewards.get('suffix')]
  assert suffixes
  at = suffixes[0].turns[-1].index
  assert pages[-3:] == [pages[at]] * 3
  np.testing.assert_array_equal([len(t.turns) for t in suffixes], at + 1)
