"""The programs of a case, lowered for its chips without having them: shapes and layouts only, no values."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any, Callable

# libtpu compiles without a TPU if it does not look for one. Read when jax starts.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
# Nothing is there that two processes could fight for.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402  (the variables above come first)
from jax.experimental import topologies  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from agentrl.algorithms import OBJECTIVES  # noqa: E402
from agentrl.models.config import ModelConfig  # noqa: E402
from agentrl.models.params import init_params, num_params, param_axes  # noqa: E402
from agentrl.sampling import cache as caches  # noqa: E402
from agentrl.sampling import functions  # noqa: E402
from agentrl.sampling import tpu_kernel  # noqa: E402
from agentrl.sampling import readings  # noqa: E402
from agentrl.sampling import sampler as samplers  # noqa: E402
from agentrl.sampling.contexts import Contexts  # noqa: E402
from agentrl.sharding import mesh as meshes  # noqa: E402
from agentrl.training import step as steps  # noqa: E402
from agentrl.training.optimizer import make_optimizer  # noqa: E402
from agentrl.training.packing import Outcome, pack  # noqa: E402
from agentrl.training.state import LearnerState  # noqa: E402
from experiments.scale import hlo  # noqa: E402
from experiments.scale.cases import Case  # noqa: E402


def mesh_of(topology: str, shape: Any) -> jax.sharding.Mesh:
  """Returns a mesh of chips that need not be there."""
  devices = topologies.get_topology_desc(topology, platform='tpu').devices
  return meshes.make_mesh(dict(shape), sorted(devices, key=lambda d: d.process_index))


def laid_out(values: Any, axes: Any, mesh: jax.sharding.Mesh, table: meshes.Table = meshes.LOGICAL_AXES) -> Any:
  """Returns shapes that say where they would lie."""
  where = meshes.shardings(axes, values, mesh, table)
  return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), values, where)


def params_of(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
  """Returns the learner's parameters."""
  return laid_out(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), param_axes(config), mesh)


def state_of(config: ModelConfig, optimizer: Any, mesh: jax.sharding.Mesh) -> LearnerState:
  """Returns the learner's state, laid out as an update leaves it."""
  params = params_of(config, mesh)
  shapes = jax.eval_shape(optimizer.init, params)
  opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                           steps.layout(shapes, config, mesh))
  return LearnerState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh)))


def batch_of(case: Case, channels: int, mesh: jax.sharding.Mesh) -> Any:
  """Returns an update's batch, its rows split over the mesh."""
  none = lambda dtype: np.zeros(case.rows, dtype)
  outcome = Outcome(none(np.int32), none(np.float32), none(np.float32), none(bool))
  stub = 8  # tokens of a row, so that nothing large is made
  batch, _ = pack([], outcome, rows=case.rows, row_length=stub, channels=channels, micro_batches=case.micro_batches)

  def shape_of(x):
    shape = np.shape(x)
    plane = len(shape) > 1
    shape = (*shape[:-1], case.context) if plane else shape
    axes = (None,) * (len(shape) - 2) + ('batch', None) if plane else (None,) * len(shape)
    spec = meshes.spec_of(axes, shape, mesh)
    return jax.ShapeDtypeStruct(shape, np.asarray(x).dtype, sharding=jax.NamedSharding(mesh, spec))

  return jax.tree.map(shape_of, batch)


def update(case: Case) -> jax.stages.Lowered:
  """Returns one GRPO update with AdamW on every rollout of a step."""
  mesh = mesh_of(case.topology, case.mesh)
  optimizer = make_optimizer('adamw', 1e-6)
  objective = OBJECTIVES.get('grpo')()
  function = steps.make_update(case.model, optimizer, objective, micro_batches=case.micro_batches, mesh=mesh)
  return function.lower(state_of(case.model, optimizer, mesh), batch_of(case, len(objective.channels), mesh),
                        jax.ShapeDtypeStruct((), jnp.int32))


