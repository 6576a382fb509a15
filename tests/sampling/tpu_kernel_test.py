"""The TPU's kernels, in interpret mode, against the plain products of `cache`, whose values are the ones expected."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.sampling import cache as caches
from agentrl.sampling import functions, tpu_kernel
from agentrl.sampling import sampler as samplers
from agentrl.sampling import speculation as speculations
from agentrl.sharding import mesh as meshes

CONFIG = ModelConfig(vocab_size=50, num_layers=2, width=16, ff_width=24, num_heads=4, num_kv_heads=2, head_dim=64)
K, G, DH, P, B, SLOTS = 2, 2, 64, 128, 3, 4
STARTS, COUNTS, T = np.array([0, 120, 250, 0], np.int32), np.array([40, 40, 9, 0], np.int32), 40
LENGTHS = np.array([384, 130, 0, 256], np.int32)
ALONE = tpu_kernel.TpuKernels(interpret=True)
# As a TPU works: copies take their time, and memory that nothing was written to is not a number.
AS_TPU = tpu_kernel.TpuKernels(interpret=pltpu.InterpretParams(detect_races=True))


pytestmark = pytest.mark.usefixtures('quick_compile')


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Several tiles, parts of tiles and fetches even of small arrays."""
  for name, value in dict(TILE=48, PART=32, ROWS_KEYS=2 * P, MOST_FETCHED=2).items():
    monkeypatch.setattr(tpu_kernel, name, value)


@functools.cache
def noise(*shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 2, dtype)


def near(got, want, tolerance):
  assert np.isfinite(got).all()
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=tolerance)


def with_blocks(cache, blocks):
  """A ninth of the cache, so that scores are small, and empty blocks behind, so that devices have as many each."""
  return jax.tree.map(lambda x: jnp.pad(x / 9, [(0, blocks - x.shape[0])] + [(0, 0)] * 3), cache)


class Rows:
  """Queries of four contexts: at the beginning, over the end of a block, fewer than there is room for, none."""

  def __init__(self, pages, dtype='float32', heads=K):
    lab = pages(dataclasses.replace(CONFIG, num_kv_heads=heads, compute_dtype=dtype), SLOTS, B, P, 1)
    self.cache = with_blocks(lab.noise(), 16)
    self.tables = jnp.asarray(lab.tables)
    self.positions = jnp.asarray(STARTS[:, None] + np.arange(T, dtype=np.int32))
    self.q = noise(SLOTS, T, heads, G, DH, dtype=dtype)
    self.behind = jnp.where(jnp.arange(B)[None] * P < (STARTS + COUNTS)[:, None], self.tables, 10**6)  # no such block

  def attend(self, using=None, window=0, sinks=None, scale=0.0):
    def run(q, keys, values):
      lengths = jnp.asarray(STARTS + COUNTS)
      read = using and using.rows(keys, values, self.behind, self.positions, lengths, window)
      return caches.attend_rows(q, keys, values, self.tables, self.positions, jnp.max(lengths), window=window, scale=scale,
                                sinks=sinks, read=read)

    out = jax.jit(run)(self.q, self.cache.keys[0], self.cache.values[0])
    assert np.isfinite(out).all()
    return np.asarray(out)[np.arange(T) < COUNTS[:, None]]


class Slots:
  """Queries of four slots: with all blocks full, with a part of one, with none, and one that shares its first block."""

  def __init__(self, pages, width=1, shared=(), dtype='float32', heads=K):
    lab = pages(dataclasses.replace(CONFIG, num_kv_heads=heads, compute_dtype=dtype), SLOTS, B, P, 8)
    self.cache = with_blocks(lab.noise(), 16)
    reading = lab.reading(LENGTHS, shared)
    more = 16 - lab.blocks
    self.reading = jax.tree.map(jnp.asarray, reading._replace(
        owners=np.pad(reading.owners, (0, more), constant_values=SLOTS), fills=np.pad(reading.fills, (0, more)),
        starts=np.pad(reading.starts, (0, more))))
    self.positions = jnp.asarray(LENGTHS[:, None] + 2 + np.arange(width, dtype=np.int32))
    self.q = noise(SLOTS, width, heads, G, DH, dtype=dtype)
    self.fresh = noise(SLOTS, heads, DH, 8, dtype=dtype, seed=1), noise(SLOTS, heads, 8, DH, dtype=dtype, seed=2)

  def attend(self, using=None, window=0, sinks=None):
    def run(q, keys, values, reading):
      plans = using and using.plan(reading, first, (window,), self.q.shape[1] * G, self.cache)
      own = using and using.slots(keys, values, plans, self.positions, first, window)
      return caches.attend(q, keys, values, *self.fresh, reading, self.positions, first, window=window, sinks=sinks,
                           own=own)

    first = jnp.asarray(LENGTHS)
    return np.asarray(jax.jit(run)(self.q, self.cache.keys[0], self.cache.values[0], self.reading))


