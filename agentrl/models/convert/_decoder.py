"""What the families share: entries of config.json that mean the same in all of them, and Llama's names of tensors."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from agentrl.models.config import ModelConfig, RopeScaling
from agentrl.models.convert import Piece

FULL, SLIDING = 'full_attention', 'sliding_attention'


def need(hf: Mapping[str, Any], key: str) -> Any:
  """Returns an entry of config.json.

  Raises:
    ValueError: if it is not there.
  """
  if hf.get(key) is None:
    raise ValueError(f'config.json has no {key!r}, which {_name(hf)} needs; add it, or take config.json from where the '
                     'weights come from')
  return hf[key]


def refuse_unless(hf: Mapping[str, Any], **expected: Any):
  """Refuses entries that ask for what the transformer does not compute; an entry that is not there asks nothing.

  Args:
    hf: config.json.
    **expected: By entry, the value it must have, or a tuple of those it may have.
  Raises:
    ValueError: naming the entry.
  """
  for key, values in expected.items():
    values = values if isinstance(values, tuple) else (values,)
    if key in hf and hf[key] not in values:
      raise ValueError(f'config.json says {key}={hf[key]!r}; of {_name(hf)} only '
                       f'{" or ".join(map(repr, values))} is supported')


def _name(hf: Mapping[str, Any]) -> str:
  return (hf.get('architectures') or ['this architecture'])[0]


def base_settings(hf: Mapping[str, Any], *, tied: bool = False) -> dict[str, Any]:
  """Returns the arguments of `ModelConfig` that are called the same in all families.

  Args:
    hf: config.json.
    tied: Whether the head is the embedding where "tie_word_embeddings" is not given.
  """
  heads, width = need(hf, 'num_attention_heads'), need(hf, 'hidden_size')
  return dict(
      vocab_size=need(hf, 'vocab_size'), num_layers=need(hf, 'num_hidden_layers'), width=width,
      ff_width=need(hf, 'intermediate_size'), num_heads=heads, num_kv_heads=need(hf, 'num_key_value_heads'),
      head_dim=hf.get('head_dim') or width // heads, norm_eps=need(hf, 'rms_norm_eps'),
      tied_embeddings=hf.get('tie_word_embeddings', tied))


def rope_settings(hf: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Returns `rope_theta` and `rope_scaling`.

  Args:
    hf: config.json, which says it as "rope_theta" and "rope_scaling", or both in "rope_parameters".
    parameters: Takes the place of "rope_parameters".
  """
  parameters = parameters or hf.get('rope_parameters') or {}
  theta = parameters.get('rope_theta')
  scaling = parameters if parameters.get('rope_type', 'default') != 'default' else hf.get('rope_scaling')
  return dict(rope_theta=float(need(hf, 'rope_theta') if theta is None else theta),
              rope_scaling=_scaling(scaling, hf) if scaling else None)


