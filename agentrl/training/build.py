"""From a config to the parts of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
from typing import Any, Callable

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from agentrl.algorithms import OBJECTIVES, schedules
from agentrl.core import registry
from agentrl.core.types import Message
from agentrl.data import base as data
from agentrl.envs import base as envs
from agentrl.models import attention
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, num_params, param_axes
from agentrl.rewards import base as rewards
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine
from agentrl.rollout.store import TrajectoryStore
from agentrl.sampling.constrain import Grammar
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.sampler import Sampler
from agentrl.sampling.speculation import Speculation
from agentrl.sharding import exchange
from agentrl.sharding import mesh as meshes
from agentrl.tokens import chat, formats
from agentrl.tokens import tokenizer as tokenizers
from agentrl.tools import base as tools
from agentrl.tools import executor as executors
from agentrl.training import demonstrations
from agentrl.training.init_from import check_tokenizer, copy_tokenizer, load_params
from agentrl.training.watch import Timelines

TOKENIZER_NAME = 'tokenizer.model'
# Where rollout.seats is 0. On GPUs a step reads all of the cache, what waits included.
SEATS_A_SLOT = {'gpu': 1, 'cpu': 4, 'tpu': 4}


@dataclasses.dataclass
class Parts:
  """What a run is made of; see `build`. Parts that are made on first use are cached properties."""

  config: ConfigDict
  workdir: pathlib.Path
  model: ModelConfig
  mesh: jax.sharding.Mesh
  tokenizer: tokenizers.Tokenizer
  template: chat.ChatTemplate
  tools: list[tools.Tool]
  call_format: Any
  executor: executors.Executor
  train_source: Any
  test_source: Any
  reward: Any
  system_prompt: str
  timelines: Timelines

  def __post_init__(self):
    self._engines: dict[SamplingParams, Engine] = {}
    self._closing = contextlib.ExitStack()

  @functools.cached_property
  def grammar(self) -> Grammar | None:
    """What turns may be; None where nothing is constrained."""
    if not self.config.rollout.constrain:
      return None
    ends = [self.tokenizer.encode(stop, allow_markers=True)[0] for stop in self.template.stops]
    return Grammar(self.call_format, self.schemas, self.tokenizer, ends)

  @property
  def schemas(self) -> list[dict[str, Any]]:
    """The tools as the system message lists them."""
    return _schemas(self.tools)

  @functools.cached_property
  def environment(self) -> Any:
    """Where tasks are attempted."""
    return self._environment(self.executor)

  @functools.cached_property
  def environment_without_tools(self) -> Any:
    """The same, where every call is answered by a refusal."""
    return self._environment(executors.Executor(self.tools, disabled=True))

  def _environment(self, executor):
    return envs.make(self.config.environment.name, executor=executor, call_format=self.call_format,
                     max_turns=self.config.environment.max_turns, system_prompt=self.system_prompt,
                     end_markers=self.template.stops)

  def engine(self, sampling: SamplingParams) -> Engine:
    """Returns the engine that samples so, with `rollout.policies`; the same one each time.

    Raises:
      ValueError: if one of them is no policy of this run's shape and tokenizer.
    """
    if sampling not in self._engines:
      r = self.config.rollout
      speculation = Speculation(r.speculate, r.speculate_ngram) if r.speculate else None
      sampler = Sampler(self.model, slots=r.slots, context=r.context_tokens, chunk=r.chunk, sampling=sampling,
                        capacities=r.capacities or None, token_buckets=r.token_buckets or None, block=r.block,
                        seats=r.seats or SEATS_A_SLOT[jax.default_backend()] * r.slots, room=r.room,
                        mesh=self.sampler_mesh, speculation=speculation, constrained=r.constrain)
      for name, folder in r.policies.items():
        key = f'rollout.policies.{name}'
        check_tokenizer(folder, pathlib.Path(self.config.tokenizer.path or self.workdir / TOKENIZER_NAME), key)
        sampler.set_params(load_params(folder, self.init_params(), key), name)
      limits = Limits(turn_tokens=r.turn_tokens, trajectory_tokens=r.trajectory_tokens,
                      context_tokens=r.context_tokens, turns=self.config.environment.max_turns,
                      calls=r.trajectory_calls, seconds=r.trajectory_seconds)
      self._engines[sampling] = Engine(sampler, self.tokenizer, limits=limits, seed=self.config.seed,
                                       grammar=self.grammar, priorities=r.priorities, patience=r.patience,
                                       parked_bytes=r.parked_megabytes << 20)
    return self._engines[sampling]

  @property
  def shares_prefixes(self) -> bool:
    """Whether rows may hold what sequences begin with once, see `packing.plan_rows`."""
    return self.config.train.share_prefixes and attention.shares(self.model, self.config.train.row_length)

  @functools.cached_property
  def sampler_mesh(self) -> jax.sharding.Mesh | None:
    """Devices of this process as the sampler uses them; None for the learner's mesh as it is."""
    shape = dict(self.config.rollout.mesh)
    if self.config.rollout.devices:
      return meshes.make_mesh(shape or {'data': -1}, jax.devices()[-self.config.rollout.devices:])
    return meshes.make_local_mesh(shape, self.mesh) if shape or exchange.count() > 1 else None

  def store(self, folder: str, pieces: bool = True) -> TrajectoryStore:
    """Returns trajectories on disk, in a folder of the workdir; only the first process writes there."""
    piece = (lambda i: self.tokenizer.pieces([i])[0]) if pieces else None
    return TrajectoryStore(self.workdir / folder, piece, writes=exchange.is_first())

  def demonstrations(self) -> list[demonstrations.Chat]:
    """Returns the cold start's chats."""
    return _demonstrations(self.config, self.workdir, self.train_source, self.executor, self.call_format)

  def init_params(self) -> Any:
    """Returns new parameters, sharded over the mesh."""
    if self.config.model.checkpoint:
      return _from_checkpoint().load_params(self.config, self.tokenizer, self.model.value_head, self.mesh)
    init = functools.partial(init_params, self.model)
    key = jax.random.key(self.config.seed)
    shapes = jax.eval_shape(init, key)
    return jax.jit(init, out_shardings=meshes.shardings(param_axes(self.model), shapes, self.mesh))(key)

  def on_close(self, callback: Callable[[], Any]):
    """Has `close` call a function first."""
    self._closing.callback(callback)

  def close(self):
    """Ends threads and worker processes."""
    self._closing.close()
    for engine in self._engines.values():
      engine.close()
    self.executor.close()


