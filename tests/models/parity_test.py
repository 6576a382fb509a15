"""Every family against `transformers`, an implementation of others: logits, greedy decoding, files in and out.

Expected values are what torch computes in float32 from the same random weights. Contexts are several times the sliding
window and the rope scaling's original length.
"""

from __future__ import annotations

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import pretrained, safetensors_file, transformer
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.sampler import Extension, Sampler, SlotRequest
from agentrl.sharding import mesh as meshes

torch = pytest.importorskip('torch', reason='parity needs torch, of the extra "test"')
transformers = pytest.importorskip('transformers', reason='parity needs transformers, of the extra "test"')
torch.set_num_threads(1)  # of such tensors, several only wait for one another

pytestmark = pytest.mark.usefixtures('quick_compile')

BASE = dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type='yarn', rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16)
DEFAULT = dict(rope_type='default', rope_theta=10_000.0)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {
    'qwen2': dict(rope_parameters=DEFAULT, head_dim=8, tie_word_embeddings=True),
    'qwen2-window': dict(rope_parameters=YARN, head_dim=8, use_sliding_window=True, sliding_window=8,
                         max_window_layers=1),
    'qwen3': dict(rope_parameters=YARN),
    'qwen3_moe': dict(rope_parameters=DEFAULT, num_experts=5, norm_topk_prob=True, **MOE),
    'qwen3_moe-shares': dict(rope_parameters=DEFAULT, num_experts=5, norm_topk_prob=False, **MOE),
    'llama': dict(rope_parameters=LLAMA3),
    'mistral': dict(rope_parameters=DEFAULT, sliding_window=8),
    'gemma3_text': dict(
        sliding_window=8, query_pre_attn_scalar=24, tie_word_embeddings=True,
        layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
        rope_parameters=dict(full_attention=dict(rope_type='linear', rope_theta=1000.0, factor=4.0),
                             sliding_attention=dict(rope_type='default', rope_theta=100.0))),
    'gpt_oss': dict(rope_parameters=dict(YARN, truncate=False), num_local_experts=5, sliding_window=8,
                    num_experts_per_tok=2),
}
LENGTHS = (45, 30)  # tokens of the two sequences
NEW = 64  # tokens decoded
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(3, 120, n) for n in LENGTHS]


def torch_model(name):
  """A model with random weights, none of them neutral: biases, norms and sinks are drawn as well."""
  config = transformers.AutoConfig.for_model(name.partition('-')[0], **{**BASE, **FAMILIES[name]})
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, p in model.named_parameters():
      scale = 0.1 if 'norm' in key or p.ndim == 1 else 0.25
      p.add_(torch.randn(p.shape, generator=generator) * scale)
  return model


@pytest.fixture(scope='module', params=FAMILIES, name='case')
def case_of(request, tmp_path_factory):
  """A family's torch model, the folder it was saved to, and what was read from there."""
  folder = tmp_path_factory.mktemp('checkpoint')
  model = torch_model(request.param)
  model.save_pretrained(folder)
  config, params = pretrained.from_pretrained(folder)
  return request.param, model, folder, config, params


def rows(layout):
  """The two sequences as (tokens, positions, segment ids), each in a row or both in one."""
  cells = [[(i, 0)] for i in (0, 1)] if layout == 'padded' else [[(0, 0), (1, LENGTHS[0])]]
  out = np.zeros((3, len(cells), sum(LENGTHS)), np.int32)
  for r, row in enumerate(cells):
    for i, at in row:
      here = slice(at, at + LENGTHS[i])
      out[0, r, here], out[1, r, here], out[2, r, here] = TOKENS[i], np.arange(LENGTHS[i]), i + 1
  return tuple(out), [(r, slice(at, at + LENGTHS[i])) for r, row in enumerate(cells) for i, at in row]


@functools.cache
def logits_of(config):
  def run(params, tokens, positions, segment_ids):
    return transformer.logits(params, transformer.hidden_states(params, config, tokens, positions, segment_ids))

  return jax.jit(run)


