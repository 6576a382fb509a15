"""Tests of what processes tell each other, with two that are really started, of two devices each.

Expected values are what each process put in, known to this file from the process's number.
"""

from __future__ import annotations

import sys

import pytest

from agentrl.sharding import exchange

_LONG = exchange.PART_BYTES + 17

_BOTH = f'''
import jax
import numpy as np
from agentrl.sharding import exchange, mesh as meshes, processes

me = processes.start('on').process_id
assert exchange.count() == 2 and exchange.is_first() == (me == 0) and jax.device_count() == 4
exchange.warm_up()

# Short, long and unequal messages arrive as they were sent, in the order of the processes.
assert exchange.gather(b'from %d' % me) == [b'from 0', b'from 1']
sent = [bytes([7]) * {_LONG}, b'']
assert exchange.gather(sent[me]) == sent
assert exchange.any_process(me == 1) and not exchange.any_process(False)
assert exchange.same(b'x') and not exchange.same(b'%d' % me)
exchange.wait()

# What fails on one fails on both, and only there.
try:
  with exchange.together():
    if me == 1:
      raise ValueError('too few tasks')
except ValueError as error:
  assert str(error) == ('process 1: too few tasks' if me == 0 else 'too few tasks')
  assert isinstance(error, exchange.PeerError) == (me == 0)
else:
  raise AssertionError('nothing was raised')
with exchange.together():
  pass

# One after the other.
order = []
def turn():
  order.append(me)
  return exchange.count() + me
assert exchange.in_turn(turn) == 2 + me and order == [me]

# Arrays of the run: put together from what all have, taken apart, and read whole.
mesh = meshes.make_mesh({{'data': 2, 'tensor': 2}})
assert [d.process_index for d in mesh.devices.flat] == [0, 0, 1, 1]
held = meshes.on_run({{'a': np.arange(8.0), 'b': jax.numpy.int32(3)}}, mesh)
assert all(not x.is_fully_addressable for x in jax.tree.leaves(held)) and int(held['b']) == 3
split = jax.device_put(held['a'], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(('data', 'tensor'))))
np.testing.assert_array_equal(exchange.to_host({{'x': split}})['x'], np.arange(8.0))
local = meshes.make_local_mesh({{}}, mesh)
assert dict(local.shape) == {{'data': 1, 'fsdp': 1, 'tensor': 2, 'expert': 1}}
assert {{d.process_index for d in local.devices.flat}} == {{me}}
where = meshes.shardings({{'v': ('vocab',)}}, {{'v': split}}, meshes.every_process(local))
own = meshes.own_part(jax.jit(lambda x: {{'v': 2 * x}}, out_shardings=where)(split), local)
assert own['v'].sharding.mesh == local and own['v'].is_fully_addressable
assert [s.data.shape for s in own['v'].addressable_shards] == [(4,), (4,)]
np.testing.assert_array_equal(own['v'], 2 * np.arange(8.0))
print('process', me, 'is done')
'''


def test_two_processes(start_processes):
  for process in start_processes(2, [sys.executable, '-c', _BOTH], devices=2):
    assert process.wait(300) == 0 and 'is done' in process.said(), process.said()[-3000:]


def test_the_only_process_is_all_of_them():
  assert exchange.gather(b'x') == [b'x'] and exchange.count() == 1 and exchange.is_first()
  assert exchange.any_process(True) and not exchange.any_process(False) and exchange.same(b'x')
  assert exchange.in_turn(lambda: 3) == 3
  with pytest.raises(LookupError, match='mine'):
    with exchange.together():
      raise LookupError('mine')
