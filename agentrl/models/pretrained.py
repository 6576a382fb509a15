"""Checkpoints as `transformers` and PEFT write them, read into device arrays and written from them.

One tensor at a time passes through host memory, whatever the size of the policy and of the mesh.

    config, params = from_pretrained('Qwen3-8B', mesh=mesh, param_dtype='bfloat16')
    save_pretrained('mine', params, config, source='Qwen3-8B')
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import functools
import json
import math
import os
import pathlib
import shutil
from typing import Any, Callable, Iterable, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
import jax.numpy as jnp
import numpy as np

from agentrl.models import safetensors_file
from agentrl.models.assembly import Assembly
from agentrl.models.config import RUN_SETTINGS, ModelConfig
from agentrl.models.convert import Family, Piece, family_of
from agentrl.models.params import Params, ParamSpec, init_param, linear_shape, param_specs
from agentrl.models.safetensors_file import Stored
from agentrl.sharding import mesh as meshes

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
ADAPTER_WEIGHTS, ADAPTER_CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
# What belongs to a checkpoint beside weights and config.json, and does not change with them.
_BESIDE = ('tokenizer.json', 'tokenizer_config.json', 'tokenizer.model', 'special_tokens_map.json',
           'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json',
           'generation_config.json')
_UNTRAINED = ('value', 'lora')  # what no checkpoint of a base model has


def read_config(folder: str | os.PathLike, **overrides: Any) -> ModelConfig:
  """Returns the shape of a checkpoint's policy.

  Args:
    folder: With config.json.
    **overrides: Arguments of `ModelConfig` that the checkpoint does not decide, such as `param_dtype` or
      `lora_targets`.
  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: if it lacks a needed entry, or asks for what the transformer does not compute.
    agentrl.core.registry.UnknownNameError: if its architecture is of no known family; lists those there are.
  """
  return _read_config(pathlib.Path(folder), overrides)[1]


def from_pretrained(folder: str | os.PathLike, *, mesh: Mesh | None = None, key: jax.Array | None = None,
                    **overrides: Any) -> tuple[ModelConfig, Params]:
  """Returns a checkpoint's policy, learner's view, split over the mesh.

  Host memory stays under twice the largest tensor: each is read, cut into the parts that the devices of this process
  hold, and written into their arrays in place.

  Args:
    folder: With config.json and safetensors files, one or several with their index.
    mesh: See `agentrl.sharding.mesh`; None for the default device.
    key: Of what a checkpoint does not hold: a value head, adapters. None for `jax.random.key(0)`.
    **overrides: As for `read_config`.
  Raises:
    FileNotFoundError: naming the file that is missing.
    ValueError: naming the tensors that are missing, unexpected or have another shape than config.json says, or the
      file that is cut short.
  """
  folder = pathlib.Path(folder)
  family, config = _read_config(folder, overrides)
  stored = _stored(folder)
  pieces = family.pieces(config)
  sources = _sources(folder, pieces, stored, family)
  specs = param_specs(config)
  _check_cover(family, pieces, specs)
  leaves = _leaves(specs)
  params: Params = {}
  by_leaf = collections.defaultdict(list)
  for piece in pieces:
    by_leaf[piece.path].append(piece)
  key = jax.random.key(0) if key is None else key
  for number, (path, spec) in enumerate(leaves.items()):
    where = _sharding(spec, mesh)
    if path in by_leaf:
      leaf = Assembly(spec.shape, jnp.dtype(config.param_dtype), where)
      for piece in by_leaf[path]:
        leaf.write(piece, sources[piece.name]())
      value = leaf.array()
    else:
      draw = jax.jit(init_param, static_argnums=(0, 2), out_shardings=where)
      value = draw(spec, jax.random.fold_in(key, number), config.param_dtype)
    _insert(params, path, value)
  return config, params


def save_pretrained(folder: str | os.PathLike, params: Params, config: ModelConfig, *,
                    source: str | os.PathLike | None = None, architecture: str | None = None,
                    dtype: str | None = None, shard_bytes: int = 5_000_000_000):
  """Writes a policy as `transformers` reads it; a value head is left out, which has no place there.

  In a run of several processes all must call it; the first one writes.

  Args:
    folder: Made if it does not exist.
    params: Learner's view.
    config: Of the policy, without adapters; see `agentrl.models.lora.merge` and `save_adapters`.
    source: Checkpoint that the policy comes from: its tokenizer and the entries of config.json that no `ModelConfig`
      has are taken over.
    architecture: As in config.json's "architectures"; None for that of `source`.
    dtype: Of the weights written; None for that of the parameters.
    shard_bytes: Most bytes of tensors a file; more than one file come with an index.
  Raises:
    ValueError: if neither source nor architecture is given, there are adapters, or the family cannot say what the
      config says.
  """
  if config.adapted:
    raise ValueError('the policy has adapters: merge them first (agentrl.models.lora.merge), or save them alone with '
                     'save_adapters')
  entries = _json(pathlib.Path(source) / 'config.json') if source else {}
  if not (architecture or source):
    raise ValueError('name the architecture to write, or the source whose architecture it is')
  family = family_of(architecture or _architecture(pathlib.Path(source), entries))
  dtype = np.dtype(jnp.dtype(dtype or config.param_dtype))
  pieces = family.pieces(config)
  # Entries that only `source` has stay; the weights are not quantised any more.
  entries = {k: v for k, v in entries.items() if k not in ('rope_parameters', 'torch_dtype', 'quantization_config')}
  entries |= {**family.describe(config), 'architectures': [family.architecture], 'model_type': family.model_type,
              'dtype': dtype.name}
  if entries.setdefault('max_position_embeddings', _positions(config)) is None:
    del entries['max_position_embeddings']
  _refuse_lossy(family, config, entries)
  folder = pathlib.Path(folder)
  _write_weights(folder, pieces, params, dtype, shard_bytes)
  if jax.process_index() == 0:
    _write_json(folder / 'config.json', entries)
    for name in _BESIDE if source else ():
      if (pathlib.Path(source) / name).exists() and pathlib.Path(source).resolve() != folder.resolve():
        shutil.copyfile(pathlib.Path(source) / name, folder / name)


def adapter_settings(folder: str | os.PathLike) -> dict[str, Any]:
  """Returns the arguments of `ModelConfig` that adapters saved by PEFT need: rank, alpha and targets.

  Raises:
    FileNotFoundError: if there is no adapter_config.json.
    ValueError: if it lacks an entry, or asks for a kind of adapter that is not supported.
  """
  path = pathlib.Path(folder) / ADAPTER_CONFIG
  entries = _json(path)
  absent = [k for k in ('r', 'lora_alpha', 'target_modules') if k not in entries]
  if absent:
    raise ValueError(f'{path} has no {absent[0]!r}; add it')
  plain = dict(peft_type='LORA', bias='none', fan_in_fan_out=False, use_dora=False, use_rslora=False,
               rank_pattern={}, alpha_pattern={}, layers_to_transform=None, modules_to_save=None)
  for name, value in plain.items():
    if entries.get(name, value) not in (value, None, [], {}):
      raise ValueError(f'{path} says {name}={entries[name]!r}; only {value!r} is supported')
  targets = entries['target_modules']
  if isinstance(targets, str):
    raise ValueError(f'{path}: target_modules={targets!r} is a pattern; write the list of names it stands for')
  return dict(lora_rank=entries['r'], lora_alpha=float(entries['lora_alpha']), lora_targets=tuple(sorted(targets)))


def load_adapters(folder: str | os.PathLike, params: Params, config: ModelConfig) -> Params:
  """Returns the parameters with the adapters of a folder that PEFT, or `save_adapters`, wrote.

  Args:
    folder: With adapter_config.json and adapter_model.safetensors.
    params: Learner's view, with adapters to be replaced; they decide where the new ones lie.
    config: Of the policy; its adapters must be those of the folder, see `adapter_settings`.
  Raises:
    ValueError: if rank, alpha or targets are others, naming them; also as `from_pretrained` does.
  """
  folder = pathlib.Path(folder)
  settings = adapter_settings(folder)
  ours = dict(lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, lora_targets=tuple(sorted(config.adapted)))
  different = [k for k in ours if ours[k] != settings[k]]
  if different:
    raise ValueError(f'{folder / ADAPTER_CONFIG} is of {different[0]}={settings[different[0]]!r}, the policy of '
                     f'{ours[different[0]]!r}; make the policy with the settings of the adapters')
  pieces = _adapter_pieces(config)
  sources = _sources(folder, pieces, safetensors_file.read_header(folder / ADAPTER_WEIGHTS), None)
  layers = dict(params['layers'])
  layers['lora'] = {name: dict(pair) for name, pair in layers['lora'].items()}
  for name in config.adapted:
    for half in ('a', 'b'):
      old = layers['lora'][name][half]
      leaf = Assembly(old.shape, old.dtype, old.sharding)
      for piece in pieces:
        if piece.path[-2:] == (name, half):
          leaf.write(piece, sources[piece.name]())
      layers['lora'][name][half] = leaf.array()
  return {**params, 'layers': layers}


def save_adapters(folder: str | os.PathLike, params: Params, config: ModelConfig, *,
                  base: str | os.PathLike | None = None, dtype: str | None = None):
  """Writes a policy's adapters as PEFT reads them.

  Args:
    folder: Made if it does not exist.
    params: Learner's view.
    config: Of the policy.
    base: Where PEFT finds the model that they belong to; None leaves it open.
    dtype: Of the weights written; None for that of the parameters.
  Raises:
    ValueError: if the policy has no adapters.
  """
  if not config.adapted:
    raise ValueError('the policy has no adapters; name the linears in ModelConfig.lora_targets')
  folder = pathlib.Path(folder)
  dtype = np.dtype(jnp.dtype(dtype or config.param_dtype))
  folder.mkdir(parents=True, exist_ok=True)
  _write_file(folder / ADAPTER_WEIGHTS, _adapter_pieces(config), params, dtype)
  if jax.process_index() == 0:
    _write_json(folder / ADAPTER_CONFIG, dict(
        peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=None if base is None else os.fspath(base),
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(config.adapted), lora_dropout=0.0,
        bias='none', fan_in_fan_out=False, inference_mode=True))


# ---- config.json --------------------------------------------------------------------------------


def _read_config(folder: pathlib.Path, overrides: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
  entries = _json(folder / 'config.json')
  family = family_of(_architecture(folder, entries))
  try:
    return family, ModelConfig(**{**family.settings(entries), **overrides})
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error


def _architecture(folder: pathlib.Path, entries: Mapping[str, Any]) -> str:
  names = entries.get('architectures')
  if not names:
    raise ValueError(f"{folder / 'config.json'} has no 'architectures', by which the family is found; add it, as in "
                     '["Qwen3ForCausalLM"]')
  return names[0]


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from error


def _write_json(path: pathlib.Path, value: Any):
  temporary = path.with_name(f'{path.name}.tmp{os.getpid()}')
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')
  os.replace(temporary, path)


def _positions(config: ModelConfig) -> int | None:
  """The context a policy is made for, as far as it says so."""
  scaling = config.rope_scaling
  return int(scaling.factor * scaling.original_length) if scaling and scaling.original_length else None


def _refuse_lossy(family: Family, config: ModelConfig, entries: Mapping[str, Any]):
  """Refuses a config that would be read back as another: the family has no word for it."""
  ours, theirs = _meaning(config), _meaning(ModelConfig(**family.settings(entries)))
  for name, value in ours.items():
    same = math.isclose(value, theirs[name], rel_tol=1e-6) if isinstance(value, float) else value == theirs[name]
    if not same:
      raise ValueError(f'{family.architecture} cannot be written with {name}={value!r}: it would be read as '
                       f'{theirs[name]!r}')


def _meaning(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that decide what a policy computes, each written in one way only."""
  of_a_run = (*RUN_SETTINGS, 'value_head', 'value_width', 'value_gradient', 'known_tokens')
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in of_a_run}
  values['query_scale'] = config.query_scale or config.head_dim**-0.5
  values['windows'] = config.windows or (0,) * config.num_layers
  values['local_rope_theta'] = (config.local_rope_theta or config.rope_theta) if any(config.windows) else 0.0
  if config.activation != 'clamped_swiglu':
    values |= dict(swiglu_alpha=0.0, swiglu_limit=0.0)
  if not config.num_experts:
    values |= dict(experts_per_token=0, normalise_experts=True, expert_bias=False)
  return values


