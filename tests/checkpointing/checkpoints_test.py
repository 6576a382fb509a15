"""Checkpoints against kills, damage, other architectures and other meshes."""

from __future__ import annotations

import logging as std_logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agentrl.checkpointing import checkpoints


def _state(step: int):
  """A run's arrays; every element tells the step, so that a mixture of two steps shows."""
  params = {
      'embed': jnp.full((7, 4), step, jnp.float32),
      'layers': [{
          'w': jnp.full((4, 4), step, jnp.bfloat16)
      } for _ in range(2)]
  }
  optimizer = optax.adam(1e-3).init({'embed': params['embed']})
  return {
      'params': params,
      'optimizer': optimizer,
      'none': None,
      'host_copy': np.full(3, step, np.int64),
      'nothing': jnp.zeros((0, 4), jnp.float32),
      'count': jnp.int32(step)
  }


def _assert_equal(got, want):
  chex_like = jax.tree.map(lambda a, b: (type(a), a.dtype, np.array_equal(a, b)), got, want)
  expected = jax.tree.map(lambda b: (type(b), b.dtype, True), want)
  assert chex_like == expected


def _folder(root, step) -> pathlib.Path:
  return root / f'step_{step:08d}'


def _largest(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_what_is_restored_is_what_was_saved(tmp_path):
  with checkpoints.Checkpointer(tmp_path / 'new' / 'folder') as checkpointer:
    assert checkpointer.restore(_state(0)) is None
    host = {'stage': 'rl', 'cursor': {'epoch': 1, 'order': [3, 1, 2]}, 'best': float('inf')}
    checkpointer.save(5, _state(5), host)
    restored = checkpointer.restore(_state(0))  # Waits for the save by itself.
  assert (restored.step, restored.host) == (5, host)
  _assert_equal(restored.arrays, _state(5))


def test_the_newest_few_are_kept_and_a_step_can_be_saved_again(tmp_path):
  with checkpoints.Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(step, _state(step), {})
    checkpointer.save(3, _state(30), {'again': True}, wait=True)
    assert checkpointer.steps() == [2, 3]  # The superseded one does not count as one of the two.
    restored = checkpointer.restore(_state(0))
    assert restored.host == {'again': True} and int(restored.arrays['count']) == 30
    checkpointer.save(4, _state(4), {}, wait=True)
    assert checkpointer.steps() == [3, 4]
    assert len(list(tmp_path.iterdir())) == 2


def test_arrays_may_be_donated_or_changed_once_save_returns(tmp_path):
  bump = jax.jit(lambda x: x + 1, donate_argnums=0)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    arrays = {'device': jnp.zeros(200_000), 'host': np.zeros(200_000)}
    checkpointer.save(0, arrays, {})
    for _ in range(20):
      arrays['device'] = bump(arrays['device'])
    arrays['host'] += 1
    restored = checkpointer.restore(arrays)
  assert not restored.arrays['device'].any() and not restored.arrays['host'].any()


def test_a_resumed_state_compiles_nothing_new(tmp_path):
  step = jax.jit(lambda x: x * 2)
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    state = step(jnp.ones(3))
    checkpointer.save(0, state, {})
    restored = checkpointer.restore(state).arrays
  programs = step._cache_size()
  step(restored)
  assert step._cache_size() == programs


def test_only_arrays_are_stored_and_never_random_keys(tmp_path):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(TypeError, match='leaf rng.a is a random key'):
      checkpointer.save(0, {'rng': {'a': jax.random.key(0)}}, {})
    with pytest.raises(TypeError, match='leaf step is a int'):
      checkpointer.save(0, {'step': 3}, {})
    with pytest.raises(TypeError, match='JSON'):
      checkpointer.save(0, {'w': np.zeros(2)}, {'cursor': object()})
    assert checkpointer.steps() == []


def _truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def _flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize('damage', [_truncate, _flip_a_byte, os.remove])
@pytest.mark.parametrize('which', ['arrays', 'host.json', 'manifest.json'])
def test_damage_falls_back_to_the_checkpoint_before_it_loudly(tmp_path, caplog, damage, which):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, _state(step), {'step': step}, wait=True)
    newest = _folder(tmp_path, 2)
    damage(_largest(newest / which) if which == 'arrays' else newest / which)
    with caplog.at_level(std_logging.ERROR):
      restored = checkpointer.restore(_state(0))
    assert restored.step == 1 and restored.host == {'step': 1}
    _assert_equal(restored.arrays, _state(1))
    said = '\n'.join(r.getMessage() for r in caplog.records if r.levelno == std_logging.ERROR)
    assert str(newest) in said and 'DAMAGED' in said
    assert not newest.exists() and (tmp_path / 'corrupt_step_00000002').is_dir()
    # The run goes on over the same steps, and is not haunted by the damaged folder.
    checkpointer.save(2, _state(2), {'step': 2})
    assert checkpointer.restore(_state(0)).step == 2


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, _state(1), {}, wait=True)
    _truncate(_largest(_folder(tmp_path, 1)))
    for _ in range(2):  # Trying again must not turn it into a fresh start either.
      with pytest.raises(checkpoints.CorruptCheckpointError,
                         match='corrupt_step_00000001.*workdir'):
        checkpointer.restore(_state(0))