def _sampler(case: Case) -> tuple[Any, Any, jax.NamedSharding, Contexts]:
  """Returns a sampler's parameters, its cache and where that lies, and the books of one."""
  mesh = mesh_of(case.sampler_topology, case.sampler_mesh)
  params = jax.eval_shape(lambda: functions.sampler_view(init_params(case.model, jax.random.key(0)), case.model))
  blocks = case.slots * (case.context // case.block)
  where = samplers.cache_sharding(case.model, blocks, mesh)
  cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                       jax.eval_shape(lambda: caches.init(case.model, blocks, case.block)))
  books = Contexts(case.slots, case.context, case.block, [blocks], case.chunk)
  return laid_out(params, functions.view_axes(case.model), mesh, meshes.SAMPLER_AXES), cache, where, books


def decode(case: Case) -> jax.stages.Lowered:
  """Returns a chunk of decoding with every slot's context at its longest."""
  params, cache, where, books = _sampler(case)
  function = samplers.jit_decode(functools.partial(functions.decode, steps=case.chunk), case.model, case.block, where)
  reading = jax.tree.map(lambda x: _array(*np.shape(x), dtype=x.dtype), readings.by_block(books, []))
  slots = _array(case.slots)
  return function.lower(params, cache, reading, slots, slots, slots, _array(case.slots, 2, dtype=jnp.uint32),
                        _array(case.slots, samplers.MAX_STOPS), _array())


def extend(case: Case) -> jax.stages.Lowered:
  """Returns the writing of known tokens at the end of some contexts, as of tools' observations."""
  params, cache, where, books = _sampler(case)
  rows = _array(case.extend_rows)
  return samplers.jit_extend(case.model, case.block, where).lower(
      params, cache, _array(case.extend_rows, case.extend_tokens), rows, rows, _array(case.extend_rows, books.row))


def _array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def with_layers(case: Case, layers: int) -> Case:
  """Returns the case with a policy of so many layers."""
  return dataclasses.replace(case, model=dataclasses.replace(case.model, num_layers=layers))


