"""A small policy learns to call the one tool that knows the answer; nothing in it is a stand-in.

What a box holds is drawn anew for every attempt, so nothing but the right tool can tell: without it
one answer in ten is right. The cold start shows three ways, one of them right. The same run on the
negative of the reward must fail.
"""

from __future__ import annotations

import dataclasses

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from agentrl.core.types import Message, Task
from agentrl.data.base import SOURCES
from agentrl.rewards.base import REWARDS
from agentrl.rollout.session import trajectory_seed
from agentrl.sharding import mesh as meshes
from agentrl.synthesis.base import DEMONSTRATORS, Trace
from agentrl.tools import base as tools
from agentrl.training import build
from agentrl.training.evaluate import EvaluationStage, EvaluationWithoutToolsStage
from agentrl.training.rl import ReinforcementStage
from agentrl.training.sft import SupervisedStage
from agentrl.training.state import HostState, LearnerState

SIZES = {
    'tokenizer.vocab_size': '320',
    'tokenizer.digit_group': '1',
    'sft.traces': '1000',
    'model.width': '32',
    'model.ff_width': '64',
    'rollout.slots': '64',
    'rollout.turn_tokens': '8',
    'rollout.trajectory_tokens': '16',
    'rollout.context_tokens': '64',
    'train.row_length': '128',
    'train.micro_rows': '16',
    'sft.steps': '12',
    'sft.updates_per_step': '10',
    'sft.batch_rows': '16',
    'sft.learning_rate': '1e-2',
    'rl.steps': '25',
    'rl.prompts': '16',
    'rl.group_size': '8',
    'rl.learning_rate': '3e-3',
    'rl.trajectories_every': '1000',
    'eval.tasks': '200',
    'environment.max_turns': '3',
}


class Box(tools.Tool):
  """Tells a digit that follows from the attempt's seed."""

  parameters = {'type': 'object', 'properties': {'box': {'type': 'string'}}, 'required': ['box']}

  def __init__(self, name, digit):
    self.name, self.description, self._digit = name, 'Looks.', digit

  async def open(self, seed):
    return self._digit(seed)

  async def call(self, state, arguments):
    return tools.success(str(state))


def held(seed):
  return seed % 10


def unrelated(seed):
  return seed // 10 % 10


class BoxAccuracy:
  """Parts 'accuracy' and 'success': 1 if the answer is what the box of this attempt holds, else 0."""

  names = ('accuracy', 'success')

  def __call__(self, task, trajectory):
    seed = trajectory_seed(trajectory.seed, task.id, trajectory.sample)[0]
    right = float(trajectory.answer == str(held(seed)))
    return {'accuracy': right, 'success': right}


def demonstrate(tasks, executor, *, seed, share_right, call_format):
  """As often right as a third of the time: look and tell, look elsewhere and tell, or guess."""
  del executor, share_right, call_format
  rng, traces = np.random.default_rng(seed), []
  for i, task in enumerate(tasks):
    digit, way = str(rng.integers(10)), ('peek', 'roll', 'guess')[i % 3]
    messages = list(task.messages)
    if way != 'guess':
      messages += [Message('assistant', f'<{way}>b</{way}>'), Message('tool', digit)]
    messages.append(Message('assistant', digit))
    traces.append(Trace(task, tuple(messages), way, way == 'peek'))
  return traces


@pytest.fixture(scope='module')
def boxes():
  """The world of boxes, registered as an extension's files would."""
  tools.TOOLS.register('peek')(lambda: Box('peek', held))
  tools.TOOLS.register('roll')(lambda: Box('roll', unrelated))
  SOURCES.register('boxes')(
      lambda: [Task(f'box{i}', 'tools', (Message('user', 'Box?'),), None) for i in range(1000)])
  REWARDS.register('boxes')(lambda: [BoxAccuracy()])
  DEMONSTRATORS.register('boxes')(demonstrate)


def run_stage(stage, state):
  """Returns the state after all of a stage's steps, and the metrics of its last."""
  host = HostState()
  state = stage.begin(state, host)
  stage.warm_up(state)
  for _ in range(stage.steps):
    state, metrics = stage.step(state, host)
    host.step += 1
    host.stage_step += 1
  return state, metrics


def learn(config, folder, sign=1.0):
  """Returns success after the cold start, after reinforcement, and after it without tools."""
  config.data.source = config.reward.name = config.sft.demonstrator = 'boxes'
  config.data.options = ConfigDict()
  config.reward.weights = ConfigDict({'accuracy': sign})
  config.tools.names = ('peek', 'roll')
  # One device of the eight: splitting so small a policy only costs time.
  one = meshes.make_mesh({}, jax.devices()[:1])
  parts, found = dataclasses.replace(build.build(config, folder), mesh=one), []
  state = LearnerState(parts.init_params(), {}, np.int32(0))
  for stage in (SupervisedStage(parts, 'sft'), EvaluationStage(parts, 'cold_start'),
                ReinforcementStage(parts, 'rl'), EvaluationStage(parts, 'final'),
                EvaluationWithoutToolsStage(parts, 'without')):
    state, metrics = run_stage(stage, state)
    if isinstance(stage, EvaluationStage):
      found.append(metrics['success'])
  parts.close()
  return found


@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_the_policy_learns_to_ask_the_tool_that_knows(boxes, tiny_config, tmp_path, quick_compile,
                                                      algorithm):
  cold, final, without = learn(tiny_config({**SIZES, 'rl.algorithm': algorithm}), tmp_path)
  # A third of the demonstrations look, and a tenth of the others are lucky: 0.4 if imitation were
  # perfect.
  assert cold < 0.6
  assert final > 0.85
  assert without < 0.3


def test_the_opposite_of_the_reward_teaches_the_opposite(boxes, tiny_config, tmp_path, quick_compile):
  cold, final, _ = learn(tiny_config(SIZES), tmp_path, sign=-1.0)
  assert final < cold and final < 0.3
