"""Which kernels are taken where."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import pytest

from agentrl.models.config import ModelConfig
from agentrl.sampling import cpu_kernel, kernels, tpu_kernel

CONFIG = ModelConfig(vocab_size=50, num_layers=2, width=16, ff_width=24, num_heads=4, num_kv_heads=2, head_dim=64)


@pytest.mark.parametrize('platform, change, block, want', [
    ('tpu', {}, 128, True),
    ('tpu', dict(head_dim=256, attention='splash'), 256, True),
    ('cpu', dict(attention='xla'), 128, False),
    ('gpu', {}, 128, False),
    ('tpu', dict(attention='xla'), 128, False),
    ('tpu', dict(head_dim=80), 128, False),
    ('tpu', {}, 64, False),
])
def test_the_platform_decides_unless_the_config_or_a_shape_does(platform, change, block, want):
  got = kernels.choose(dataclasses.replace(CONFIG, **change), block, None, platform)
  assert got == (tpu_kernel.TpuKernels() if want else None)


def test_where_nothing_is_said_the_devices_decide():
  kinds = {'cpu': cpu_kernel.CpuKernels, 'tpu': tpu_kernel.TpuKernels}
  assert isinstance(kernels.choose(CONFIG, 128, None), kinds.get(jax.default_backend(), type(None)))


def test_who_reads_by_table(monkeypatch):
  config = ModelConfig(vocab_size=8)
  assert kernels.reads_by_table(config, None)
  assert not kernels.reads_by_table(ModelConfig(vocab_size=8, attention='xla'), None)
  said = []
  monkeypatch.setattr(kernels.logging, 'warning', said.append)
  monkeypatch.setattr(cpu_kernel, 'register', lambda: 1 / 0)
  kernels._say.cache_clear()
  assert not kernels.reads_by_table(config, None)
  assert 'ZeroDivisionError' in said[0] and 'plain products, which are slower' in said[0]


def test_without_numba_decoding_goes_on_by_block():
  code = ('import sys; sys.modules["numba"] = None\n'
          'from agentrl.models.config import ModelConfig; from agentrl.sampling import kernels\n'
          'print(kernels.reads_by_table(ModelConfig(vocab_size=8), None))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'False' and 'numba' in done.stderr