def checks(case: Case, program: str, text: str) -> dict[str, Any]:
  """Returns what of a compiled program must not be: logits whole, donated buffers copied, the cache sent about.

  Args:
    case: See there.
    program: Its name.
    text: Its optimised HLO.
  """
  shape = case.mesh if program == 'update' else case.sampler_mesh
  ways = math.prod(n for axis, n in shape.items() if axis != 'tensor')
  columns, width = case.model.vocab_size // shape.get('tensor', 1), case.model.width
  # Of arrays with a dimension of the vocabulary those of weights have one of the width as well.
  elements, array = hlo.largest(text, columns, (width, width // shape.get('fsdp', 1)))
  whole = {'update': case.micro_rows // ways * case.context * columns, 'decode': case.slots * case.model.vocab_size,
           'extend': case.extend_rows * case.extend_tokens * columns}[program]
  donated = hlo.donated(text)
  bytes_sent, sent = hlo.largest_collective(text)
  return {
      'logits': {'largest': array, 'elements': elements, 'whole': whole, 'is_whole': elements >= whole},
      'donated': {'bytes': sum(hlo.num_bytes(t) for t in donated.values()),
                  'copies': hlo.copies_of(text, donated.values())},
      'collective': {'largest': sent, 'bytes': bytes_sent, 'is_cache': program != 'update' and (
          bytes_sent >= min(hlo.num_bytes(t) for t in donated.values()))},
  }


def loops(case: Case, program: str) -> tuple[int, ...]:
  """Returns how often loops run whose end the compiler does not know, by how deep they are, for `hlo.analyse`.

  Of an update, that over micro-batches. Of decode, that over tokens, and within it that over blocks which slots share:
  here none do. Of extend without kernels, that over a context's blocks.
  """
  return {'update': (case.micro_batches,), 'decode': (case.chunk, 0),
          'extend': (-(-case.context // caches.STRIDE),)}[program]


def bytes_beside(case: Case, program: str) -> int:
  """Returns what a chip holds meanwhile that is no argument of the program: the learner's state, the sampler's weights."""
  if program == 'update':
    return num_params(case.model) * 2 // math.prod(case.sampler_mesh.values())
  # Master weights and Adam's two moments in float32.
  return num_params(case.model) * 12 // case.chips


def _causal_products(products: int):
  """Returns the floating-point operations of a splash kernel that makes so many products of each block."""
  def of(i, types):
    # Queries come first of what is not the mask's.
    heads, length, width = next(dims for o in i.operands for dtype, dims, _ in hlo.shapes_of(types[o])
                                if dtype == 'bf16' and len(dims) == 3)
    blocks = -(-length // 512)
    return products * 2.0 * heads * width * 512**2 * blocks * (blocks + 1) / 2
  return of


def _grouped(i, types):
  """Returns the floating-point operations of a megablox kernel: every row meets one matrix."""
  shapes = [dims for o in i.operands for _, dims, _ in hlo.shapes_of(types[o]) if len(dims) >= 2]
  (_, out, _), = hlo.shapes_of(i.type)[:1]
  rows = max(d[0] for d in shapes if len(d) == 2)
  inner = next(d for d in shapes if len(d) == 2)
  return 2.0 * rows * inner[-1] * out[-1] if len(out) == 2 else 2.0 * rows * out[-1] * out[-2]


def kernel_flops(case: Case) -> dict[str, hlo.KernelCost]:
  """Returns the floating-point operations of the kernels in a case's programs, for `hlo.analyse`."""
  def rows(i, types):
    of = _Extension.of(case, i, types)
    return 4.0 * of.heads * of.tile * of.width * of.contexts * sum(-(-n // of.fetch) * of.fetch for n in of.tokens)

  def slots(i, types):
    keys = _operands(i, types)[-2]
    return 4.0 * case.model.num_heads // case.model.num_kv_heads * math.prod(keys)

  return {'splash_mha_fwd': _causal_products(2), 'splash_mha_dq': _causal_products(3), 'splash_mha_dkv': _causal_products(4),
          'gmm': _grouped, 'tgmm': _grouped, 'attend_rows': rows, 'attend_slots': slots}


def kernel_bytes(case: Case) -> dict[str, hlo.KernelCost]:
  """Returns the bytes that kernels move whose operands are not read once each, for `hlo.analyse`.

  `attend_slots` reads its blocks once: here they are the whole cache. `attend_rows` reads of the cache what contexts have,
  and once more for each tile of queries.
  """
  def rows(i, types):
    of = _Extension.of(case, i, types)
    queries = hlo.num_bytes(types[i.operands[-3]], True) + hlo.num_bytes(i.type, True)
    return queries + 2.0 * 2 * of.contexts * of.heads * of.width * sum(of.tokens)

  return {'attend_rows': rows}


def _operands(i, types) -> list[tuple[int, ...]]:
  return [hlo.shapes_of(types[o])[0][1] for o in i.operands]


@dataclasses.dataclass(frozen=True)
class _Extension:
  """What a run of `attend_rows` does on a chip, at the end of contexts at their longest whose blocks lie on chips evenly.

  Attributes:
    contexts: A.
    heads: K.
    width: Dh.
    tile: Rows of a tile.
    fetch: Tokens that it computes on at a time.
    tokens: Of a context that each of its tiles reads.
  """

  contexts: int
  heads: int
  width: int
  tile: int
  fetch: int
  tokens: tuple[int, ...]

  @classmethod
  def of(cls, case: Case, i: hlo.Instruction, types: Any) -> _Extension:
    """Returns it for an instruction and the types of its operands."""
    *_, lows, _, _, _, (contexts, heads, rows, width), (blocks, *_, block), _ = _operands(i, types)
    tiles = lows[0] // contexts
    ways = case.slots * (case.context // case.block) // blocks
    reach = lambda tile: case.context - case.extend_tokens + (tile + 1) * case.extend_tokens // tiles
    tokens = tuple(-(-reach(tile) // block) * block // ways for tile in range(tiles))
    return cls(contexts, heads, width, rows // tiles, max(tpu_kernel.ROWS_KEYS, block), tokens)


PROGRAMS: dict[str, Callable[[Case], jax.stages.Lowered]] = {
    'update': update, 'decode': decode, 'extend': extend}