def build(config: ConfigDict, workdir: str | os.PathLike, timelines: Timelines | None = None) -> Parts:
  """Returns the parts of a run, checked against each other.

  Writes the data set and the tokenizer on the first call for a workdir.

  Args:
    config: See configs/base.py.
    workdir: The run's folder.
    timelines: Takes those of rollouts; None for a writer of the last one.
  Raises:
    ValueError: if settings do not go together, naming them; also where a part refuses its own.
  """
  _check(config)
  workdir = pathlib.Path(workdir)
  mesh = meshes.make_mesh(dict(config.mesh), _learner_devices(config.rollout.devices))
  named_tools = [registry.call(f'tools.options.{name}', tools.TOOLS.get(name), dict(config.tools.options.get(name, {})))
                 for name in config.tools.names]
  published = config.model.checkpoint
  call_format = (_from_checkpoint().call_format(config, named_tools) if published else
                 formats.make(config.tools.call_format, named_tools))
  sources = {split: _source(config, workdir, split) for split in ('train', 'test')}
  reward = make_reward(config)
  for split, source in sources.items():
    for i in range(len(source)):
      reward.check(source[i], split)
  executor = executors.Executor(
      named_tools, limits=executors.Limits(timeout=config.tools.timeout, output=config.tools.output))
  system_prompt = chat.describe_tools(_schemas(named_tools))
  if published:
    tokenizer, template = _from_checkpoint().chat(config, call_format, _schemas(named_tools))
    system_prompt = _from_checkpoint().system_prompt(template, call_format, _schemas(named_tools))
    model = _from_checkpoint().model_config(config, tokenizer, needs_value_head(config))
  else:
    tokenizer = _tokenizer(config, workdir, functools.partial(
        _demonstrations, config, workdir, sources['train'], executor, call_format), call_format, named_tools)
    template = chat.ChatTemplate(tokenizer, call_format.stops)
    model = new_model_config(config, tokenizer.vocab_size)
  _check_prompts(config, sources, template, system_prompt)
  _check_mesh(model, mesh)
  logging.info('Policy of %d parameters on %d device(s), vocabulary %d', num_params(model), mesh.size,
               tokenizer.vocab_size)
  parts = Parts(config, workdir, model, mesh, tokenizer, template, named_tools, call_format, executor,
                sources['train'], sources['test'], reward, system_prompt, timelines or Timelines(workdir))
  _ = parts.grammar  # tools that no grammar can be made for are refused here
  return parts


