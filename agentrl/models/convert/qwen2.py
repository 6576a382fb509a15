"""Qwen2 and Qwen2.5: biases on query, key and value; optionally a window in the last layers."""

from __future__ import annotations

from typing import Any, Mapping

from agentrl.models.config import ModelConfig
from agentrl.models.convert import Family, _decoder, register


def window_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `windows`: of the layers from "max_window_layers" on, if "use_sliding_window"."""
  if not hf.get('use_sliding_window', False):
    return {}
  n = _decoder.need(hf, 'num_hidden_layers')
  types = hf.get('layer_types') or [
      _decoder.SLIDING if i >= _decoder.need(hf, 'max_window_layers') else _decoder.FULL for i in range(n)]
  return _decoder.windows(hf, types)


def describe_windows(config: ModelConfig) -> dict[str, Any]:
  """Returns the entries that `window_settings` reads."""
  return dict(_decoder.describe_windows(config), use_sliding_window=any(config.windows))


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  _decoder.refuse_unless(hf, hidden_act='silu')
  return dict(_decoder.base_settings(hf), **_decoder.rope_settings(hf), **window_settings(hf), qkv_bias=True)


def _describe(config: ModelConfig) -> dict[str, Any]:
  return dict(_decoder.describe_base(config), **describe_windows(config), hidden_act='silu')


register(Family('Qwen2ForCausalLM', 'qwen2', _settings, _describe, _decoder.llama_pieces))
