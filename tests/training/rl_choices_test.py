"""What the reinforcement stage refuses at start, and what it does where a memory says what to ask."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.algorithms.selectors import Candidates
from agentrl.rollout import store
from agentrl.training import build
from agentrl.training.collect import ASKED_AGAIN, _selector
from agentrl.training.rl import ReinforcementStage
from agentrl.training.state import HostState, LearnerState


@pytest.fixture(scope='module', name='make')
def _make(tiny_config, tiny_folder, tmp_path_factory):
  """Returns a function from overrides to a stage; the folder is shared, as nothing is run in it."""
  made = []

  def make(**overrides):
    made.append(build.build(tiny_config({k.replace('__', '.'): v for k, v in overrides.items()}), tiny_folder))
    return ReinforcementStage(made[-1], 'rl')

  yield make
  for parts in made:
    parts.close()


@pytest.mark.parametrize('overrides, message', [
    # Both choices are named, and what would do.
    ({'rl__memory__name': 'failed_queries', 'rl__recompute_behaviour': 'true'},
     "rl.memory 'failed_queries' .* cannot go with rl.recompute_behaviour, .*; set that to False, or take no memory"),
    ({'rl__memory__name': 'sil_buffer', 'rl__memory__size': '4', 'rl__max_generation_batches': '2'},
     "rl.memory 'sil_buffer' .* cannot go with rl.max_generation_batches=2; set that to 1, or .*'prompt_success'"),
    ({'rl__memory__name': 'fifo_leftover'},
     "rl.memory 'fifo_leftover' reads the reward part 'priority' .*add a shaping to reward.shapings"),
    ({'rl__memory__name': 'fifo'}, "unknown memory 'fifo'.*fifo_leftover"),
    ({'rl__select': "[{'name': 'top_std', 'share': 0.0}]"}, r"rl.select 'top_std' .* share=0.0; take one in \(0, 1\]"),
    ({'rl__select': "[{'name': 'top_std', 'shre': 0.5}]"}, "rl.select 'top_std' does not take 'shre'; known: share, part"),
    ({'rl__select': "[{'name': 'mask_flags', 'parts': ['void_turn']}]"},
     "rl.select 'mask_flags' reads the part 'void_turn' .*add a shaping to reward.shapings"),
    ({'rl__select': "[{'name': 'top_std'}]", 'rl__group_size': '1', 'rl__algorithm': 'ppo'},
     "rl.select 'top_std' compares .* cannot go with rl.group_size=1; take a group size of at least 2"),
    ({'rl__algorithm': 'compose', 'rl__options__channels': {'policy': {'rows': {'name': 'replayed', 'part': 'late'}}}},
     "reads the reward part 'late' and cannot go with a reward that does not give it"),
    ({'rl__tasks': '999'}, 'rl.tasks=999 must be between 0, which is all, and the 120 tasks'),
    ({'reward__shapings': "[{'name': 'bonus_anneal', 'steps': 9}]"}, "'bonus_anneal' reads the part 'tool_turns'"),
])
def test_what_cannot_go_together_is_refused_at_start(make, overrides, message):
  with pytest.raises((ValueError, LookupError), match=message):
    make(**overrides)


def test_failed_questions_come_back_with_samples_of_their_own(tiny_config, tiny_workdir, quick_compile):
  parts = build.build(tiny_config({
      'rl.memory.name': 'failed_queries', 'rl.memory.every': '1', 'rl.memory.share': '0.5', 'rl.tasks': '20'}), tiny_workdir)
  stage, host = ReinforcementStage(parts, 'rl'), HostState()
  state = stage.begin(LearnerState(parts.init_params(), {}, np.int32(0)), host)
  asked = []
  for step in range(2):
    state, _ = stage.step(state, host)
    host.step, host.stage_step = step + 1, step + 1
    path = next(p for p in store.list_paths(tiny_workdir / 'trajectories') if store.step_of(p) == step)
    asked.append(store.read(path).trajectories)
  first, second = ({t.task.id for t in trajectories} for trajectories in asked)
  # Nobody knows anything, so the four questions of the first step fail; half of the second step's are among them.
  assert len(first) == len(second) == 4 and len(first & second) == 2
  assert first | second <= {parts.train_source[i].id for i in range(20)}
  again = [t for t in asked[1] if t.task.id in first]
  assert len(again) == 8 and all(t.sample >= ASKED_AGAIN for t in again)
  assert all(t.sample < 4 for t in asked[1] if t.task.id not in first)
  # The draws differ from those of the first time.
  drawn = {tuple(t.segments[0].tokens) for t in asked[0]}
  assert not drawn & {tuple(t.segments[0].tokens) for t in again}
  parts.close()


def test_what_a_memory_holds_is_found_again(tiny_config, tiny_workdir, quick_compile):
  config = tiny_config({'rl.memory.name': 'failed_queries', 'rl.memory.every': '1'})
  parts = build.build(config, tiny_workdir)
  stage, host = ReinforcementStage(parts, 'rl'), HostState()
  state = stage.begin(LearnerState(parts.init_params(), {}, np.int32(0)), host)
  state, _ = stage.step(state, host)
  host.step = host.stage_step = 1
  held = [t.task.id for t in stage._collector.memory.trajectories]
  later = ReinforcementStage(parts, 'rl')
  assert later._collector.memory.trajectories == []
  tasks = later._collector._ask(host, 0, 1)
  assert [t.task.id for t in later._collector.memory.trajectories] == held and len(held) == 4
  assert sum(first >= ASKED_AGAIN for _, first in tasks) == 2
  parts.close()


def test_a_selectors_numbers_may_be_schedules_over_the_steps():
  share = {'schedule': 'linear', 'start': 1.0, 'end': 0.25, 'steps': 3}
  select = _selector({'name': 'top_std', 'share': share}, 2, ['total'])
  step = Candidates(np.float32([0, 4, 0, 3, 0, 2, 0, 1]), np.repeat(np.arange(4, dtype=np.int32), 2), {},
                    np.ones(8, np.float32), np.ones(8, bool))
  # One group fewer at each step: the one that varies least.
  kept = [int(select(step, np.random.default_rng(0), at).weights.sum()) for at in range(4)]
  assert kept == [8, 6, 4, 2]
