"""Mistral: as Llama, with a sliding window in every layer or in none."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, _decoder, register


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_act='silu')
  settings = dict(_decoder.base_settings(hf), **_decoder.rope_settings(hf))
  if hf.get('sliding_window'):
    settings['windows'] = (hf['sliding_window'],) * settings['num_layers']
  return settings


def _describe(config: ModelConfig) -> dict[str, Any]:
  if len(config.kinds) > 1:
    raise ValueError(f'windows={config.windows}: all layers of a Mistral have the same window')
  return dict(_decoder.describe_base(config), hidden_act='silu', sliding_window=config.kinds[0] or None)


register(Family('MistralForCausalLM', 'mistral', _settings, _describe, _decoder.llama_pieces))
