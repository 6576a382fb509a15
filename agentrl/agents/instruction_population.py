"""A population of instructions that compete for questions: INSPO."""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Message, Task, Trajectory
from agentrl.rollout.session import Session


def draw_probabilities(scores: Sequence[float], temperature: float) -> np.ndarray:
  """Returns how likely each instruction is drawn: softmax(scores / temperature), [n] float64.

  Example:
    >>> draw_probabilities([1.0, 1.0], .5).tolist()
    [0.5, 0.5]
  """
  scaled = np.asarray(scores, np.float64) / temperature
  weights = np.exp(scaled - scaled.max())
  return weights / weights.sum()


@base.AGENTS.register('instruction_population')
class InstructionPopulation(base.Agent):
  """Draws an instruction for each question, for all samples of it, and keeps count of what each is worth.

      P(I_j) = softmax(w_j / temperature),     w_j = mean reward of the rollouts under I_j so far

  One that has not been drawn yet has the largest w of all. Every `every` steps the weakest that was drawn is replaced
  by the next proposal, or dropped when there are none left, as long as two remain. Samples compare within their group,
  that is, under the same question and instruction.

  Source: INSPO, from a page about it.
  Deviation: new instructions come from a list of proposals, in order: there is no model here that reflects on failures
    and writes, verifies and merges them. The rule for w, the number of instructions, temperature and interval were not
    found; all are our choices.
  """

  def __init__(self, environment: Any, template: Any, *, instructions: Sequence[str], proposals: Sequence[str] = (),
               temperature: float = 0.2, every: int = 5, part: str = 'total', seed: int = 0):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      instructions: Texts that the population begins with, shown as a system message; '' shows nothing.
      proposals: What takes the place of those that are dropped.
      temperature: In the unit of the reward, above 0.
      every: Steps between replacements.
      part: Reward that is credited.
      seed: Of the draws.
    Raises:
      ValueError: if there is no instruction, one is listed twice, or a number is out of range.
    """
    texts = [*instructions, *proposals]
    if not instructions or len(set(texts)) != len(texts):
      raise ValueError(f'instructions and proposals must differ, and there must be one instruction: {texts}')
    if not temperature > 0 or every < 1:
      raise ValueError(f'temperature={temperature} must be above 0 and every={every} at least 1')
    self._environment, self._template = environment, template
    self._instructions, self._proposals = tuple(instructions), tuple(proposals)
    self._temperature, self._every, self._part, self._seed = temperature, every, part, seed

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample, all under the instruction drawn for the question."""
    memory = self._memory(iteration)
    population = memory['population']
    means = [_mean(i) for i in population]
    known = [m for m in means if not math.isnan(m)]
    scores = [max(known, default=0.0) if math.isnan(m) else m for m in means]
    rng = np.random.default_rng([self._seed, iteration.step, *task.id.encode()])
    text = population[rng.choice(len(population), p=draw_probabilities(scores, self._temperature))]['text']
    memory['drawn'][task.id] = text
    player = Player(self._environment, self._template, task)
    extra = (Message('system', text),) if text else ()

    async def program(session: Session):
      episode = await player.begin(session, extra)
      try:
        await player.play(session, episode)
      finally:
        await episode.close()

    return [program] * group_size

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Credits rewards to instructions; now and then replaces the weakest."""
    memory = self._memory(iteration)
    by_text = {i['text']: i for i in memory['population']}
    for t in trajectories:
      credited = by_text.get(memory['drawn'].get(t.task.id))
      if credited is not None:
        credited['count'] += 1
        credited['sum'] += t.rewards[self._part]
    memory['drawn'] = {}
    if (iteration.step + 1) % self._every == 0 and memory['pruned_at'] != iteration.step:
      memory['pruned_at'] = iteration.step
      self._replace_weakest(memory)

  def _replace_weakest(self, memory: dict[str, Any]):
    drawn = [i for i in memory['population'] if i['count']]
    left = self._proposals[memory['proposed']:]
    if not drawn or (not left and len(memory['population']) <= 2):
      return
    memory['population'].remove(min(drawn, key=_mean))
    if left:
      memory['population'].append(_fresh(left[0]))
      memory['proposed'] += 1

  def _memory(self, iteration: Iteration) -> dict[str, Any]:
    if 'population' not in iteration.memory:
      iteration.memory.update(population=[_fresh(t) for t in self._instructions], drawn={}, proposed=0, pruned_at=-1)
    return iteration.memory


def _fresh(text: str) -> dict[str, Any]:
  return {'text': text, 'count': 0, 'sum': 0.0}


def _mean(instruction: dict[str, Any]) -> float:
  return instruction['sum'] / instruction['count'] if instruction['count'] else math.nan
