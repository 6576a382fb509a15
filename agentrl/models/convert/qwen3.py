"""Qwen3, dense: norms of queries and keys, no biases."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, _decoder, qwen2, register


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_act='silu')
  # Unlike in the other families, heads need not fill the width: head_dim is never left to be guessed.
  _decoder.need(hf, 'head_dim')
  bias = hf.get('attention_bias', False)
  return dict(_decoder.base_settings(hf), **_decoder.rope_settings(hf), **qwen2.window_settings(hf), qk_norm=True,
              qkv_bias=bias, output_bias=bias)


def _describe(config: ModelConfig) -> dict[str, Any]:
  return dict(_decoder.describe_base(config), **qwen2.describe_windows(config), hidden_act='silu',
              attention_bias=config.qkv_bias)


register(Family('Qwen3ForCausalLM', 'qwen3', _settings, _describe, _decoder.llama_pieces))
