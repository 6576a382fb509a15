"""A run from a checkpoint's folder: its tokenizer, its template, its weights, with and without adapters."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

tokenizers = pytest.importorskip('tokenizers', reason='checkpoints need the extra "hf"')
pytest.importorskip('jinja2', reason='checkpoints need the extra "hf"')

from agentrl.models import lora, pretrained  # noqa: E402
from agentrl.models.config import ModelConfig  # noqa: E402
from agentrl.models.params import init_params  # noqa: E402
from agentrl.rollout import store  # noqa: E402
from agentrl.training import build, loop  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compile')
TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{- tool.function.name + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content }}
        {%- for call in m.tool_calls %}{{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


@pytest.fixture(scope='module', name='checkpoint')
def checkpoint_folder(tmp_path_factory):
  """A Qwen3 of two small layers, as it would be downloaded, with more rows than tokens."""
  folder = tmp_path_factory.mktemp('checkpoint')
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator(
      ['What is the greatest common divisor of numbers? python code product'] * 3,
      tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                     initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  model.add_special_tokens(['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
  model.add_tokens(['<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>'])
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(
      dict(eos_token='<|im_end|>', pad_token='<|endoftext|>', chat_template=TEMPLATE)))
  config = ModelConfig(vocab_size=320, num_layers=2, width=32, ff_width=48, num_heads=4, num_kv_heads=2, head_dim=8,
                       qk_norm=True, tied_embeddings=False, param_dtype='bfloat16')
  params = init_params(config, jax.random.key(0))
  # The padding would be drawn nearly always if it could be.
  params['head'] = params['head'].at[model.get_vocab_size():].multiply(8.0)
  pretrained.save_pretrained(folder, params, config, architecture='Qwen3ForCausalLM')
  return folder


def settings(checkpoint, **overrides):
  # PPO learns from every sample: such a policy earns no reward that differs within a group.
  return {'model.checkpoint': str(checkpoint), 'tools.call_format': 'family', 'stages': "('sft', 'rl')",
          'rollout.context_tokens': '256', 'train.row_length': '256', 'sft.batch_rows': '2', 'sft.steps': '1',
          'rollout.capacities': '(256,)', 'rollout.token_buckets': '(64,)', 'rl.algorithm': 'ppo', 'rl.steps': '2',
          'rl.prompts': '2', 'mesh.data': '1', 'mesh.fsdp': '4', 'mesh.tensor': '2', **overrides}


@pytest.fixture(name='workdir')
def workdir_with_data(tiny_folder, tmp_path):
  shutil.copytree(tiny_folder / 'data', tmp_path / 'run' / 'data')
  return tmp_path / 'run'


def test_a_run_goes_from_the_checkpoint_and_draws_no_padding(checkpoint, workdir, tiny_config):
  config = tiny_config(settings(checkpoint, **{'model.lora_targets': "('q_proj', 'down_proj')"}))
  summary = loop.run(config, workdir)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rl = [line for line in lines if line['stage'] == 'rl']
  assert len(rl) == 2 and all(line['log_prob_gap_max'] < 1e-4 and line['applied'] == 1 for line in rl)
  assert [line['applied'] for line in lines if line['stage'] == 'sft'] == [1] and summary['steps'] == 3
  known = build.build(config, workdir)
  known.close()
  drawn = [token for path in store.list_paths(workdir / 'trajectories')
           for trajectory in store.read(path).trajectories for segment in trajectory.segments
           for token in segment.tokens]
  assert drawn and max(drawn) < known.tokenizer.vocab_size < known.model.vocab_size


def test_parts_come_from_the_checkpoint(checkpoint, workdir, tiny_config):
  config = tiny_config(settings(checkpoint, **{'model.lora_targets': "('*_proj',)", 'rl.algorithm': 'grpo'}))
  parts = build.build(config, workdir)
  try:
    assert (parts.model.known_tokens, parts.model.vocab_size) == (parts.tokenizer.vocab_size, 320)
    assert parts.call_format.name == 'hermes' and parts.template.stops[0] == '<|im_end|>'
    prompt = parts.tokenizer.decode(parts.template.render(parts.train_source[0].messages, add_generation_prompt=True))
    assert prompt.startswith('<|im_start|>system\npython\n') and prompt.endswith('<|im_start|>assistant\n')
    params = parts.init_params()
    _, plain = pretrained.from_pretrained(checkpoint)
    np.testing.assert_array_equal(params['layers']['qkv'], plain['layers']['qkv'])
    assert params['layers']['lora'].keys() == set(parts.model.adapted)
    # Adapters start as none: the same policy.
    merged, _ = lora.merge(params, parts.model)
    jax.tree.map(np.testing.assert_array_equal, merged, plain)
    assert jnp.dtype(parts.model.param_dtype) == jnp.float32
  finally:
    parts.close()


def test_a_folder_that_is_no_checkpoint_is_refused_by_the_settings_name(tmp_path, workdir, tiny_config):
  with pytest.raises(ValueError, match='model.checkpoint=.*no config.json'):
    build.build(tiny_config(settings(tmp_path)), workdir)
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  with pytest.raises(ValueError, match="model_type='bert'.*qwen3"):
    build.build(tiny_config(settings(tmp_path)), workdir)