@pytest.mark.parametrize('template, names', [
    ({
        'a': np.zeros((2, 3), np.float32),
        'b': np.zeros(5, np.float32)
    }, ['leaf b', r'\(4,\)', r'\(5,\)']),
    ({
        'a': np.zeros((2, 3), np.float32)
    }, ['leaf b', r'\(4,\)', 'this run has none']),
    ({
        'a': np.zeros((2, 3), np.float32),
        'b': np.zeros(4, np.float32),
        'c': np.zeros(6)
    }, ['no leaf c', r'\(6,\)']),
    ({
        'a': np.zeros((2, 3), np.float64),
        'b': np.zeros(4, np.float32)
    }, ['leaf a', 'float32', 'float64']),
])
def test_another_architecture_is_refused_and_not_taken_for_damage(tmp_path, template, names):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, {
          'a': np.zeros((2, 3), np.float32),
          'b': np.zeros(4, np.float32)
      }, {},
                        wait=True)
    with pytest.raises(checkpoints.MismatchError) as error:
      checkpointer.restore(template)
    for name in [*names, 'workdir', 'config']:
      assert error.match(name)
    assert checkpointer.steps() == [1, 2]


def test_the_parameters_alone_can_be_restored(tmp_path):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, _state(1), {})
    template = jax.eval_shape(lambda: {'params': _state(0)['params']})
    restored = checkpointer.restore(template, partial=True)
  _assert_equal(restored.arrays, {'params': _state(1)['params']})


def test_a_save_that_cannot_be_written_is_reported_and_the_last_one_stays(tmp_path, monkeypatch):
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, _state(1), {}, wait=True)

    def full(source, target):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints.os, 'rename', full)
    checkpointer.save(2, _state(2), {})
    with pytest.raises(OSError, match='No space left'):
      checkpointer.save(3, _state(3), {})
    monkeypatch.undo()
    assert checkpointer.restore(_state(0)).step == 1
    checkpointer.save(4, _state(4), {}, wait=True)
    assert checkpointer.steps() == [1, 4]
    assert not list(tmp_path.glob('unfinished_*'))


def _start(script: str, *arguments, **environment) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(script), *map(str, arguments)],
      stdout=subprocess.PIPE,
      text=True,
      env={
          **os.environ, 'JAX_PLATFORMS': 'cpu',
          **environment
      })


_LOOP = """
    import sys
    import numpy as np
    from agentrl.checkpointing import checkpoints
    checkpointer = checkpoints.Checkpointer(sys.argv[1])
    template = {f'leaf{i}': np.zeros(50_000) for i in range(8)}
    restored = checkpointer.restore(template)
    step = restored.step if restored else 0
    while True:
      step += 1
      arrays = {k: np.full(50_000, float(step)) for k in template}
      checkpointer.save(step, arrays, {'cursor': 10 * step})
      print(step, flush=True)
    """