def torch_logits(model):
  """Logits of both sequences, right-padded to one length as transformers does."""
  padded = np.zeros((2, max(LENGTHS)), np.int64)
  mask = np.zeros_like(padded)
  for i, tokens in enumerate(TOKENS):
    padded[i, :LENGTHS[i]], mask[i, :LENGTHS[i]] = tokens, 1
  with torch.no_grad():
    out = model(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits.numpy()
  return [out[i, :n] for i, n in enumerate(LENGTHS)]


def test_logits_equal_on_padded_and_packed_rows(case):
  _, model, _, config, params = case
  expected = torch_logits(model)
  assert np.std(expected[0]) > 0.3  # a comparison of numbers near 0 would show nothing
  for layout in ('padded', 'packed'):
    arrays, places = rows(layout)
    got = logits_of(config)(params, *arrays)
    for place, theirs in zip(places, expected):
      np.testing.assert_allclose(got[place], theirs, atol=1e-4, rtol=0, err_msg=layout)


def test_greedy_tokens_equal_through_the_cache_and_in_one_pass(case):
  _, model, _, config, params = case
  with torch.no_grad():
    expected = model.generate(torch.tensor(TOKENS[0])[None], do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                              eos_token_id=-1)[0].numpy()
  n = LENGTHS[0]
  sampler = Sampler(config, slots=1, context=128, chunk=NEW, sampling=SamplingParams(0.0), capacities=(128,), row_buckets=(1,))
  sampler.set_params(params)
  # In two parts, so that the second looks back into the cache, and past the window.
  half = (n - 1) // 2
  for start, end in ((0, half), (half, n - 1)):
    sampler.extend([Extension(0, TOKENS[0][start:end], start)])
    sampler.flush()
  drawn = sampler.decode({0: SlotRequest(int(TOKENS[0][-1]), n - 1, NEW, (0, 0), ())})[0]
  assert len(expected) == n + NEW
  np.testing.assert_array_equal(drawn.tokens, expected[n:])
  every = jnp.asarray(expected[None], jnp.int32)
  got = logits_of(config)(params, every, jnp.arange(n + NEW, dtype=jnp.int32)[None], jnp.ones_like(every))
  np.testing.assert_array_equal(jnp.argmax(got, axis=-1)[0, n - 1:-1], expected[n:])


def test_bfloat16_goes_in_and_out_bit_for_bit_and_transformers_loads_it(case, tmp_path):
  model = copy.deepcopy(case[1]).to(torch.bfloat16)
  theirs, ours = tmp_path / 'theirs', tmp_path / 'ours'
  model.save_pretrained(theirs, max_shard_size='20KB')
  assert (theirs / pretrained.INDEX).exists()  # several files
  config, params = pretrained.from_pretrained(theirs, param_dtype='bfloat16')
  pretrained.save_pretrained(ours, params, config, source=theirs, shard_bytes=20_000)
  assert len(list(ours.glob('*.safetensors'))) > 1
  read = lambda folder: {k: v.read() for f in folder.glob('*.safetensors')
                         for k, v in safetensors_file.read_header(f).items()}
  before, after = read(theirs), read(ours)
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert value.dtype.name == 'bfloat16' == after[key].dtype.name
    np.testing.assert_array_equal(value.view(np.uint16), after[key].view(np.uint16), err_msg=key)
  load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, output_loading_info=True,
                           attn_implementation='eager', dtype=torch.float32)
  again, info = load(ours)
  assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  # The rest of config.json means the same as well: windows, frequencies, scales.
  tokens = torch.tensor(TOKENS[0])[None]
  with torch.no_grad():
    assert torch.equal(again(tokens).logits, load(theirs)[0](tokens).logits)


def test_config_json_says_all_without_the_source(case):
  # Written from the ModelConfig alone, as transformers reads it: the same settings again.
  name, _, folder, config, _ = case
  architecture = json.loads((folder / 'config.json').read_text())['architectures'][0]
  family = pretrained.family_of(architecture)
  described = transformers.AutoConfig.for_model(family.model_type, **family.describe(config)).to_dict()
  again = family.settings({**described, 'architectures': [architecture]})
  expected = family.settings(json.loads((folder / 'config.json').read_text()))
  if 'query_scale' in expected:
    expected['query_scale'] = pytest.approx(expected['query_scale'])
  assert again == expected, name


@pytest.mark.parametrize('case', ['qwen3_moe', 'gemma3_text'], indirect=True)
def test_a_checkpoint_read_onto_a_mesh_is_split_and_computes_the_same(case):
  _, model, folder, _, one = case
  mesh = meshes.make_mesh(dict(fsdp=4, tensor=2))
  config, params = pretrained.from_pretrained(folder, mesh=mesh)
  assert {s.data.shape for s in params['layers']['qkv'].addressable_shards} == {(3, 8, 1, 4, 16)}
  jax.tree.map(np.testing.assert_array_equal, params, one)
  arrays, places = rows('packed')
  got = logits_of(config)(params, *arrays)
  for place, theirs in zip(places, torch_logits(model)):
    np.testing.assert_allclose(got[place], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('case', ['qwen2', 'gemma3_text'], indirect=True)
def test_adapters_compute_the_same_in_peft_and_come_back_from_it(case, tmp_path):
  peft = pytest.importorskip('peft', reason='the format of adapters is PEFT\'s; of the extra "test"')
  _, model, folder, _, _ = case
  # Theirs to ours: on all linears but one.
  targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'down_proj']
  adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
      r=3, lora_alpha=5, target_modules=targets, task_type='CAUSAL_LM')).eval()
  with torch.no_grad():
    for key, p in adapted.named_parameters():
      if 'lora_B' in key:
        p.normal_(std=0.3)
  adapted.save_pretrained(tmp_path / 'theirs')
  config, params = pretrained.from_pretrained(folder, **pretrained.adapter_settings(tmp_path / 'theirs'))
  params = pretrained.load_adapters(tmp_path / 'theirs', params, config)
  arrays, places = rows('packed')
  got = logits_of(config)(params, *arrays)
  plain = torch_logits(model)
  for place, theirs, without in zip(places, torch_logits(adapted), plain):
    np.testing.assert_allclose(got[place], theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs - without).max() > 0.1
  # Ours to theirs.
  pretrained.save_adapters(tmp_path / 'ours', params, config, base=folder)
  again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / 'ours').eval()
  for ours, theirs in zip(torch_logits(again), torch_logits(adapted)):
    np.testing.assert_array_equal(ours, theirs)
