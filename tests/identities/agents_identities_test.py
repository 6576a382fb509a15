"""Identities of samplers: rows that add up, words that are trained on once, log-probs that nobody can reach.

On real rollouts in the chain world, by a policy that does everything that can go wrong; sizes, options and
settings are drawn at random.
"""

from __future__ import annotations

import collections
import importlib.util
import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from agentrl import tools
from agentrl.agents.branch_entropy import branches, branches_balanced
from agentrl.algorithms.grpo import grpo
from agentrl.algorithms.objective import PolicyOutputs
from agentrl.core.types import Iteration, Status
from agentrl.training.packing import Outcome, pack, sequences_of


@pytest.fixture(scope='module', name='stage')
def one_stage():
  path = pathlib.Path(__file__).parents[1] / 'agents' / 'conftest.py'
  spec = importlib.util.spec_from_file_location('agents_stage', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  with tools.Executor([tools.make('lookup'), tools.make('noise')]) as executor:
    stage = module.Stage(executor)
    stage.script()
    yield stage


BRANCHING = st.one_of(
    st.fixed_dictionaries({'initial': st.integers(1, 7), 'most': st.integers(1, 3), 'threshold': st.floats(0, 1),
                           'weight': st.floats(-1, 2), 'balanced': st.booleans(), 'penalty': st.floats(0, 1)}),
    st.fixed_dictionaries({'balanced': st.just(True), 'threshold': st.floats(0, 1)})).map(
        lambda options: ('branch_entropy', options))
TREES = st.fixed_dictionaries({'forks': st.integers(1, 4)}).map(lambda options: ('tree_fork', options))


@settings(max_examples=12)
@given(st.one_of(BRANCHING, TREES), st.integers(1, 6), st.integers(0, 99))
def test_17_a_group_has_exactly_its_rows_and_no_branch_beyond_its_budget(stage, chosen, size, seed):
  (name, options), task = chosen, stage.task(seed)
  budgets = []
  agent = stage.agent(name, **options)
  programs = agent.programs

  def watched(*args):
    made = programs(*args)
    group = made[0].__self__
    decide = group._rule.decide

    def noting(rows, free):
      decided = decide(rows, free)
      budgets.append((free, sum(decided), min(decided)))
      return decided

    group._rule = type('Noting', (), {'decide': staticmethod(noting), 'fresh': group._rule.fresh})
    return made

  agent.programs = watched
  got = stage.run(agent, [task], size, seed=seed)
  assert len(got) == size and len({(t.sample, t.path) for t in got}) == size
  assert all(t.status not in (Status.RUNNING, Status.CUT, Status.AGENT_FAILURE) for t in got)
  for free, given_out, least in budgets:
    assert 0 <= free and given_out <= free and least >= (-1 if name == 'tree_fork' else 0)


@settings(max_examples=50)
@given(st.floats(0, 1), st.floats(-9, 9), st.integers(0, 40))
def test_17_without_weight_the_entropy_does_not_matter(threshold, rise, made):
  grid = (np.arange(400) + 0.5) / 400
  plain = np.mean([branches(u, rise, weight=0.0, threshold=threshold) for u in grid])
  assert plain == pytest.approx(threshold, abs=1 / 400)
  for u in grid[::40]:
    assert branches_balanced(u, rise, made, weight=0.0) == branches_balanced(u, 0.0, made, weight=0.0)


@pytest.mark.parametrize('name, options', [
    ('turn_rows', {}), ('turn_rows', dict(keep=1)), ('context_segments', dict(budget=20)),
    ('context_segments', dict(budget=12)), ('react', {})])
def test_18_the_new_words_of_all_segments_are_the_drawn_ones_each_once(stage, name, options):
  tasks = [stage.task(i) for i in range(6)]
  several = 0
  for t in stage.run(stage.agent(name, **options), tasks, 3):
    new = np.concatenate([s.tokens[s.sampled] for s in t.segments])
    assert stage.tokenizer.decode(new.tolist()) == ''.join(turn.text for turn in t.turns)
    assert len(new) == sum(turn.end - turn.start for turn in t.turns) == t.num_sampled
    counts = collections.Counter()
    for sequence in sequences_of([t]):
      counts.update((int(k), int(i)) for k, i in zip(sequence.turns[sequence.loss_mask],
                                                    sequence.tokens[sequence.loss_mask]))
    drawn = collections.Counter((turn.index, int(i)) for turn in t.turns
                                for i in t.segments[turn.segment].tokens[turn.start:turn.end])
    assert counts == drawn
    several += len(t.segments) > 1
  assert several or name == 'react'


@pytest.mark.parametrize('name', ['rollback_purify', 'experience_prompt'])
def test_19_what_was_spliced_is_learned_at_recomputed_log_probs_or_not_at_all(stage, name):
  stage.script({'<|assistant|>': {'H': 0.5, 'K': 0.5}, 'H': {'</lookup>': 1.0}, 'K': {'<lookup>': 1.0},
                '<lookup>': {'F': 1.0}, 'F': {'4': 1.0}, '4': {'</lookup>': 1.0}})
  agent = stage.agent(name)
  assert agent.needs_recompute
  got = stage.run(agent, [stage.task(i) for i in range(4)], 2, iteration=Iteration(1, 9, {'2_hops': ['lookup']}))
  stage.script()
  edited = [np.isnan(t.segments[0].log_probs) & t.segments[0].sampled for t in got]
  assert sum(e.any() for e in edited) > 2
  outcome = Outcome(np.arange(8, dtype=np.int32) // 2, np.arange(8, dtype=np.float32) % 2, np.ones(8, np.float32),
                    np.ones(8, bool))
  batch, _ = pack(sequences_of(got), outcome, rows=8, row_length=128)
  log_probs = np.full(batch.tokens.shape, -1.0, np.float32)
  objective = grpo()
  loss = lambda b: float(objective.loss(PolicyOutputs(log_probs), objective.prepare(b))[0])
  # As stored, the loss is no number, so that the update is refused; recomputed, it is the plain one.
  assert np.isnan(loss(batch))
  again = loss(batch._replace(behaviour_log_probs=log_probs))
  other = batch._replace(behaviour_log_probs=np.where(np.isnan(batch.behaviour_log_probs), 7.0, log_probs))
  assert np.isfinite(again) and loss(other) != again
