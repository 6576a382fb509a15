"""Tests of purification: what is spliced, what is gone, and that no stored log-prob of it can be reached."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.agents.rollback_purify import similarity
from agentrl.core.types import ToolCall


def answers_after(stage, *lines):
  """A policy whose turns are drawn from `lines`: each begins with a letter of its own, equally likely."""
  follows, starts = {}, []
  for line in lines:
    pieces = [stage.tokenizer.decode([i]) for i in stage.tokenizer.encode(line, allow_markers=True)]
    starts.append(pieces[0])
    for a, b in zip(pieces, pieces[1:]):
      follows.setdefault(a, {})[b] = 1.0
  follows['<|assistant|>'] = {s: 1.0 / len(starts) for s in starts}
  for successors in follows.values():
    for b in successors:
      successors[b] = 1.0 / len(successors)
  stage.script(follows)


def test_errors_vanish_and_what_is_spliced_has_no_log_prob(stage):
  """Identity 19."""
  # H leads to no call at all, K to a right one.
  answers_after(stage, 'H</lookup>', 'K<lookup>F4</lookup>')
  agent = stage.agent('rollback_purify')
  got = stage.run(agent, [stage.task(i) for i in range(6)], 2)
  spliced = 0
  for t in got:
    [s] = t.segments
    for turn in t.turns:
      known = np.isfinite(s.log_probs[turn.start:turn.end])
      assert s.sampled[turn.start:turn.end].all() and known.all() or not known.any()
      spliced += not known.any()
      if not known.any():
        assert turn.text == stage.tokenizer.decode(s.tokens[turn.start:turn.end].tolist())
        assert turn.results and all(r.ok for r in turn.results)
    # An error that a right call follows at once does not stay.
    fine = [not any(not r.ok for r in turn.results) for turn in t.turns]
    alone = [k for k in range(len(fine) - 1) if not fine[k] and fine[k + 1] and (k == 0 or fine[k - 1])]
    assert not [k for k in alone if t.turns[k + 1].results]
  assert spliced > 3 and agent.needs_recompute


@pytest.mark.parametrize('alike, expected', [
    # Similar calls: the thought of the failed turn, the call of the retry.
    (0.0, 'H<lookup>F4</lookup>'),
    # Different ones: the whole retry.
    (1.0, 'K<lookup>F4</lookup>'),
])
def test_the_thought_is_kept_where_the_calls_are_alike(stage, alike, expected):
  answers_after(stage, 'H</lookup>', 'K<lookup>F4</lookup>')
  got = stage.run(stage.agent('rollback_purify', alike=alike), [stage.task(i) for i in range(6)], 2)
  texts = [turn.text for t in got for turn in t.turns if np.isnan(t.segments[0].log_probs[turn.start])]
  assert texts and set(texts) == {expected}


def test_a_retry_without_a_call_leaves_everything_as_it_is(stage):
  answers_after(stage, 'H<lookup>Q</lookup>', '7<|end|>')
  got = stage.run(stage.agent('rollback_purify'), [stage.task(i) for i in range(6)], 2)
  assert any(len(t.turns) > 1 for t in got)
  for t in got:
    assert np.isfinite(t.segments[0].log_probs[t.segments[0].sampled]).all()


def test_rows_that_are_not_purified_are_the_plain_programs(stage):
  tasks = [stage.task(i) for i in range(3)]
  plain = stage.run(stage.agent('react'), tasks, 3)
  got = stage.run(stage.agent('rollback_purify', probability=0.0), tasks, 3)
  for a, b in zip(plain, got):
    np.testing.assert_array_equal(a.segments[0].tokens, b.segments[0].tokens)
    np.testing.assert_array_equal(a.segments[0].log_probs, b.segments[0].log_probs)


def test_similarity_is_that_of_the_calls_as_text():
  call = lambda **arguments: [ToolCall('lookup', arguments)]
  # 'lookup(fact=F4)' and 'lookup(fact=F5)' share 14 of 15 letters each.
  assert similarity(call(fact='F4'), call(fact='F5')) == pytest.approx(2 * 14 / 30)
  assert similarity([], call(fact='F4')) == 0.0


@pytest.mark.parametrize('bad', [dict(retries=0), dict(probability=1.5), dict(alike=-1.0)])
def test_numbers_out_of_range_are_refused(stage, bad):
  [(name, value)] = bad.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    stage.agent('rollback_purify', **bad)