def _scaling(entry: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeScaling | None:
  kind = entry.get('rope_type', entry.get('type', 'default'))
  if kind == 'default':
    return None
  if kind not in ('linear', 'llama3', 'yarn'):
    raise ValueError(f'config.json asks for rope_type={kind!r}; supported: default, linear, llama3, yarn')
  unsupported = [k for k in ('mscale', 'mscale_all_dim', 'partial_rotary_factor') if entry.get(k) not in (None, 1.0)]
  if unsupported:
    raise ValueError(f'config.json: {unsupported[0]}={entry[unsupported[0]]!r} of the rope scaling is not supported')

  def entry_of(key):
    if entry.get(key) is None:
      raise ValueError(f'config.json: the rope scaling of type {kind!r} has no {key!r}; add it')
    return entry[key]

  factor = float(entry_of('factor'))
  if kind == 'linear':
    return RopeScaling(kind, factor)
  original = entry.get('original_max_position_embeddings') or need(hf, 'max_position_embeddings')
  if kind == 'llama3':
    return RopeScaling(kind, factor, original, low_frequency=float(entry_of('low_freq_factor')),
                       high_frequency=float(entry_of('high_freq_factor')))
  return RopeScaling(kind, factor, original, beta_slow=float(entry.get('beta_slow') or 1),
                     beta_fast=float(entry.get('beta_fast') or 32), truncate=entry.get('truncate', True),
                     attention_factor=float(entry.get('attention_factor') or 0))


def describe_base(config: ModelConfig) -> dict[str, Any]:
  """Returns what `base_settings` and `rope_settings` read."""
  return dict(
      vocab_size=config.vocab_size, num_hidden_layers=config.num_layers, hidden_size=config.width,
      intermediate_size=config.ff_width, num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
      tie_word_embeddings=config.tied_embeddings, rope_theta=config.rope_theta,
      rope_scaling=describe_scaling(config.rope_scaling))


def describe_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
  """Returns the entry "rope_scaling"."""
  if scaling is None:
    return None
  entry: dict[str, Any] = {'rope_type': scaling.kind, 'factor': scaling.factor}
  if scaling.kind != 'linear':
    entry['original_max_position_embeddings'] = scaling.original_length
  if scaling.kind == 'llama3':
    entry |= {'low_freq_factor': scaling.low_frequency, 'high_freq_factor': scaling.high_frequency}
  if scaling.kind == 'yarn':
    entry |= {'beta_slow': scaling.beta_slow, 'beta_fast': scaling.beta_fast, 'truncate': scaling.truncate}
    entry |= {'attention_factor': scaling.attention_factor} if scaling.attention_factor else {}
  return entry


def windows(hf: Mapping[str, Any], layer_types: Sequence[str]) -> dict[str, Any]:
  """Returns `windows` for layers of these types, as "layer_types" names them."""
  unknown = sorted(set(layer_types) - {FULL, SLIDING})
  if unknown or len(layer_types) != need(hf, 'num_hidden_layers'):
    raise ValueError(f'config.json: layer_types={list(layer_types)} must have {FULL!r} or {SLIDING!r} for each of '
                     f'the num_hidden_layers={hf["num_hidden_layers"]} layers')
  if SLIDING not in layer_types:
    return {}
  return dict(windows=tuple(need(hf, 'sliding_window') if t == SLIDING else 0 for t in layer_types))


def describe_windows(config: ModelConfig) -> dict[str, Any]:
  """Returns "layer_types" and "sliding_window".

  Raises:
    ValueError: if layers have different windows, which no family here can say.
  """
  sizes = sorted(set(config.windows) - {0})
  if len(sizes) > 1:
    raise ValueError(f'windows={config.windows} has several sizes; config.json can say one')
  return dict(layer_types=[SLIDING if w else FULL for w in config.windows or (0,) * config.num_layers],
              sliding_window=sizes[0] if sizes else None)


def embedding_pieces(config: ModelConfig) -> list[Piece]:
  """Returns the pieces outside the layers."""
  whole = (config.vocab_size, config.width)
  pieces = [Piece('model.embed_tokens.weight', whole, ('embedding',), (), whole, (0, 1)),
            vector('model.norm.weight', ('final_norm',), (), config.width)]
  if not config.tied_embeddings:
    pieces.append(Piece('lm_head.weight', whole, ('head',), (), whole, (0, 1)))
  return pieces


def vector(name: str, path: tuple[str, ...], index: tuple[int | slice, ...], *shape: int) -> Piece:
  """Returns a piece that lies in the leaf as it does in the checkpoint."""
  return Piece(name, shape, path, index, shape, tuple(range(len(shape))))


def attention_pieces(config: ModelConfig, layer: int) -> list[Piece]:
  """Returns the pieces of a layer's attention."""
  d, k, g, dh = config.width, config.num_kv_heads, config.group_size, config.head_dim
  at, every = f'model.layers.{layer}.self_attn.', slice(None)
  pieces = []
  for name, heads, place in (('q_proj', k * g, slice(0, g)), ('k_proj', k, slice(g, g + 1)),
                             ('v_proj', k, slice(g + 1, g + 2))):
    split = (k, heads // k, dh)
    pieces.append(Piece(f'{at}{name}.weight', (heads * dh, d), ('layers', 'qkv'), (layer, every, every, place),
                        (*split, d), (3, 0, 1, 2)))
    if config.qkv_bias:
      pieces.append(Piece(f'{at}{name}.bias', (heads * dh,), ('layers', 'qkv_bias'), (layer, every, place), split,
                          (0, 1, 2)))
  pieces.append(Piece(f'{at}o_proj.weight', (d, k * g * dh), ('layers', 'out'), (layer,), (d, k, g, dh),
                      (1, 2, 3, 0)))
  if config.output_bias:
    pieces.append(vector(f'{at}o_proj.bias', ('layers', 'out_bias'), (layer,), d))
  if config.qk_norm:
    pieces.append(vector(f'{at}q_norm.weight', ('layers', 'query_norm'), (layer,), dh))
    pieces.append(vector(f'{at}k_norm.weight', ('layers', 'key_norm'), (layer,), dh))
  return pieces


def mlp_pieces(config: ModelConfig, at: str, up: str, down: str, index: tuple[int, ...]) -> list[Piece]:
  """Returns the pieces of a gated MLP.

  Args:
    config: Of the policy.
    at: Start of their names.
    up: Leaf of gate and up projection.
    down: Leaf of the down projection.
    index: Of the MLP in both.
  """
  d, f, every = config.width, config.ff_width, slice(None)
  gated = [Piece(f'{at}{name}.weight', (f, d), ('layers', up), (*index, every, slice(i, i + 1)), (f, 1, d), (2, 1, 0))
           for i, name in enumerate(('gate_proj', 'up_proj'))]
  return [*gated, Piece(f'{at}down_proj.weight', (d, f), ('layers', down), index, (d, f), (1, 0))]


def norm_pieces(config: ModelConfig, layer: int, names: Mapping[str, str]) -> list[Piece]:
  """Returns the pieces of a layer's norms, by leaf."""
  return [vector(f'model.layers.{layer}.{name}.weight', ('layers', leaf), (layer,), config.width)
          for leaf, name in names.items()]


NORMS = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}


def llama_pieces(config: ModelConfig, norms: Mapping[str, str] | None = None) -> list[Piece]:
  """Returns all pieces of a checkpoint with Llama's names and a gated MLP in each layer."""
  pieces = embedding_pieces(config)
  for i in range(config.num_layers):
    pieces += attention_pieces(config, i)
    pieces += mlp_pieces(config, f'model.layers.{i}.mlp.', 'up', 'down', (i,))
    pieces += norm_pieces(config, i, norms or NORMS)
  return pieces
