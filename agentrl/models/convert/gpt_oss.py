"""gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, every other layer with a window, yarn."""

from __future__ import annotations

from typing import Any, Mapping

import ml_dtypes
import numpy as np

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, Piece, _decoder, register

# The 16 values of 4-bit floats with two bits of exponent and one of mantissa; the highest bit is the sign.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_act='silu')
  n = _decoder.need(hf, 'num_hidden_layers')
  types = hf.get('layer_types') or [_decoder.FULL if i % 2 else _decoder.SLIDING for i in range(n)]
  bias = hf.get('attention_bias', True)
  _decoder.need(hf, 'head_dim')
  return dict(
      _decoder.base_settings(hf), **_decoder.rope_settings(hf), **_decoder.windows(hf, types),
      num_experts=hf.get('num_experts') or _decoder.need(hf, 'num_local_experts'),
      experts_per_token=_decoder.need(hf, 'num_experts_per_tok'), expert_bias=True, activation='clamped_swiglu',
      swiglu_alpha=float(hf.get('swiglu_alpha', 1.702)), swiglu_limit=float(hf.get('swiglu_limit', 7.0)),
      attention_sinks=True, qkv_bias=bias, output_bias=bias)


def _describe(config: ModelConfig) -> dict[str, Any]:
  return dict(_decoder.describe_base(config), **_decoder.describe_windows(config), hidden_act='silu',
              attention_bias=config.qkv_bias, num_local_experts=config.num_experts,
              num_experts_per_tok=config.experts_per_token, swiglu_alpha=config.swiglu_alpha,
              swiglu_limit=config.swiglu_limit)


def _pieces(config: ModelConfig) -> list[Piece]:
  d, f, e = config.width, config.ff_width, config.num_experts
  pieces = _decoder.embedding_pieces(config)
  for i in range(config.num_layers):
    at = f'model.layers.{i}.'
    pieces += _decoder.attention_pieces(config, i)
    pieces.append(Piece(f'{at}self_attn.sinks', (config.num_heads,), ('layers', 'sinks'), (i,),
                        (config.num_kv_heads, config.group_size), (0, 1)))
    # Gates and ups alternate along the last axis.
    pieces += [
        Piece(f'{at}mlp.router.weight', (e, d), ('layers', 'router'), (i,), (e, d), (1, 0)),
        _decoder.vector(f'{at}mlp.router.bias', ('layers', 'router_bias'), (i,), e),
        Piece(f'{at}mlp.experts.gate_up_proj', (e, d, 2 * f), ('layers', 'expert_up'), (i,), (e, d, f, 2),
              (0, 1, 3, 2)),
        Piece(f'{at}mlp.experts.gate_up_proj_bias', (e, 2 * f), ('layers', 'expert_up_bias'), (i,), (e, f, 2),
              (0, 2, 1)),
        _decoder.vector(f'{at}mlp.experts.down_proj', ('layers', 'expert_down'), (i,), e, f, d),
        _decoder.vector(f'{at}mlp.experts.down_proj_bias', ('layers', 'expert_down_bias'), (i,), e, d),
    ]
    pieces += _decoder.norm_pieces(config, i, _decoder.NORMS)
  return pieces


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Returns the weights of experts that were published in MXFP4: 4-bit floats with one exponent for 32 of them.

  Axes: E experts, O outputs, G groups of 32 inputs.

  Args:
    blocks: [E, O, G, 16] uint8, two values a byte, the lower half first.
    scales: [E, O, G] uint8, exponents of two plus 127.
  Returns:
    [E, 32 G, O] bfloat16, which holds them exactly.
  Source: OCP Microscaling Formats (MX) v1.0.
  """
  e, o, g, _ = blocks.shape
  out = np.empty((e, g * 32, o), ml_dtypes.bfloat16)
  for i in range(e):  # One expert at a time, so that little exists twice.
    values = np.stack([_FP4[blocks[i] & 15], _FP4[blocks[i] >> 4]], axis=-1).reshape(o, g, 32)
    out[i] = np.ldexp(values, scales[i].astype(np.int32)[..., None] - 127).reshape(o, g * 32).T
  return out


register(Family('GptOssForCausalLM', 'gpt_oss', _settings, _describe, _pieces, packed=('_blocks', '_scales'),
                unpack=unpack_mxfp4))