def test_kill_at_random_moments_leaves_a_complete_checkpoint(tmp_path):
  random_delay = random.Random(0)
  template = {f'leaf{i}': np.zeros(50_000) for i in range(8)}
  last = 0
  for _ in range(4):
    process = _start(_LOOP, tmp_path)
    begun = [int(process.stdout.readline()) for _ in range(3)][-1]
    time.sleep(random_delay.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    begun = max([begun, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
      restored = checkpointer.restore(template)
    # A save waits until the one before it is complete, so that only the last one begun can be lost;
    # the next may have begun, and even ended, before it could be printed.
    assert begun - 1 <= restored.step <= begun + 1 and restored.step > last
    assert restored.host == {'cursor': 10 * restored.step}
    for leaf in restored.arrays.values():
      assert (leaf == restored.step).all()
    last = restored.step


def test_one_device_to_eight_and_back(tmp_path):
  script = """
      import sys
      import jax, numpy as np
      from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      from agentrl.checkpointing import checkpoints
      mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('fsdp', 'tensor'))
      shardings = {'w': NamedSharding(mesh, P('fsdp', 'tensor')), 'b': NamedSharding(mesh, P())}
      template = {'w': jax.ShapeDtypeStruct((8, 4), np.float32, sharding=shardings['w']),
                  'b': jax.ShapeDtypeStruct((3,), np.float32, sharding=shardings['b'])}
      with checkpoints.Checkpointer(sys.argv[1]) as checkpointer:
        arrays = checkpointer.restore(template).arrays
        assert {k: v.sharding for k, v in arrays.items()} == shardings
        assert [s.data.shape for s in arrays['w'].addressable_shards] == [(2, 2)] * 8
        assert np.array_equal(arrays['w'], np.arange(32).reshape(8, 4))
        checkpointer.save(2, jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t))(arrays), {})
      """
  arrays = {
      'w': jnp.arange(32, dtype=jnp.float32).reshape(8, 4),
      'b': jnp.arange(3, dtype=jnp.float32)
  }
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, arrays, {}, wait=True)
    process = _start(script, tmp_path, XLA_FLAGS='--xla_force_host_platform_device_count=8')
    assert process.wait(timeout=60) == 0
    restored = checkpointer.restore(arrays)
  assert restored.step == 2
  _assert_equal(restored.arrays, jax.tree.map(lambda x: x + 1, arrays))
  assert restored.arrays['w'].sharding == arrays['w'].sharding


def test_two_processes_write_one_checkpoint(tmp_path):
  script = """
      import sys
      import jax
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
      jax.distributed.initialize(f'localhost:{sys.argv[3]}', 2, int(sys.argv[2]))
      import numpy as np
      from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      from agentrl.checkpointing import checkpoints
      sharding = NamedSharding(Mesh(np.array(jax.devices()), ('fsdp',)), P('fsdp'))
      whole = np.arange(8, dtype=np.float32)
      array = jax.make_array_from_callback((8,), sharding, lambda index: whole[index])
      with checkpoints.Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(1, {'w': array}, {'cursor': 1})
        checkpointer.save(2, {'w': array * 2}, {'cursor': 2})
        restored = checkpointer.restore({'w': array})
        assert restored.step == 2 and restored.arrays['w'].sharding == sharding
        for shard in restored.arrays['w'].addressable_shards:
          assert np.array_equal(shard.data, 2 * whole[shard.index])
      """
  port = 20000 + os.getpid() % 20000
  processes = [_start(script, tmp_path, i, port, XLA_FLAGS='') for i in range(2)]
  assert [p.wait(timeout=60) for p in processes] == [0, 0]
  with checkpoints.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.steps() == [1, 2]
    restored = checkpointer.restore({'w': np.zeros(8, np.float32)})
  assert np.array_equal(restored.arrays['w'], 2 * np.arange(8))