# ---- tensors in --------------------------------------------------------------------------------


def _stored(folder: pathlib.Path) -> dict[str, Stored]:
  """Returns a checkpoint's tensors by name, of all its files."""
  if not (folder / INDEX).exists():
    if not (folder / WEIGHTS).exists():
      raise FileNotFoundError(f'{folder} has neither {WEIGHTS} nor {INDEX}')
    return safetensors_file.read_header(folder / WEIGHTS)
  places = _json(folder / INDEX)['weight_map']
  files = {}
  for name in sorted(set(places.values())):
    if not (folder / name).exists():
      raise FileNotFoundError(f'{folder / INDEX} names {name}, which is not there; copy or download it')
    files[name] = safetensors_file.read_header(folder / name)
  found = {name: stored for tensors in files.values() for name, stored in tensors.items()}
  astray = sorted(n for n, file in places.items() if n not in files[file])
  if astray:
    raise ValueError(f'{folder / INDEX} says that {astray[0]!r} is in {places[astray[0]]}, which does not hold it; the '
                     'files are not of one checkpoint')
  return found


def _sources(folder: pathlib.Path, pieces: Sequence[Piece], stored: Mapping[str, Stored],
             family: Family | None) -> dict[str, Callable[[], np.ndarray]]:
  """Returns how each piece is read, after all names and shapes are compared."""
  sources, used, missing = {}, set(), []
  for piece in pieces:
    parts = [piece.name + end for end in family.packed] if family else []
    if piece.name in stored:
      found = stored[piece.name]
      if found.shape != piece.shape:
        raise ValueError(f'{found.path}: tensor {piece.name!r} has shape {list(found.shape)}, where config.json asks '
                         f'for {list(piece.shape)}; one of them is of another model')
      sources[piece.name] = found.read
      used.add(piece.name)
    elif parts and all(p in stored for p in parts):
      sources[piece.name] = _unpacked(family, piece, [stored[p] for p in parts])
      used.update(parts)
    else:
      missing.append(piece.name)
  ignored = family.ignored if family else ()
  extra = [n for n in stored if n not in used and not any(fnmatch.fnmatch(n, p) for p in ignored)]
  if missing:
    near = difflib.get_close_matches(missing[0], extra, n=1)
    hint = f'; there is {near[0]!r}, which may be meant' if near else ''
    raise ValueError(f'{folder} lacks {_listed(missing)}{hint}. The weights must be those that config.json describes')
  if extra:
    raise ValueError(f'{folder} has {_listed(extra)}, for which the architecture of config.json has no place; it says '
                     'less than the weights hold, or they are of another model')
  return sources


