"""A run's folder made by the real writer and the real store, from invented numbers."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest

from agentrl.core import types
from agentrl.metrics import timelines
from agentrl.metrics import writers
from agentrl.rollout import store

HOSTILE = ('</span><script src="https://evil.example/x.js">alert(1)</script>'
           '<img src=x onerror="alert(2)"> & "q" \'s\'')
FAMILIES = ('gcd', 'lcm', 'chain_sum', 'base_conversion', 'letter_counting')


class Vocabulary:
  """Ids of words and markers, as they turn up."""

  def __init__(self):
    self._ids: dict[str, int] = {}

  def encode(self, text: str) -> list[int]:
    pieces = re.findall(r'<\|\w+\|>|</?call>|\n|[▁ ]?\w+|.', text)
    return [
        self._ids.setdefault('<0x0A>' if p == '\n' else p.replace(' ', '▁'), len(self._ids))
        for p in pieces
    ]

  def piece(self, token: int) -> str:
    return list(self._ids)[token]


def make_trajectory(vocabulary: Vocabulary,
                    rng,
                    question: int,
                    sample: int,
                    skill: float,
                    output: str | None = None) -> types.Trajectory:
  a, b = int(rng.integers(10, 999)), int(rng.integers(10, 999))
  family = FAMILIES[question % len(FAMILIES)]
  task = types.Task(f'{family}/{question}', 'reasoning',
                    (types.Message('user', f'What is {a} + {b}?'),), a + b, {'family': family})
  good = bool(rng.random() < skill)
  code = f'print({a} + {b})' if good else f'print({a} - {b}' if sample % 2 else f'print({a} * {b})'
  ok = code.endswith(')')
  answer = output or (str(a + b if good else a *
                          b) if ok else 'SyntaxError: \'(\' was never closed')
  trajectory = types.Trajectory(task,
                                sample,
                                str(question),
                                seed=0,
                                seconds=float(rng.exponential(0.4)))
  segment = trajectory.segments[0]
  segment.append_forced(
      vocabulary.encode(f'<|system|>Use the tool.\n<|user|>What is {a} + {b}?\n<|assistant|>'), 0)

  def sample_text(text, turn):
    tokens, start = vocabulary.encode(text), len(segment)
    surprise = rng.exponential(0.9 * (1.05 - skill), len(tokens))
    segment.append_sampled(tokens, -surprise, surprise * rng.uniform(0.5, 1.5, len(tokens)), turn)
    return start, len(segment)

  start, end = sample_text(f'I compute it.\n<call>{code}</call>', 0)
  result = types.ToolResult((types.Part('text', answer),), ok, None if ok else 'raised',
                            float(rng.exponential(0.01)))
  trajectory.turns.append(
      types.Turn(0, 0, start, end, code, 'stop', (types.ToolCall('python', {'code': code}),),
                 (result,)))
  segment.append_forced(vocabulary.encode(f'\n<|tool|>{answer}\n<|assistant|>'), 1)
  finished = bool(rng.random() < 0.85)
  start, end = sample_text(
      f'The answer is {answer[:12]}' + ('<|end|>' if finished else ' and and and and'), 1)
  trajectory.turns.append(types.Turn(1, 0, start, end, '', 'stop' if finished else 'length'))
  trajectory.status = types.Status.FINISHED if finished else types.Status.LENGTH
  trajectory.boundary = None if finished else types.Boundary.POLICY
  trajectory.answer = answer[:12] if finished else None
  trajectory.rewards = {
      'correct': float(good and finished),
      'format': 0.1,
      'total': float(good and finished) + 0.1
  }
  return trajectory


def _sft_values(step: int, rng) -> dict[str, float]:
  return {
      'loss': 0.4 + 3.6 * np.exp(-step / 60) + rng.normal(0, 0.05),
      'token_accuracy': 0.9 - 0.7 * np.exp(-step / 70),
      'tokens_per_second': 17500 + rng.normal(0, 300),
      'seconds': 0.9
  }


def _rl_values(step: int, rng) -> dict[str, float]:
  done = 1 - np.exp(-step / 25)
  success = float(np.clip(0.55 + 0.4 * done + rng.normal(0, 0.03), 0, 1))
  return {
      'success': success,
      'reward': success + 0.1,
      'reward_std': 0.3 * (1 - done) + 0.05,
      'entropy': 0.5 - 0.35 * done,
      'calls_per_task': 1.2 - 0.15 * done,
      'failed_call_rate': 0.2 * (1 - done) + 0.01,
      'response_tokens': 40 - 6 * done,
      'turns': 2.1,
      'status/finished': 0.8 + 0.15 * done,
      'status/length': 0.2 - 0.15 * done,
      'ratio_max': 1 + 0.3 * done,
      'clip_fraction': 0.02,
      'kl_behaviour': float('nan') if step == 7 else 0.002 * rng.random(),
      'grad_norm': 0.6,
      'loss': rng.normal(0, 0.02),
      'skipped_batches': 0,
      'signal_groups': 20,
      'seconds/rollout': 2.2 + rng.normal(0, 0.2),
      'seconds/update': 1.5,
      'seconds/score': 0.1,
      'seconds/checkpoint': 0.05,
      'tokens_per_second/decode': 3900,
      'tokens_per_second/update': 9000 + rng.normal(0, 200),
      'log_prob_gap_max': 3e-5,
      'decoded_tokens': 8000,
      'tokens_per_second/decode_alone': 5000,
      'tokens_per_second/prefill_alone': 60000,
      'engine_seconds/prefill': 0.2,
      'engine_seconds/decode': 1.6,
      'engine_seconds/idle': 0.1,
      'engine_seconds/linger': 0.05,
      'engine_seconds/host': 0.05,
      'engine/occupancy': 0.8,
      'engine/device_idle_while_ready': 0.05,
      'engine/prefilled_tokens': 12000,
      'engine/shared_tokens': 90000,
      'engine/parked': 3,
      'engine/cache_fill': 0.9,
      'engine/tool_seconds': 5.0,
      'engine/queue_seconds': 2.0
  }


def _eval_values(success: float) -> dict[str, float]:
  values = {
      'success': success,
      'success_ci95_low': success - 0.04,
      'success_ci95_high': success + 0.03,
      'calls_per_task': 1.1,
      'failed_call_rate': 0.05
  }
  return values | {
      f'success/{family}': min(1.0, success + 0.04 * (i - 2)) for i, family in enumerate(FAMILIES)
  }


def make_run(folder: pathlib.Path) -> pathlib.Path:
  """Writes a finished run: cold start, RL with three stored steps, two evaluations."""
  rng = np.random.default_rng(0)
  with writers.MetricsWriter(folder, tensorboard=False) as writer:
    for step in range(200):
      writer.write(step, 'sft', _sft_values(step, rng))
    writer.write(200, 'eval', _eval_values(0.55))
    for step in range(200, 280):
      writer.write(step, 'rl', _rl_values(step - 200, rng))
    writer.write(280, 'eval', _eval_values(0.94))
  vocabulary = Vocabulary()
  trajectories = store.TrajectoryStore(folder / 'trajectories', vocabulary.piece)
  for step, skill in ((200, 0.5), (240, 0.75), (279, 0.9)):
    group = [make_trajectory(vocabulary, rng, i // 4, i % 4, skill) for i in range(16)]
    group[3] = make_trajectory(vocabulary, rng, 9, 3, 0.0, output=HOSTILE)
    total = np.array([t.rewards['total'] for t in group])
    advantages = [[np.where(t.segments[0].sampled, a, 0).astype(np.float32)]
                  for t, a in zip(group, total - total.mean())]
    trajectories.write(step, group, {'advantages': advantages})
  rows = [('device', [('prefill', 0, 1), ('decode', 1, 9), ('idle', 9, 10)])]
  rows += [(f'seat {i}', [('draw', 0, 4 + i % 4), ('wait', 4 + i % 4, 9)]) for i in range(64)]
  timelines.write(folder, 279, 'rl', {'seconds': 2.0, 'bins': 10, 'rows': rows})
  (folder / 'config.json').write_text(
      json.dumps({
          'name': 'quickstart',
          'seed': 0,
          'model': {
              'layers': 4,
              'width': 160
          },
          'stages': [{
              'kind': 'sft',
              'steps': 200
          }],
          'note': HOSTILE
      }))
  (folder / 'summary.json').write_text(
      json.dumps({
          'cold_start': {
              'success': 0.55
          },
          'final': {
              'success': 0.94,
              'success_ci95': [0.9, 0.97],
              'calls_per_task': 1.1,
              'success_without_tool': 0.31,
              'failed_call_rate': 0.012
          },
          'seconds': {
              'total': 655.0,
              'sft': 180.0
          },
          'tokens_per_second': {
              'decode': 3900.0,
              'update': 9000.0
          },
          'compilations_after_warmup': 0
      }))
  return folder


@pytest.fixture(scope='session')
def run_folder(tmp_path_factory) -> pathlib.Path:
  return make_run(tmp_path_factory.mktemp('runs') / 'quickstart')


@pytest.fixture(scope='session')
def hostile() -> str:
  """What a tool printed in the run, and what its config holds as a note."""
  return HOSTILE