def _from_checkpoint() -> Any:
  """The module for published checkpoints; what it imports comes with the extra 'hf'."""
  try:
    from agentrl.training import from_checkpoint  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ValueError(f"model.checkpoint needs {error.name}: pip install -e '.[hf]'") from error
  return from_checkpoint


def make_objective(config: ConfigDict) -> Any:
  """Returns the objective of the RL stage, checked against the rest of the config."""
  objective = registry.call('rl.options', OBJECTIVES.get(config.rl.algorithm), config.rl.options.to_dict())
  c = config.rl
  objective.check(group_size=c.group_size, value_head=objective.needs_values, reference=c.reference,
                  updates=c.minibatches * c.epochs, recomputed=c.recompute_behaviour)
  if objective.min_group < 2 and any(s.get('name') == 'drop_zero_std' for s in config.rl.select):
    raise ValueError("rl.select 'drop_zero_std' compares the rewards of a group's samples and cannot go with objective "
                     f"{objective.name!r}, which learns from single ones; leave it out, or take an advantage such as 'z'")
  return objective


def new_model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
  """Returns the shape of a policy that starts from random parameters."""
  settings = {name: value for name, value in config.model.items() if name != 'checkpoint'}
  return ModelConfig(vocab_size=vocab_size, value_head=needs_value_head(config), **settings)


def make_reward(config: ConfigDict) -> rewards.Reward:
  """Returns the reward of a config; any of its numbers may be a schedule."""
  return rewards.make(config.reward.name, schedules.on_host(config.reward.weights.to_dict()),
                      [schedules.on_host(shaping) for shaping in config.reward.shapings])


def needs_value_head(config: ConfigDict) -> bool:
  """Whether the RL stage, if there is one, reads values."""
  return any(s.partition(':')[0] == 'rl' for s in config.stages) and make_objective(config).needs_values


def _check(config: ConfigDict):
  r, t = config.rollout, config.train
  envs.ENVIRONMENTS.get(config.environment.name)
  needs_value_head(config)
  if t.row_length < r.context_tokens:
    raise ValueError(f'train.row_length={t.row_length} is below rollout.context_tokens={r.context_tokens}: '
                     'a trajectory would not fit a row; raise the first or lower the second')
  if config.rl.prompts % config.rl.minibatches:
    raise ValueError(f'rl.minibatches={config.rl.minibatches} does not divide rl.prompts={config.rl.prompts}')
  if config.sft.batch_rows % t.micro_rows and t.micro_rows < config.sft.batch_rows:
    raise ValueError(f'train.micro_rows={t.micro_rows} does not divide sft.batch_rows={config.sft.batch_rows}')


