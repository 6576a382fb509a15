"""Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, Piece, _decoder, register


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_act='silu', decoder_sparse_step=1, mlp_only_layers=([], None),
                         use_sliding_window=False)
  bias = hf.get('attention_bias', False)
  _decoder.need(hf, 'head_dim')
  settings = dict(_decoder.base_settings(hf), **_decoder.rope_settings(hf), qk_norm=True, qkv_bias=bias,
                  output_bias=bias)
  return dict(settings, ff_width=_decoder.need(hf, 'moe_intermediate_size'),
              num_experts=hf.get('num_local_experts') or _decoder.need(hf, 'num_experts'),
              experts_per_token=_decoder.need(hf, 'num_experts_per_tok'),
              normalise_experts=_decoder.need(hf, 'norm_topk_prob'))


def _describe(config: ModelConfig) -> dict[str, Any]:
  return dict(_decoder.describe_base(config), hidden_act='silu', attention_bias=config.qkv_bias,
              moe_intermediate_size=config.ff_width, num_experts=config.num_experts,
              num_experts_per_tok=config.experts_per_token, norm_topk_prob=config.normalise_experts,
              decoder_sparse_step=1, mlp_only_layers=[])


def _pieces(config: ModelConfig) -> list[Piece]:
  d, e = config.width, config.num_experts
  pieces = _decoder.embedding_pieces(config)
  for i in range(config.num_layers):
    at = f'model.layers.{i}.mlp.'
    pieces += _decoder.attention_pieces(config, i)
    pieces.append(Piece(f'{at}gate.weight', (e, d), ('layers', 'router'), (i,), (e, d), (1, 0)))
    for j in range(e):
      pieces += _decoder.mlp_pieces(config, f'{at}experts.{j}.', 'expert_up', 'expert_down', (i, j))
    pieces += _decoder.norm_pieces(config, i, _decoder.NORMS)
  return pieces


register(Family('Qwen3MoeForCausalLM', 'qwen3_moe', _settings, _describe, _pieces))