def _unpacked(family: Family, piece: Piece, parts: Sequence[Stored]) -> Callable[[], np.ndarray]:
  def read():
    values = family.unpack(*(part.read() for part in parts))
    if values.shape != piece.shape:
      raise ValueError(f'{parts[0].path}: tensor {piece.name!r} unpacks to shape {list(values.shape)}, where '
                       f'config.json asks for {list(piece.shape)}; one of them is of another model')
    return values

  return read


def _listed(names: Sequence[str]) -> str:
  shown = ', '.join(repr(n) for n in names[:3])
  return f'{len(names)} tensor{"s" if len(names) > 1 else ""}: {shown}{", ..." if len(names) > 3 else ""}'


def _leaves(specs: Params) -> dict[tuple[str, ...], ParamSpec]:
  flat = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
  return {tuple(p.key for p in path): spec for path, spec in flat}


def _insert(tree: Params, path: tuple[str, ...], value: Any):
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _check_cover(family: Family, pieces: Iterable[Piece], specs: Params):
  """Refuses a family that leaves part of a parameter unwritten."""
  sizes = collections.Counter()
  for piece in pieces:
    sizes[piece.path] += math.prod(piece.shape)
  for path, spec in _leaves(specs).items():
    if sizes.pop(path, 0) != math.prod(spec.shape) and not set(path) & set(_UNTRAINED):
      raise ValueError(f'{family.architecture}: its pieces do not fill the parameter {"/".join(path)} of shape '
                       f'{list(spec.shape)}')
  if sizes:
    raise ValueError(f'{family.architecture}: there is no parameter {"/".join(next(iter(sizes)))}')


