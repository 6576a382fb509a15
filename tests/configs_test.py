"""Every config in configs/ loads, agrees with base.py and runs at toy size; those of configs/methods: methods_test.py."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from agentrl.core import config as config_lib
from agentrl.metrics import writers

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_BASE = _ROOT / 'configs' / 'base.py'
_CONFIGS = sorted(p for p in (_ROOT / 'configs').glob('*.py') if p.name != '__init__.py')
_TOY = {
    'data.train_per_family': 12,
    'data.test_per_family': 1,
    'tokenizer.vocab_size': 600,
    'model.num_layers': 1,
    'model.width': 32,
    'model.ff_width': 32,
    'model.num_heads': 2,
    'model.num_kv_heads': 2,
    'model.head_dim': 16,
    'rollout.slots': 8,
    'rollout.turn_tokens': 8,
    'rollout.trajectory_tokens': 16,
    'rollout.context_tokens': 128,
    'rollout.capacities': '()',
    'train.row_length': 192,
    'train.micro_rows': 8,
    'sft.traces': 100,
    'sft.steps': 2,
    'sft.updates_per_step': 1,
    'sft.batch_rows': 8,
    'rl.steps': 2,
    'rl.prompts': 4,
    'rl.group_size': 2,
    'eval.tasks': 8,
}


def _run(config, workdir, *overrides):
  """Runs a config at toy size, in a process of its own."""
  toy = [f'--config.{key}={value}' for key, value in _TOY.items()]
  environment = {**os.environ, 'XLA_FLAGS': ''}
  done = subprocess.run([
      sys.executable, '-m', 'agentrl.main', f'--config={config}', f'--workdir={workdir}', *toy,
      *overrides
  ], cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return writers.read_metrics(workdir), json.loads((workdir / 'summary.json').read_text())


@pytest.mark.parametrize('path', _CONFIGS, ids=lambda p: str(p.relative_to(_ROOT / 'configs')))
def test_config_runs_two_steps_of_each_stage(path, tmp_path, quick_compile):
  config = config_lib.load(path, reference=_BASE)
  lines, summary = _run(path, tmp_path / 'run')
  stages = [text.partition(':')[0] for text in config.stages]
  steps = [stage for stage in stages for _ in range(2 if stage in ('sft', 'rl') else 1)]
  assert [line['stage'] for line in lines] == steps
  assert summary['steps'] == len(lines)
  names = [text.partition(':')[2] for text in config.stages if text.startswith('eval')]
  assert all(summary[name] for name in names)


def test_ppo_with_a_reference_runs_from_the_command_line(tmp_path, quick_compile):
  lines, _ = _run('configs/quickstart.py', tmp_path / 'run', '--config.stages=rl',
                  '--config.rl.algorithm=ppo', '--config.rl.reference=true',
                  '--config.rl.options.kl_coef=0.1', '--config.rl.options.lam=0.95',
                  '--config.rl.select=()')
  assert len(lines) == 2
  for line in lines:
    assert {'kl', 'loss/kl', 'loss/value', 'value/explained_variance'} <= set(line)
    assert line['log_prob_gap_max'] < 1e-4 and line['applied'] == 1
  # At the first step the policy is the reference.
  assert abs(lines[0]['kl']) < 1e-6
