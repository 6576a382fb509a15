"""Memory that compiling freed."""

import platform
import subprocess
import sys

import pytest

SCRIPT = '''
import contextlib, sys
import jax
from agentrl.metrics import memory
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params
from agentrl.models import transformer

config = ModelConfig(vocab_size=64, num_layers=12, width=32, ff_width=64, num_heads=2, num_kv_heads=1, head_dim=16)
with memory.economical() if sys.argv[1] == 'economical' else contextlib.nullcontext():
  params = init_params(config, jax.random.key(0))
  for length in (8, 16):
    tokens = jax.numpy.zeros((1, length), int)
    loss = lambda p: transformer.hidden_states(p, config, tokens, tokens, tokens + 1).sum()
    jax.block_until_ready(jax.jit(jax.grad(loss))(params))
  print(int(open('/proc/self/statm').read().split()[1]))
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries are left alone')
def test_what_compiling_freed_goes_back_to_the_system():
  pages = {}
  for mode in ('usual', 'economical'):
    done = subprocess.run([sys.executable, '-c', SCRIPT, mode], capture_output=True, text=True, check=True)
    pages[mode] = int(done.stdout)
  assert pages['economical'] < 0.9 * pages['usual']