def _learner_devices(sampling: int) -> list[jax.Device] | None:
  """Returns the devices that `sampling` of them, the last, leave; None for all."""
  if not sampling:
    return None
  if exchange.count() > 1 or not 0 < sampling < jax.device_count():
    raise ValueError(f'rollout.devices={sampling} must leave at least 1 of the {jax.device_count()} devices of '
                     f'{exchange.count()} process(es) for the learner, in a run of one process; set it to 0 to share')
  return jax.devices()[:-sampling]


def _check_mesh(model: ModelConfig, mesh: jax.sharding.Mesh):
  """Refuses a mesh that does not divide what it is to split of the policy."""
  shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
  meshes.check_divides(param_axes(model), shapes, mesh)


def _source(config: ConfigDict, workdir: pathlib.Path, split: str) -> Any:
  d = config.data
  settings = dict(d.options)
  if d.source == 'reasoning_gym':
    settings.update(data_dir=d.dir or str(workdir / 'data'), train_per_family=d.train_per_family,
                    test_per_family=d.test_per_family, split=split, seed=config.seed)
  elif 'path' not in settings and f'{split}_path' in settings:
    paths = {k: settings.pop(k) for k in ('train_path', 'test_path') if k in settings}
    settings['path'] = paths[f'{split}_path']
  factory = data.SOURCES.get(d.source)
  if 'split' in inspect.signature(factory).parameters:
    settings['split'] = split
  return registry.call('data.options', factory, settings)


def _schemas(named_tools: list[tools.Tool]) -> list[dict[str, Any]]:
  return [{'name': t.name, 'description': t.description, 'parameters': t.parameters} for t in named_tools]


def _demonstrations(config: ConfigDict, workdir: pathlib.Path, source: Any, executor: executors.Executor,
                    call_format: Any) -> list[demonstrations.Chat]:
  order = np.random.default_rng(config.seed).permutation(len(source))[:config.sft.traces]
  tasks = [source[int(i)] for i in order]
  return demonstrations.read_or_write(
      workdir, config.sft.demonstrator, tasks, executor, call_format, seed=config.seed,
      share_right=config.sft.share_right, options=config.sft.options.to_dict())


def _tokenizer(config: ConfigDict, workdir: pathlib.Path, chats: Callable[[], list[demonstrations.Chat]],
               call_format: Any, named_tools: list[tools.Tool]) -> tokenizers.Tokenizer:
  path = pathlib.Path(config.tokenizer.path or workdir / TOKENIZER_NAME)
  if config.checkpoint.init_from and not config.tokenizer.path:
    copy_tokenizer(config.checkpoint.init_from, path)
  if path.exists() or config.tokenizer.path:
    return tokenizers.Tokenizer.load(str(path))
  texts = [m.content for messages in chats() for m in messages]
  # The listing stands before every chat, so it should be few pieces.
  texts += [chat.describe_tools(_schemas(named_tools))] * 1_000
  try:
    tokenizer = tokenizers.train_tokenizer(
        texts, markers=call_format.markers, vocab_size=config.tokenizer.vocab_size,
        digit_group=config.tokenizer.digit_group, isolated=(*tokenizers.ISOLATED, *config.tokenizer.isolated))
  except RuntimeError as error:  # what sentencepiece raises for any setting that it cannot follow
    raise ValueError(f'tokenizer.vocab_size={config.tokenizer.vocab_size} does not suit the text: {error}') from error
  path.parent.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(path))
  return tokenizer


def _check_prompts(config: ConfigDict, sources: Any, template: chat.ChatTemplate, system_prompt: str):
  """Refuses a data set with a prompt that leaves no room for an answer."""
  limit = config.rollout.context_tokens
  system = (Message('system', system_prompt),) if system_prompt else ()
  for split, source in sources.items():
    for i in range(len(source)):
      task = source[i]
      n = len(template.render((*system, *task.messages), add_generation_prompt=True))
      if n >= limit:
        raise ValueError(f'the prompt of {split} task {task.id!r} has {n} tokens, which leaves no room in '
                         f'rollout.context_tokens={limit}; raise it, or leave the task out')
