"""Calls that failed are tried again from shortly before them, as a group of their own: THOR's second channel."""

from __future__ import annotations

import asyncio
from typing import Any

from agentrl.agents import base, rounds
from agentrl.agents.player import Player, failed
from agentrl.core.types import Iteration, Status, Task
from agentrl.rollout.session import Mark, Session


@base.AGENTS.register('suffix_resample')
class SuffixResample(base.Agent):
  """Independent samples; then one whose call failed is cut shortly before the call, and the rest is sampled anew.

  The suffixes are rows with a group of their own, '/suffix' behind the group's name, in whose loss only the suffix is.
  Each ends with its turn: what counts is whether its call runs. One that answers instead has none to judge and is left
  out: compared with calls that run, answers would lose, and the policy would call for ever. Parts: 'suffix' is 1 for
  them, 'executes' 1 where every call of the suffix's turn ran; 'flawed' is 1 for other rows in which a call failed, or
  that did not finish.

  One anchor a group, drawn among its rows: no more anchors than questions.

  Source: THOR, code JingMog/THOR: 16 suffixes, cut 100 tokens before the last failed block of code.
  Deviation: the cut stays within its turn, so that an observation is never cut in two; rows short or unboxed are told
    by the status.
  """

  names = ('suffix', 'executes', 'flawed')

  def __init__(self, environment: Any, template: Any, *, suffixes: int = 16, before: int = 100):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      suffixes: Rows of an anchor.
      before: Tokens before the call that are sampled anew with it.
    Raises:
      ValueError: if there are fewer than two suffixes, or `before` is negative.
    """
    if suffixes < 2 or before < 0:
      raise ValueError(f'suffixes={suffixes} must be at least 2, to be compared, and before={before} not negative')
    self._environment, self._template = environment, template
    self._suffixes, self._before = suffixes, before

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size and the suffixes of one anchor."""
    return group_size + self._suffixes

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample."""
    del iteration
    group = _Group(Player(self._environment, self._template, task), group_size, self._suffixes, self._before)
    return [group.root] * group_size


class _Group:
  """The rows of one question."""

  def __init__(self, player: Player, size: int, suffixes: int, before: int):
    self._player, self._suffixes, self._before = player, suffixes, before
    self._left = size
    self._anchors: list[tuple[float, Session, Any, int]] = []

  async def root(self, session: Session):
    """The program of a sample; that of the last one to end starts the suffixes."""
    flawed, anchor = True, None
    try:
      episode = await self._player.begin(session)
      try:
        while not session.finished:
          snapshot = await self._player.ask(episode.snapshot())
          turn = await self._player.turn(session, episode)
          if failed(turn):
            anchor = snapshot, turn
      finally:
        await episode.close()
      flawed = anchor is not None or session.trajectory.status is not Status.FINISHED
    except asyncio.CancelledError:
      self._anchors, anchor = [], None  # The engine is ending things: nothing new may begin.
      raise
    finally:
      session.trajectory.rewards['flawed'] = float(flawed)
      if anchor:
        self._anchors.append((rounds.uniform(session), session, *anchor))
      self._left -= 1
      if not self._left and self._anchors:
        self._resample()

  def _resample(self):
    _, session, snapshot, turn = min(self._anchors, key=lambda a: (a[0], a[1].trajectory.sample))
    cut = max(turn.start, self._player.find_call(session, turn) - self._before)
    [stem] = session.fork(1)
    stem.rollback(Mark(turn.segment + 1, cut, turn.index))
    for suffix in stem.fork(self._suffixes):
      t = suffix.trajectory
      t.group_id, t.loss_from = f'{t.group_id}/suffix', cut
      t.rewards.update(suffix=1.0, executes=0.0)
      suffix.engine.adopt(suffix, self._suffix(snapshot, turn.start))

  def _suffix(self, snapshot: Any, start: int) -> base.Program:
    async def program(session: Session):
      episode = await self._player.restore(snapshot)
      try:
        turn = await session.generate(stops=self._player.stops)
        # The environment is to see the whole turn, of which the suffix is the end.
        turn.start = start
        turn.text = session.engine.tokenizer.decode(session.context.tail(start).tolist())
        answer = None
        if turn.stop_reason == 'stop':
          step = await self._player.ask(episode.step(turn.text, turn.stop_reason))
          session.observe(turn, step.calls, step.results)
          answer = step.answer
          session.trajectory.rewards['executes'] = float(bool(step.results) and not failed(turn))
        if answer is None:
          session.finish(Status.FINISHED, detail='a suffix ends with its turn')
        else:
          session.discard()
      finally:
        await episode.close()
    return program
