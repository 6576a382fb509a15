"""Meshes, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from typing import Any, Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert')

# Logical axis -> mesh axes it is split over. Anything not named here is replicated.
LOGICAL_AXES: Mapping[str, str | tuple[str, ...]] = {
    'batch': ('data', 'fsdp', 'expert'),
    'slots': ('data', 'fsdp', 'expert'),
    'length': 'tensor',  # of the residual stream, between the products whose heads or columns are split
    'vocab': 'tensor',
    'width': 'fsdp',
    'kv_heads': 'tensor',
    'ff': 'tensor',
    'experts': 'expert',
}
# Of the sampler: what the learner gathers once a pass, a step of decoding would gather for every token.
SAMPLER_AXES = {**LOGICAL_AXES, 'width': ()}

# Logical axes that a mesh must divide, and what settings call them. Others are replicated where they do not divide.
MUST_DIVIDE = {'width': 'model.width', 'kv_heads': 'model.num_kv_heads', 'ff': 'model.ff_width',
               'experts': 'model.num_experts'}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with all of `MESH_AXES`.

  Args:
    shape: Devices along each axis; axes left out have 1, and one axis may be -1 for all that remain.
    devices: To lay out, in this order; all of the run's if None, those of a process next to each other.
  Raises:
    ValueError: if an axis is unknown, a size is below 1, or the product is not the number of devices.
  """
  devices = sorted(jax.devices(), key=lambda d: d.process_index) if devices is None else list(devices)
  unknown = sorted(set(shape) - set(MESH_AXES))
  if unknown:
    raise ValueError(f'mesh axis {unknown[0]!r} is unknown; known: {", ".join(MESH_AXES)}')
  sizes = [shape.get(axis, 1) for axis in MESH_AXES]
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    named = ' x '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes))
    raise ValueError(f'{named} is no mesh: axes must be at least 1, and only one may be -1')
  if sizes.count(-1) == 1:
    rest = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = max(1, len(devices) // rest)
  if math.prod(sizes) != len(devices):
    named = ' x '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes))
    raise ValueError(f'a mesh of {named} needs {math.prod(sizes)} devices, but there are {len(devices)}; '
                     'set one axis to -1 to take all that remain')
  return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def names_in(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes that one entry of a `PartitionSpec` names."""
  return (part,) if isinstance(part, str) else part or ()


def spec_of(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh,
            table: Mapping[str, str | tuple[str, ...]] = LOGICAL_AXES) -> PartitionSpec:
  """Returns how an array with these logical axes is split.

  A dimension that the mesh does not divide is split over the first of its mesh axes only, or not at all.

  Args:
    axes: A logical axis for each dimension; None for one that is never split.
    shape: Of the array.
    mesh: To split over.
    table: From logical axes to mesh axes.
  """
  parts = []
  for axis, size in zip(axes, shape, strict=True):
    part = table.get(axis, ()) if axis else ()
    names = [n for n in names_in(part) if mesh.shape[n] > 1]
    while names and size % math.prod(mesh.shape[n] for n in names):
      names.pop()
    parts.append(None if not names else names[0] if len(names) == 1 else tuple(names))
  return PartitionSpec(*parts)


def shardings(axes: Any, values: Any, mesh: Mesh, table: Mapping[str, str | tuple[str, ...]] = LOGICAL_AXES) -> Any:
  """Returns a tree of shardings for a tree of arrays (or shapes) and its tree of logical axis tuples."""
  return jax.tree.map(lambda v, a: NamedSharding(mesh, spec_of(a, v.shape, mesh, table)), values, axes,
                      is_leaf=lambda x: hasattr(x, 'shape'))


def lay_out_on(mesh: Mesh | None, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Returns an array, inside a jit, laid out on a given mesh by its logical axes; as it is without a mesh."""
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(axes, x.shape, mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def make_local_mesh(shape: Mapping[str, int], of: Mesh) -> Mesh:
  """Returns a mesh of this process's devices, for what each process does on its own.

  Args:
    shape: As for `make_mesh`. If empty: along the axes 'tensor' and 'expert' as much of the run's mesh as one process
      can have, and the rest along 'data'.
    of: The run's mesh.
  Raises:
    ValueError: as `make_mesh` does; also if processes have different numbers of devices.
  """
  local = [d for d in of.devices.flat if d.process_index == jax.process_index()]
  if len(local) * jax.process_count() != of.size:
    raise ValueError(f'this process has {len(local)} of the {of.size} devices of {jax.process_count()} processes; all '
                     'must have the same number')
  if not shape:
    tensor = math.gcd(of.shape['tensor'], len(local))
    shape = {'data': -1, 'tensor': tensor, 'expert': math.gcd(of.shape['expert'], len(local) // tensor)}
  return make_mesh(shape, local)


def every_process(mesh: Mesh) -> Mesh:
  """Returns the run's devices as one mesh with a leading axis 'process', on which each process has `mesh` as its own.

  What is split over the other axes only, each process holds whole.

  Args:
    mesh: See `make_local_mesh`; of the same shape on every process.
  """
  if jax.process_count() == 1:
    return Mesh(mesh.devices[None], ('process', *mesh.axis_names))
  devices = sorted(jax.devices(), key=lambda d: d.process_index)
  return Mesh(np.asarray(devices).reshape(-1, *mesh.devices.shape), ('process', *mesh.axis_names))


def own_part(tree: Any, mesh: Mesh) -> Any:
  """Returns arrays laid out on `every_process(mesh)` as arrays of `mesh`; nothing is sent or copied."""
  def part(x):
    where = NamedSharding(mesh, x.sharding.spec)
    return jax.make_array_from_single_device_arrays(x.shape, where, [shard.data for shard in x.addressable_shards])

  return jax.tree.map(part, tree)


def on_run(tree: Any, mesh: Mesh) -> Any:
  """Returns a tree whose arrays all belong to the run's mesh: those that only this process has, copied to each device.

  With one process the tree as it is. Such arrays must hold the same values on every process.
  """
  if jax.process_count() == 1:
    return tree

  def place(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

  return jax.tree.map(place, tree)


def check_divides(axes: Any, values: Any, mesh: Mesh):
  """Refuses a mesh that cannot split what it is there to split, which would be held whole by every device.

  Args:
    axes: Tree of logical axis tuples.
    values: Tree of arrays or shapes.
    mesh: To be laid out on.
  Raises:
    ValueError: naming the logical axis, its size, the mesh axis and the sizes that would fit.
  """
  def check(value, value_axes):
    for axis, size in zip(value_axes, value.shape, strict=True):
      name = LOGICAL_AXES.get(axis)
      if axis in MUST_DIVIDE and size % mesh.shape[name]:
        fitting = ', '.join(str(n) for n in range(1, mesh.size + 1) if size % n == 0 and mesh.size % n == 0)
        raise ValueError(f'mesh.{name}={mesh.shape[name]} does not divide {MUST_DIVIDE[axis]}={size}; of '
                         f'{mesh.size} devices, {name} may have {fitting}')

  jax.tree.map(check, values, axes, is_leaf=lambda x: hasattr(x, 'shape'))


# ---- inside jitted functions -------------------------------------------------------------------


Table = Mapping[str, str | tuple[str, ...]]
_table: contextvars.ContextVar[Table] = contextvars.ContextVar('table', default=LOGICAL_AXES)


@contextlib.contextmanager
def active(mesh: Mesh | None, table: Table = LOGICAL_AXES) -> Iterator[None]:
  """While code is traced under it, the functions below mean this mesh. Nothing changes for None or one device."""
  if mesh is None or mesh.size == 1:
    yield
    return
  token = _table.set(table)
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      yield
  finally:
    _table.reset(token)


def under(mesh: Mesh | None, function: Callable[..., Any], table: Table = LOGICAL_AXES) -> Callable[..., Any]:
  """Returns the function, traced with the mesh `active`."""
  @functools.wraps(function)
  def traced(*args, **kwargs):
    with active(mesh, table):
      return function(*args, **kwargs)

  return traced


def current() -> AbstractMesh | None:
  """Returns the mesh of `active`; None outside of it, and where code is written for one device of it."""
  mesh = jax.sharding.get_abstract_mesh()
  if set(mesh.axis_names) != set(MESH_AXES) or any(t == AxisType.Manual for t in mesh.axis_types):
    return None
  return mesh


def local_spec(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
  """Returns `spec_of` for the mesh and the table of `active`."""
  return spec_of(axes, shape, current(), _table.get())


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Returns x, split by its logical axes over the mesh of `active`.

  What a compiler is not told it guesses, and it may then rather move activations than weights.
  """
  return x if current() is None else jax.lax.with_sharding_constraint(x, local_spec(axes, x.shape))


def move(x: jax.Array, source: Sequence[str | None], target: Sequence[str | None]) -> jax.Array:
  """Returns x split by the logical axes `target`, and has its gradient split by `source`.

  Unlike `constrain`, which means the same split both ways: what is gathered on the way forward is then summed whole on
  every device on the way back, rather than to where it came from.
  """
  return x if current() is None else _move(x, local_spec(source, x.shape), local_spec(target, x.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _move(x, source, target):
  del source
  return jax.lax.with_sharding_constraint(x, target)


_move.defvjp(lambda x, source, target: (_move(x, source, target), None),
             lambda source, target, _, grad: (jax.lax.with_sharding_constraint(grad, source),))


def gather(x: jax.Array, axes: Sequence[str | None], over: str = 'width', dtype: Any = None) -> jax.Array:
  """Returns x in `dtype`, split by its logical axes but not along `over`; x itself where no mesh is active.

  It is cast before it is gathered, and its gradient is summed to where it lies.
  """
  if current() is None:
    return x
  return move(constrain(x.astype(dtype or x.dtype), axes), axes, [None if a == over else a for a in axes])


def ways(mesh: Mesh | AbstractMesh, axis: str) -> int:
  """Returns the number of parts that a long enough dimension with this logical axis is split into."""
  return math.prod(mesh.shape[n] for n in names_in(LOGICAL_AXES[axis]))