def _sharding(spec: ParamSpec, mesh: Mesh | None) -> jax.sharding.Sharding:
  if mesh is None:
    return SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(mesh, meshes.spec_of(spec.axes, spec.shape, mesh))


# ---- tensors out -------------------------------------------------------------------------------


def _adapter_pieces(config: ModelConfig) -> list[Piece]:
  pieces = []
  for i in range(config.num_layers):
    for name in config.adapted:
      inner, outer = linear_shape(config, name)
      block = 'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'
      at = f'base_model.model.model.layers.{i}.{block}.{name}.lora_'
      for half, letter, shape in (('a', 'A', (config.lora_rank, inner)), ('b', 'B', (outer, config.lora_rank))):
        pieces.append(Piece(f'{at}{letter}.weight', shape, ('layers', 'lora', name, half), (i,), shape, (1, 0)))
  return pieces


def _write_weights(folder: pathlib.Path, pieces: Sequence[Piece], params: Params, dtype: np.dtype, shard_bytes: int):
  files: list[list[Piece]] = [[]]
  room = shard_bytes
  for piece in pieces:
    size = math.prod(piece.shape) * dtype.itemsize
    if files[-1] and size > room:
      files.append([])
      room = shard_bytes
    files[-1].append(piece)
    room -= size
  names = [WEIGHTS] if len(files) == 1 else [
      f'model-{i + 1:05}-of-{len(files):05}.safetensors' for i in range(len(files))]
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / INDEX, *folder.glob('model*.safetensors')]:
      old.unlink(missing_ok=True)  # of another number of files; it would be read in place of these
  for name, part in zip(names, files):
    _write_file(folder / name, part, params, dtype)
  if len(files) > 1 and jax.process_index() == 0:
    total = sum(math.prod(p.shape) for p in pieces) * dtype.itemsize
    _write_json(folder / INDEX, {'metadata': {'total_size': total},
                                 'weight_map': {p.name: n for n, part in zip(names, files) for p in part}})


