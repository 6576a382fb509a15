"""Evaluation stages: held-out tasks, sampled with settings of their own, with and without tools."""

from __future__ import annotations

import copy
from typing import Any, Sequence

import numpy as np

from agentrl.agents import base as agents
from agentrl.agents.react import react
from agentrl.core.types import Iteration, Task
from agentrl.rollout import gather
from agentrl.rollout.engine import Job
from agentrl.rollout.summary import summarize, wilson_interval
from agentrl.sampling.draw import SamplingParams
from agentrl.training.build import Parts
from agentrl.training.stages import STAGES
from agentrl.training.state import HostState, LearnerState


@STAGES.register('eval')
class EvaluationStage:
  """One step: every task `samples` times."""

  steps = 1
  without_tools = False

  def __init__(self, parts: Parts, name: str):
    c = parts.config.eval
    self._parts, self._config, self._name = parts, c, name
    self._engine = parts.engine(SamplingParams(c.temperature, c.top_k, c.top_p))
    if not 1 <= c.tasks <= len(parts.test_source):
      raise ValueError(f'eval.tasks={c.tasks} must be between 1 and the {len(parts.test_source)} held-out tasks; '
                       'lower it or raise data.test_per_family')
    self._store = parts.store('trajectories')
    self._found: dict[str, Any] = {}
    agent = parts.config.agent
    if c.agent and self._agent(parts.environment).max_trajectories(c.samples) != c.samples:
      raise ValueError(f'eval.agent=True cannot go with agent {agent.name!r}, which branches: a task would be counted more '
                       "often than eval.samples says; set eval.agent to False, which takes the plain agent")

  def begin(self, state: LearnerState, host: HostState) -> LearnerState:
    """Returns the state as it is."""
    return state

  def warm_up(self, state: LearnerState):
    """Compiles the sampler's shapes."""
    self._engine.sampler.set_params(state.params)
    self._engine.sampler.warm_up()

  def step(self, state: LearnerState, host: HostState) -> tuple[LearnerState, dict[str, Any]]:
    """Evaluates."""
    parts, c = self._parts, self._config
    environment = parts.environment_without_tools if self.without_tools else parts.environment
    order = np.random.default_rng(0).permutation(len(parts.test_source))[:c.tasks]
    tasks = [parts.test_source[int(i)] for i in order]
    jobs = [Job(task, k, task.id, program) for task in tasks
            for k, program in enumerate(self._programs(environment, task, host))]
    self._engine.sampler.set_params(state.params)
    self._engine.cut()
    trajectories = gather.collect(self._engine, jobs, own=parts.reward.rate, policy_version=host.step)
    metrics = summarize(trajectories)
    low, high = wilson_interval(metrics['success'] * len(trajectories), len(trajectories))
    metrics.update({'success_ci95_low': low, 'success_ci95_high': high})
    families: dict[str, list[float]] = {}
    for t in trajectories:
      families.setdefault(t.task.metadata.get('family', 'all'), []).append(t.rewards.get('success', 0.0))
    metrics.update({f'success/{k}': float(np.mean(v)) for k, v in sorted(families.items())})
    stats, timeline = self._engine.cut()
    metrics.update({**stats.metrics(), 'seconds/rollout': stats.total_seconds})
    parts.timelines.write(host.step, self._name, timeline)
    self._store.write(host.step, trajectories, {'stage': self._name})
    self._found = metrics
    return state, metrics

  def _agent(self, environment: Any) -> agents.Agent:
    c = self._parts.config.agent
    return agents.make(c.name, environment, self._parts.template, c.options.to_dict())

  def _programs(self, environment: Any, task: Task, host: HostState) -> Sequence[agents.Program]:
    """Returns a program a sample: the plain one, or the agent's with the memory that it has, which stays as it is."""
    if not self._config.agent:
      return [react(environment, self._parts.template, task)] * self._config.samples
    memory = copy.deepcopy(host.memory.get('agent', {}))
    return self._agent(environment).programs(task, self._config.samples, Iteration(0, 1, memory))

  def result(self, host: HostState) -> dict[str, Any]:
    """Returns success with its interval, overall and by family, and how tools were used."""
    m = self._found
    kept = ('success', 'calls_per_task', 'failed_call_rate', 'response_tokens', 'entropy')
    return {**{k: m[k] for k in kept}, 'success_ci95': [m['success_ci95_low'], m['success_ci95_high']],
            'tasks': self._config.tasks,
            'by_family': {k.removeprefix('success/'): v for k, v in m.items() if k.startswith('success/')}}


@STAGES.register('eval_without_tools')
class EvaluationWithoutToolsStage(EvaluationStage):
  """The same tasks where every call is refused: what the policy owes to its tools."""

  without_tools = True

  def result(self, host: HostState) -> dict[str, Any]:
    """Returns the success alone, under a name of its own."""
    found = super().result(host)
    return {'success_without_tool': found['success'], 'success_without_tool_ci95': found['success_ci95']}
