"""Gemma 3, text only: local and global attention with frequencies of their own, norms before and after, GELU."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, Piece, _decoder, register

_NORMS = {'attention_norm': 'input_layernorm', 'attention_post_norm': 'post_attention_layernorm',
          'mlp_norm': 'pre_feedforward_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_activation='gelu_pytorch_tanh', attn_logit_softcapping=None,
                         final_logit_softcapping=None, use_bidirectional_attention=(False, None))
  n = _decoder.need(hf, 'num_hidden_layers')
  pattern = hf.get('sliding_window_pattern') or 6
  types = hf.get('layer_types') or [_decoder.SLIDING if (i + 1) % pattern else _decoder.FULL for i in range(n)]
  parameters = hf.get('rope_parameters') or {}
  local = parameters.get(_decoder.SLIDING) or {}
  _decoder.refuse_unless({**hf, 'rope_type': local.get('rope_type', 'default')}, rope_type='default')
  theta = local.get('rope_theta')
  bias = hf.get('attention_bias', False)
  return dict(
      _decoder.base_settings(hf, tied=True), **_decoder.windows(hf, types),
      **_decoder.rope_settings(hf, parameters.get(_decoder.FULL)),
      local_rope_theta=float(_decoder.need(hf, 'rope_local_base_freq') if theta is None else theta),
      query_scale=float(_decoder.need(hf, 'query_pre_attn_scalar'))**-0.5, activation='gelu', qk_norm=True,
      offset_norms=True, post_norms=True, scale_embeddings=True, qkv_bias=bias, output_bias=bias)


def _describe(config: ModelConfig) -> dict[str, Any]:
  scalar = (config.query_scale or config.head_dim**-0.5)**-2
  # Past versions read it as an integer; taking roots and squares leaves a rounding error.
  scalar = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
  return dict(_decoder.describe_base(config), **_decoder.describe_windows(config),
              hidden_activation='gelu_pytorch_tanh', attention_bias=config.qkv_bias,
              rope_local_base_freq=config.local_rope_theta or config.rope_theta, query_pre_attn_scalar=scalar)


def _pieces(config: ModelConfig) -> list[Piece]:
  return _decoder.llama_pieces(config, _NORMS)


register(Family('Gemma3ForCausalLM', 'gemma3_text', _settings, _describe, _pieces))
