"""Tests of meshes and of the axis table; a policy means the same on one device and on eight."""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from agentrl.models import transformer
from agentrl.models.params import param_axes
from agentrl.sharding import mesh as meshes


def mesh_of(data=1, fsdp=1, tensor=1):
  return meshes.make_mesh(dict(data=data, fsdp=fsdp, tensor=tensor))


def test_axes_left_out_have_one_device_and_one_axis_takes_the_rest():
  assert dict(mesh_of(2, 4).shape) == {'data': 2, 'fsdp': 4, 'tensor': 1, 'expert': 1}
  assert meshes.make_mesh({'fsdp': -1, 'tensor': 2}).shape['fsdp'] == 4
  one = meshes.make_mesh({}, jax.devices()[:1])
  assert one.size == 1 and one.axis_names == meshes.MESH_AXES


@pytest.mark.parametrize('shape, words', [
    (dict(data=3), ('data=3', 'needs 3 devices', 'there are 8')),
    (dict(data=2, fsdp=8), ('data=2', 'fsdp=8', 'needs 16 devices', 'there are 8')),
    (dict(data=-1, tensor=3), ('tensor=3', 'needs 6 devices', 'there are 8')),
    (dict(data=-1, tensor=-1), ('data=-1', 'tensor=-1', 'only one')),
    (dict(data=-1, tensor=0), ('tensor=0', 'at least 1')),
    (dict(data=-2), ('data=-2', 'at least 1')),
    (dict(model=8), ("'model'", 'data, fsdp, tensor, expert')),
])
def test_impossible_meshes_are_refused_with_the_numbers(shape, words):
  with pytest.raises(ValueError) as caught:
    meshes.make_mesh(shape)
  for word in words:
    assert word in str(caught.value)


def test_specs_follow_the_table_and_replicate_what_does_not_divide():
  mesh = mesh_of(2, 2, 2)
  spec = lambda axes, shape: meshes.spec_of(axes, shape, mesh)
  assert spec(('batch', None), (8, 3)) == PartitionSpec(('data', 'fsdp'), None)
  # 6 rows do not divide by data x fsdp = 4, but by data = 2; 5 columns not by tensor = 2.
  assert spec(('batch', 'ff'), (6, 4)) == PartitionSpec('data', 'tensor')
  assert spec(('width', 'vocab'), (4, 5)) == PartitionSpec('fsdp', None)
  # An axis of one device splits nothing; nor does a name that the table lacks.
  assert spec(('experts', 'layers'), (4, 4)) == PartitionSpec(None, None)
  with pytest.raises(ValueError):
    spec(('batch',), (4, 4))


def test_shardings_split_each_leaf_over_its_devices():
  mesh = mesh_of(1, 2, 4)
  values = {'a': np.zeros((4, 8)), 'b': {'c': np.zeros(3)}}
  tree = meshes.shardings({'a': ('width', 'ff'), 'b': {'c': (None,)}}, values, mesh)
  placed = jax.device_put(values, tree)
  assert {s.data.shape for s in placed['a'].addressable_shards} == {(2, 2)}
  assert {s.data.shape for s in placed['b']['c'].addressable_shards} == {(3,)}
  assert meshes.replicated(mesh).is_fully_replicated


def test_a_process_has_as_much_of_the_tensor_axis_as_its_devices_allow():
  local = lambda shape, **run: dict(meshes.make_local_mesh(shape, mesh_of(**run)).shape)
  assert local({}, fsdp=2, tensor=4) == {'data': 2, 'fsdp': 1, 'tensor': 4, 'expert': 1}
  assert local({'fsdp': -1}, tensor=8) == {'data': 1, 'fsdp': 8, 'tensor': 1, 'expert': 1}
  with pytest.raises(ValueError, match='data=3 .* needs 3 devices, but there are 8'):
    local({'data': 3}, data=8)


@pytest.mark.parametrize('axes, size, shape, words', [
    (('kv_heads',), 2, dict(tensor=8), 'mesh.tensor=8 does not divide model.num_kv_heads=2; of 8 devices, tensor may have 1, 2'),
    ((None, 'width'), 6, dict(data=2, fsdp=4), 'mesh.fsdp=4 does not divide model.width=6; of 8 devices, fsdp may have 1, 2'),
    (('ff',), 12, dict(tensor=8), 'mesh.tensor=8 does not divide model.ff_width=12; of 8 devices, tensor may have 1, 2, 4'),
])
def test_what_a_mesh_must_divide_is_refused_with_what_would_fit(axes, size, shape, words):
  value = jax.ShapeDtypeStruct((size,) * len(axes), np.float32)
  with pytest.raises(ValueError) as caught:
    meshes.check_divides({'a': axes}, {'a': value}, mesh_of(**shape))
  assert str(caught.value) == words
  meshes.check_divides({'a': axes}, {'a': value}, mesh_of(data=8))
  # A vocabulary may have any size: what does not divide is held whole.
  meshes.check_divides({'a': ('vocab',)}, {'a': jax.ShapeDtypeStruct((5,), np.float32)}, mesh_of(tensor=8))


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 4, 1), (1, 2, 4)], ids=str)
def test_eight_devices_equal_one(tiny, shape):
  mesh = mesh_of(*shape)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, tiny.config.vocab_size, (8, 12)).astype(np.int32)
  positions = np.tile(np.r_[0:5, 0:7], (8, 1)).astype(np.int32)
  segments = np.tile([1] * 5 + [2] * 7, (8, 1)).astype(np.int32)
  evaluate = jax.jit(functools.partial(transformer.evaluate, config=tiny.config, with_entropy=True))
  arrays = dict(tokens=tokens, positions=positions, segment_ids=segments)
  one = evaluate(tiny.params, **arrays)
  params = jax.device_put(tiny.params, meshes.shardings(param_axes(tiny.config), tiny.params, mesh))
  split = lambda x: jax.device_put(
      x, jax.sharding.NamedSharding(mesh, meshes.spec_of(('batch', None), x.shape, mesh)))
  eight = evaluate(params, **jax.tree.map(split, arrays))
  # It is split at all: over the axes that have devices, and only there.
  used = {name for x in jax.tree.leaves(params) for part in x.sharding.spec if part
          for name in (part if isinstance(part, tuple) else (part,))}
  assert used == {name for name, n in zip(('data', 'fsdp', 'tensor'), shape) if n > 1} - {'data'}
  np.testing.assert_allclose(eight.log_probs, one.log_probs, atol=1e-5)
  np.testing.assert_allclose(eight.entropies, one.entropies, atol=1e-5)
