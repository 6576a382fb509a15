"""The environment all tests run in: CPU, eight devices, no silent broadcasting between ranks.

XLA reads its flags when jax starts, so they are set before anything imports it. Setting
JAX_PLATFORMS=cuda or tpu in the environment runs the tests there instead.
"""

from __future__ import annotations

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# As an environment variable rather than jax.config, so that host-only tests need not import jax and
# the processes that tests start inherit it.
os.environ.setdefault('JAX_NUMPY_RANK_PROMOTION', 'raise')

import hypothesis  # noqa: E402  (the variables above come first)

# Compiling and shrinking take longer than any deadline; the seed is fixed so that a run repeats.
hypothesis.settings.register_profile('ci', deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile('thorough', deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))