def _write_file(path: pathlib.Path, pieces: Sequence[Piece], params: Params, dtype: np.dtype):
  by_name = {p.name: p for p in pieces}
  read = lambda name: _read_out(by_name[name], params, dtype)
  if jax.process_index() == 0:
    safetensors_file.write(path, {p.name: p.shape for p in pieces}, dtype, read)
  else:
    for name in by_name:  # A gather needs every process.
      read(name)


def _read_out(piece: Piece, params: Params, dtype: np.dtype) -> np.ndarray:
  leaf = params
  for key in piece.path:
    leaf = leaf[key]
  index = [slice(i, i + 1) if isinstance(i, int) else i for i in piece.index]
  index += [slice(None)] * (leaf.ndim - len(index))
  bounds = [s.indices(size)[:2] for s, size in zip(index, leaf.shape)]
  start, sizes = np.asarray([b[0] for b in bounds], np.int32), tuple(b[1] - b[0] for b in bounds)
  where = leaf.sharding
  whole = meshes.replicated(where.mesh) if isinstance(where, NamedSharding) else None
  return piece.theirs(np.asarray(_cutter(whole)(leaf, start, sizes, dtype.name)))


@functools.cache
def _cutter(whole: NamedSharding | None):
  def cut(leaf, start, sizes, dtype):
    return jax.lax.dynamic_slice(leaf, start, sizes).astype(dtype)

  return jax.jit(cut, static_argnums=(2, 3), out_shardings=whole)
