"""A small policy learns to call the one tool that knows the answer; nothing in it is a stand-in.

What a box holds is drawn anew for every attempt, so nothing but the right tool can tell: without it
one answer in ten is right. The cold start shows three ways, one of them right. The same run on the
negative of the reward must fail.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from agentrl.core.types import Message, Task
from agentrl.rollout.session import trajectory_seed
from agentrl.sharding import mesh as meshes
from agentrl.tokens import chat, formats, tokenizer
from agentrl.tools import base as tools
from agentrl.tools import executor as executors
from agentrl.training import build
from agentrl.training.evaluate import EvaluationStage, EvaluationWithoutToolsStage
from agentrl.training.rl import ReinforcementStage
from agentrl.training.sft import SupervisedStage
from agentrl.training.state import HostState, LearnerState

SIZES = {
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


class Boxes(build.Parts):
  """The parts of a run on boxes."""

  def demonstrations(self):
    """As often right as a third of the time: look and tell, look elsewhere and tell, or guess."""
    rng, chats = np.random.default_rng(0), []
    for i in range(1000):
      digit, way = str(rng.integers(10)), ('peek', 'roll', None)[i % 3]
      messages = [Message('user', 'Box?')]
      if way:
        messages += [Message('assistant', f'<{way}>b</{way}>'), Message('tool', digit)]
      chats.append(tuple(messages + [Message('assistant', digit)]))
    return chats


def reward(sign, task, trajectory):
  seed = trajectory_seed(trajectory.seed, task.id, trajectory.sample)[0]
  right = float(trajectory.answer == str(held(seed)))
  return {'success': right, 'total': sign * right}


def make_parts(config, folder, sign=1.0):
  boxes = [Box('peek', held), Box('roll', unrelated)]
  call_format = formats.xml_format(boxes)
  texts = [
      'Box?', '<peek>b</peek>', '<roll>b</roll>',
      chat.describe_tools([{'name': t.name, 'parameters': t.parameters} for t in boxes])
  ] * 20
  tokens = tokenizer.train_tokenizer(texts, markers=call_format.markers, vocab_size=320,
                                     digit_group=1)
  source = [Task(f'box{i}', 'tools', (Message('user', 'Box?'),), None) for i in range(200)]
  model = build.new_model_config(config, tokens.vocab_size)
  mesh = meshes.make_mesh({}, jax.devices()[:1])
  return Boxes(config, folder, model, mesh, tokens,
               chat.ChatTemplate(tokens, call_format.stops), boxes, call_format,
               executors.Executor(boxes), source, source, functools.partial(reward, sign))


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
  parts, found = make_parts(config, folder, sign), []
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
def test_the_policy_learns_to_ask_the_tool_that_knows(tiny_config, tmp_path, quick_compile,
                                                      algorithm):
  cold, final, without = learn(tiny_config({**SIZES, 'rl.algorithm': algorithm}), tmp_path)
  # A third of the demonstrations look, and a tenth of the others are lucky: 0.4 if imitation were
  # perfect.
  assert cold < 0.6
  assert final > 0.85
  assert without < 0.3


def test_the_opposite_of_the_reward_teaches_the_opposite(tiny_config, tmp_path, quick_compile):
  cold, final, _ = learn(tiny_config(SIZES), tmp_path, sign=-1.0)
  assert final < cold and final < 0.3
