"""A policy small enough for real rollouts in tests; the fixture `tiny` makes it once a session."""

from __future__ import annotations

import contextlib
import functools
from typing import Iterator, Sequence

import jax
import numpy as np

from agentrl.core.types import Message, Task, Trajectory
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.models.transformer import DrawnFrom
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine
from agentrl.sampling.constrain import Grammar
from agentrl.sampling.sampler import Sampler
from agentrl.tokens.tokenizer import train_tokenizer
from agentrl.training.packing import MaskRows, Outcome, Plan, pack, plan_rows, sequences_of

CONTEXT = 96
ROWS = 4
MARKERS = ('<python>', '</python>', '<calculator>', '</calculator>')
TEXTS = ('What is 12 + 34? It is 46.', 'the sum of the numbers is 7', '<python>12+34</python>')


class TinyPolicy:
  """Random weights, a real tokenizer, samplers that are compiled once for all tests.

  The head's scale makes the entropy about 4 of at most 5.8 nats: draws are neither nearly uniform
  nor nearly certain, so an error in the context shows in the log-probs.
  """

  context = CONTEXT

  def __init__(self, markers: Sequence[str] = MARKERS, texts: Sequence[str] = TEXTS):
    self.tokenizer = train_tokenizer(list(texts) * 5, markers=markers, vocab_size=340, digit_group=1)
    self.config = ModelConfig(
        vocab_size=self.tokenizer.vocab_size, num_layers=2, width=32, ff_width=48, num_heads=4,
        num_kv_heads=2, head_dim=8)
    rng = np.random.default_rng(0)
    draw = lambda s: (float(s.scale is None) + (s.scale or 0.2) * rng.normal(size=s.shape)).astype(
        np.float32)
    self.params = jax.tree.map(draw, param_specs(self.config),
                               is_leaf=lambda x: isinstance(x, ParamSpec))
    self.params['final_norm'] *= 2.0
    self._evaluate = jax.jit(functools.partial(transformer.evaluate, config=self.config,
                                               with_entropy=True))
    self._samplers: dict[tuple, Sampler] = {}

  def sampler(self, slots: int = 4, chunk: int = 8,
              capacities: Sequence[int] = (48, CONTEXT), **settings) -> Sampler:
    """Returns a sampler; the same one for the same settings."""
    key = (slots, chunk, tuple(capacities), tuple(sorted(settings.items())))
    if key not in self._samplers:
      self._samplers[key] = Sampler(self.config, slots=slots, context=CONTEXT, chunk=chunk,
                                    capacities=capacities, row_buckets=(slots,), block=16,
                                    token_buckets=(16,), **settings)
      self._samplers[key].set_params(self.params)
    return self._samplers[key]

  @contextlib.contextmanager
  def engine(self, slots: int = 4, *, seed: int = 0, sampler: Sampler | None = None,
             grammar: Grammar | None = None, **limits) -> Iterator[Engine]:
    """Yields an engine, closed at the end."""
    limits = Limits(**{**dict(turn_tokens=12, trajectory_tokens=CONTEXT, context_tokens=CONTEXT,
                              turns=20), **limits})
    engine = Engine(sampler or self.sampler(slots), self.tokenizer, limits=limits, seed=seed, grammar=grammar)
    try:
      yield engine
    finally:
      engine.close()

  def task(self, number: int = 0) -> Task:
    """Returns a task."""
    return Task(f'task-{number}', 'tools', (Message('user', f'What is {number} + 1?'),), number + 1)

  def learner_scores(self,
                     trajectories: Sequence[Trajectory]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (log-probs, entropies) [T] of each trajectory's only segment, evaluated packed.

    They are of the distributions that the tokens were drawn from.
    """
    constrained = any(any(s.masks) for t in trajectories for s in t.segments)
    sequences = sequences_of(trajectories)
    n = len(trajectories)
    outcome = Outcome(np.zeros(n, np.int32), np.zeros(n, np.float32), np.ones(n, np.float32),
                      np.ones(n, bool))
    plan = plan_rows(sequences, CONTEXT).rows
    found = {}
    for at in range(0, len(plan), ROWS):
      part = plan[at:at + ROWS]
      masks = MaskRows(self.config.vocab_size, 256) if constrained else None
      batch, _ = pack(sequences, outcome, rows=ROWS, row_length=CONTEXT, plan=Plan(part), masks=masks)
      got = self._evaluate(self.params, tokens=batch.tokens, positions=batch.positions,
                           segment_ids=batch.segment_ids,
                           drawn_from=DrawnFrom(batch.masks, batch.mask_ids) if constrained else None)
      for i in np.unique(batch.trajectory_ids[batch.trajectory_ids >= 0]):
        # A sequence lies in one row, in order.
        own = batch.trajectory_ids == i
        found[i] = np.asarray(got.log_probs)[own], np.asarray(got.entropies)[own]
    return [found[i] for i in range(n)]
