"""The parts of a run whose policy starts from a published checkpoint: `model.checkpoint`."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from agentrl.models import pretrained
from agentrl.models.config import RUN_SETTINGS, ModelConfig
from agentrl.tokens import formats
from agentrl.tokens.hf_chat import CHAT_FAMILIES, ChatFamily, HFChatTemplate
from agentrl.tokens.hf_tokenizer import CALL_MARKERS, HFTokenizer

OF_FAMILY = 'family'


def call_format(config: ConfigDict, named_tools: Sequence[Any]) -> formats.CallFormat:
  """Returns the call format: the one that the checkpoint's family was trained with, if `tools.call_format` says so."""
  if config.tools.call_format != OF_FAMILY:
    return formats.make(config.tools.call_format, named_tools)
  return _family(config).make_format()


def chat(config: ConfigDict, call: formats.CallFormat,
         schemas: Sequence[Mapping[str, Any]]) -> tuple[HFTokenizer, HFChatTemplate]:
  """Returns the checkpoint's tokenizer, and its template with the tools to list."""
  family = _family(config)
  tokenizer = HFTokenizer.load(config.model.checkpoint, stops=family.stops)
  markers = tuple(dict.fromkeys((*CALL_MARKERS, *call.markers)))
  return tokenizer, HFChatTemplate.load(config.model.checkpoint, tokenizer, stops=tokenizer.stops, ends=family.ends,
                                        call_markers=markers, tools=schemas)


def system_prompt(template: HFChatTemplate, call: formats.CallFormat, schemas: Sequence[Mapping[str, Any]]) -> str:
  """Returns what the system message says of the tools: nothing, if the template lists them itself."""
  return '' if template.lists_tools else call.describe(schemas)


def model_config(config: ConfigDict, tokenizer: HFTokenizer, value_head: bool) -> ModelConfig:
  """Returns the shape of the policy."""
  return pretrained.read_config(config.model.checkpoint, **_overrides(config, tokenizer, value_head))


def load_params(config: ConfigDict, tokenizer: HFTokenizer, value_head: bool, mesh: jax.sharding.Mesh) -> Any:
  """Returns the checkpoint's parameters, split over the mesh."""
  return pretrained.from_pretrained(config.model.checkpoint, mesh=mesh, key=jax.random.key(config.seed),
                                    **_overrides(config, tokenizer, value_head))[1]


def _overrides(config, tokenizer, value_head):
  settings = {name: config.model[name] for name in RUN_SETTINGS}
  return dict(settings, lora_targets=tuple(settings['lora_targets']), known_tokens=tokenizer.vocab_size,
              value_head=value_head)


def _family(config: ConfigDict) -> ChatFamily:
  path = pathlib.Path(config.model.checkpoint) / 'config.json'
  if not path.exists():
    raise ValueError(f'model.checkpoint={config.model.checkpoint!r} has no config.json: it must be the folder of a '
                     'checkpoint, with config.json, safetensors files and tokenizer.json')
  kind = json.loads(path.read_text(encoding='utf-8')).get('model_type')
  if kind not in CHAT_FAMILIES:
    raise ValueError(f'{path} says model_type={kind!r}; the chats of {", ".join(CHAT_FAMILIES)} are known')
  return CHAT_FAMILIES[kind]
