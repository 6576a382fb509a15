"""Llama 3.x: grouped queries, SwiGLU, rotary frequencies scaled for long contexts."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, _decoder, register


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_act='silu', mlp_bias=False, pretraining_tp=1)
  bias = hf.get('attention_bias', False)
  return dict(_decoder.base_settings(hf), **_decoder.rope_settings(hf), qkv_bias=bias, output_bias=bias)


def _describe(config: ModelConfig) -> dict[str, Any]:
  return dict(_decoder.describe_base(config), hidden_act='silu', attention_bias=config.qkv_bias, mlp_bias=False)


register(Family('LlamaForCausalLM', 'llama', _settings, _describe, _decoder.llama_pieces))