@pytest.mark.parametrize('window, with_sinks', [(0, False), (50, True), (130, True)])
def test_rows_equal_the_plain_ones(pages, window, with_sinks):
  case, sinks = Rows(pages), noise(K, G) if with_sinks else None
  want = case.attend(None, window, sinks, 0.1)
  near(case.attend(ALONE, window, sinks, 0.1), want, 2e-6)
  # What is compared depends on all of it.
  assert not with_sinks or np.abs(want - case.attend(None, window, None, 0.1)).max() > 1e-3
  assert not window or np.abs(want - case.attend(None, 0, sinks, 0.1)).max() > 1e-3


@pytest.mark.parametrize('window, width, shared', [(0, 1, ()), (131, 1, (0,)), (140, 3, (0, 1))])
def test_slots_equal_the_plain_ones(pages, window, width, shared):
  case, sinks = Slots(pages, width, shared), noise(K, G)
  near(case.attend(ALONE, window, sinks), case.attend(None, window, sinks), 2e-6)


@pytest.mark.parametrize('kind', [Rows, Slots])
def test_bfloat16_rounds_as_the_plain_ones_do(pages, kind):
  case = kind(pages, dtype='bfloat16')
  exact = np.asarray(kind(pages).attend(), np.float32)
  got, want = (np.asarray(case.attend(using), np.float32) for using in (ALONE, None))
  # Weights are rounded to 8 bits before they meet the values either way, but relative to other largest scores.
  assert np.abs(got - want).max() < 2**-5 * np.abs(exact).max()


@pytest.mark.parametrize('kind', [Rows, Slots])
def test_on_memory_like_a_tpus_nothing_is_read_before_it_is_there(pages, kind):
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # pylint: disable=g-import-not-at-top
  case = kind(pages)
  near(case.attend(AS_TPU, 130), case.attend(None, 130), 2e-6)
  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize('kind, shape', [
    (Rows, dict(tensor=4)), (Rows, dict(data=2, tensor=2, expert=2)), (Slots, dict(data=2, tensor=2, expert=2))])
def test_on_a_mesh_each_device_reads_its_own_heads_and_blocks(pages, kind, shape):
  case, sinks = kind(pages, heads=4), noise(4, G)
  want = case.attend(None, 140, sinks)
  mesh = meshes.make_mesh(shape, jax.devices()[:np.prod(list(shape.values()))])
  where = samplers.cache_sharding(dataclasses.replace(CONFIG, num_kv_heads=4), case.cache.blocks, mesh)
  assert tuple(where.spec)[1] == 'tensor'
  case.cache = jax.device_put(case.cache, where)
  near(case.attend(tpu_kernel.TpuKernels(where, interpret=True), 140, sinks), want, 2e-6)


# ---- the functions that use them ----------------------------------------------------------------


@functools.cache
def view(config):
  rng = np.random.default_rng(1)
  draw = lambda s: (float(s.scale is None) + (s.scale or 0.2) * rng.normal(size=s.shape)).astype(np.float32)
  return functions.sampler_view(
      jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec)), config)


@pytest.mark.parametrize('speculation', [None, speculations.Speculation(2)], ids=['', 'speculation'])
def test_extend_and_decode_come_to_the_same_draws(pages, speculation):
  windows = (131,) if speculation else (0, 131)
  config = dataclasses.replace(CONFIG, num_layers=len(windows), windows=windows, attention_sinks=True)
  lab, tokens = pages(config, SLOTS, B, P, 6), np.random.default_rng(0).integers(0, 50, (SLOTS, 3 * P)).astype(np.int32)
  tables, lengths = jnp.asarray(lab.tables), jnp.asarray([300, 130, 5, 255], jnp.int32)
  nothing = jnp.zeros(SLOTS, jnp.int32)

  def run(using):
    extend = jax.jit(functools.partial(functions.extend, config=config, kernels=using))
    cache = extend(view(config), lab.noise(), tokens[:, :256], nothing, jnp.minimum(lengths, 256), tables)
    cache = extend(view(config), cache, np.roll(tokens, -256, 1)[:, :256], nothing + 256, jnp.maximum(lengths - 256, 0),
                   tables)
    decode, history = functools.partial(functions.decode, steps=6), ()
    if speculation:
      decode, history = functools.partial(speculations.decode, steps=2, speculation=speculation), (tokens,)
    return jax.jit(functools.partial(decode, config=config, kernels=using))(
        view(config), cache, lab.reading(np.asarray(lengths), (0,)), jnp.asarray(tokens[:, 320]), lengths,
        jnp.asarray([6, 6, 0, 4], jnp.int32), jnp.zeros((SLOTS, 2), jnp.uint32) + jnp.arange(2, dtype=jnp.uint32)[None],
        jnp.full((SLOTS, 2), -1, jnp.int32), jnp.int32(0), *history)

  (cache, out), (want_cache, want) = run(ALONE), run(None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), cache, want_cache)
  np.testing.assert_array_equal(out.counts, want.counts)
  for slot, count in enumerate(np.asarray(want.counts)):
    np.testing.assert_array_equal(out.tokens[slot, :count], want.tokens[slot, :count])
    np.testing.assert_allclose(out.log_probs[slot, :count], want.log_probs[slot, :count], atol=1e-5)
