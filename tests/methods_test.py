"""Every config of configs/methods is what it says, and trains: two steps at the smallest size.

All parts are real but the verdict on an answer: a policy this small is never right, so a drawn number
decides. What configs share is made once: data, tokenizer, a short cold start, compiled samplers.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import pathlib
import re

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from agentrl.core import config as config_lib
from agentrl.rewards import base as rewards
from agentrl.rewards import chains
from agentrl.sharding import mesh as meshes
from agentrl.training import build
from agentrl.training.rl import ReinforcementStage
from agentrl.training.sft import SupervisedStage
from agentrl.training.state import HostState, LearnerState

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_FOLDER = _ROOT / 'configs' / 'methods'
_PATHS = sorted(p for p in _FOLDER.glob('*.py') if p.name != '__init__.py')
_NAMES = [p.stem for p in _PATHS]
_METRICS = ('success', 'calls_per_task', 'failed_call_rate', 'avoidable_calls', 'response_tokens', 'entropy', 'seconds')
_MAX_LINES = 60
# Small enough to compile in a hurry; what makes a method what it is stays as the config has it.
_SMALL = {
    'data.options.size': 1_024, 'model.num_layers': 1, 'model.width': 32, 'model.ff_width': 32, 'model.num_heads': 2,
    'model.num_kv_heads': 2, 'model.head_dim': 16, 'sft.traces': 1_000, 'sft.steps': 1, 'sft.updates_per_step': 100,
    'sft.batch_rows': 8, 'sft.optimizer': 'adamw', 'sft.warmup': 5, 'rl.steps': 2, 'rl.prompts': 4, 'rl.group_size': 4, 'rl.max_generation_batches': 1,
    'rl.trajectories_every': 1, 'rollout.slots': 16, 'train.micro_rows': 8, 'eval.tasks': 8}
every_method = pytest.mark.parametrize('name', _NAMES)


def _module(name):
  spec = importlib.util.spec_from_file_location(f'method_{name}', _FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _small(name):
  """The config at the smallest size, checked against base.py."""
  config = config_lib.load(_FOLDER / f'{name}.py', None, _ROOT / 'configs' / 'base.py')
  for key, value in _SMALL.items():
    section, last = config, key.split('.')
    for part in last[:-1]:
      section = section[part]
    section[last[-1]] = value
  if config.rl.tasks:
    config.rl.tasks = 8
  if 'size' in config.rl.memory:
    config.rl.memory.size = 2
  if config.reward.name == 'chains':
    config.reward.name = 'coin_for_test'
  if name == 'cm2':
    config.rl.group_size = 6  # it compares five and more
  # Samples to keep of 4, and a band that a policy without consensus lies in.
  small = {'roc_downsample': {'keep': 2}, 'band': {'low': 0.0, 'high': 1.0}}
  config.rl.select = tuple({**s, **small.get(s['name'], {})} for s in config.rl.select)
  return config


@every_method
def test_it_says_what_it_is(name):
  module, source = _module(name), (_FOLDER / f'{name}.py').read_text()
  assert len(source.splitlines()) <= _MAX_LINES
  assert max(map(len, source.splitlines())) <= 120
  assert f'--config=configs/methods/{name}.py --workdir=runs/{name}' in module.__doc__
  method = module.METHOD
  assert set(method) == {'title', 'source', 'exact', 'ours', 'test', 'claim'}
  for key in ('title', 'source', 'exact', 'ours', 'test'):
    assert isinstance(method[key], str) and 0 < len(method[key]) <= 120, key
  assert (_ROOT / method['test']).is_file()
  claim = method['claim']
  if claim is None:
    return  # what others are compared with
  assert set(claim) == {'metric', 'better', 'than'}
  assert claim['metric'] in _METRICS and claim['better'] in ('higher', 'lower')
  assert claim['than'] in _NAMES or claim['than'] == 'cold_start'


def test_titles_differ():
  titles = [_module(name).METHOD['title'] for name in _NAMES]
  assert len(set(titles)) == len(titles)


class _Coin:
  """Parts 'accuracy' and 'success': right where the tokens drawn add up to an even number."""

  names = ('accuracy', 'success')

  def __call__(self, task, trajectory):
    drawn = sum(int(s.tokens[s.sampled].sum()) for s in trajectory.segments)
    return dict.fromkeys(self.names, float(drawn % 2 == 0))


class _Shared:
  """Runs that share data, tokenizer, cold start and compiled samplers wherever their configs agree on them."""

  SECTIONS = ('seed', 'data', 'tokenizer', 'model', 'tools', 'environment', 'rollout', 'sft')

  def __init__(self, folder):
    self._folder, self._parts, self._policies = folder, {}, {}

  def of(self, config, workdir):
    """Returns the parts of a run of that config."""
    key = self._key(config, self.SECTIONS)
    if key not in self._parts:
      own = self._folder / str(len(self._parts))
      own.mkdir()
      self._parts[key] = build.build(config, own)
    kept = self._parts[key]
    model = dataclasses.replace(kept.model, value_head=build.needs_value_head(config))
    reward = build.make_reward(config)
    # Programs for one device compile several times as fast.
    mesh = meshes.make_mesh({}, jax.devices()[:1])
    parts = dataclasses.replace(kept, config=config, workdir=workdir, model=model, mesh=mesh, reward=reward)
    if model == kept.model:
      parts._engines = kept._engines
    return parts

  def policy(self, parts):
    """Returns parameters after the cold start, new ones where it has none."""
    key = self._key(parts.config, ('data', 'tokenizer', 'tools', 'sft')) + repr(dataclasses.replace(
        parts.model, value_head=False))
    if key not in self._policies:
      plain = dataclasses.replace(parts, model=dataclasses.replace(parts.model, value_head=False))
      stage, host = SupervisedStage(plain, 'sft'), HostState()
      state = stage.begin(LearnerState(plain.init_params(), {}, np.int32(0)), host)
      stage.warm_up(state)
      self._policies[key] = jax.device_get(stage.step(state, host)[0].params)
    return {**parts.init_params(), **self._policies[key]}

  def close(self):
    for parts in self._parts.values():
      parts.close()

  @staticmethod
  def _key(config, sections):
    return repr([config[s].to_dict() if isinstance(config[s], ConfigDict) else config[s] for s in sections])


@pytest.fixture(scope='module', name='shared')
def _shared(tmp_path_factory):
  rewards.REWARDS.names()
  if 'coin_for_test' not in rewards.REWARDS.names():
    rewards.REWARDS.register('coin_for_test')(lambda: [_Coin(), chains.ChainCalls()])
  made = _Shared(tmp_path_factory.mktemp('methods'))
  yield made
  made.close()


@every_method
def test_it_trains(name, shared, tmp_path, quick_compile):
  config = _small(name)
  if not any(s.partition(':')[0] == 'rl' for s in config.stages):
    pytest.skip('its stage has a test of its own')
  parts = shared.of(config, tmp_path)
  stage, host = ReinforcementStage(parts, 'rl'), HostState()
  state = stage.begin(LearnerState(shared.policy(parts), {}, np.int32(0)), host)
  # As `warm_up` does, so that it compiles once; the sampler's shapes compile when they are used.
  batch, used = stage._pack([])
  stage._update = stage._update.lower(state, batch, np.int32(used)).compile()
  for step in range(2):
    state, metrics = stage.step(state, host)
    assert metrics.get('applied') == 1.0, 'there was nothing to learn'
    assert all(np.isfinite(v) for v in metrics.values() if isinstance(v, float)), metrics
    # Sampler and learner agree on what was drawn; what a memory gives back an earlier policy drew.
    assert metrics['log_prob_gap_max'] < 1e-4 or (step and len(config.rl.memory))
    host.step, host.stage_step = step + 1, step + 1


def test_training_and_rollout_name_no_method():
  words = {name.lower() for name in _NAMES} | {re.sub(r'\W+', '_', _module(n).METHOD['title'].lower()) for n in _NAMES}
  found = []
  for path in sorted(p for package in ('training', 'rollout') for p in (_ROOT / 'agentrl' / package).rglob('*.py')):
    names = {n for node in ast.walk(ast.parse(path.read_text())) for n in _words(node)}
    found += [f'{path.name}: {name}' for name in sorted(names & words)]
  assert found == []


def _words(node):
  """Imported names, and texts that are a single word: what code could decide by."""
  if isinstance(node, ast.alias):
    yield node.name.rpartition('.')[2].lower()
  elif isinstance(node, ast.Constant) and isinstance(node.value, str):
    yield node.value.lower()
