"""Checkpoints in and out without torch: what is refused and in which words, host memory, adapters' files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agentrl.core.registry import UnknownNameError
from agentrl.models import assembly, lora, pretrained, safetensors_file, transformer
from agentrl.models.config import ModelConfig
from agentrl.models.convert import FAMILIES, gpt_oss
from agentrl.models.params import ParamSpec, param_axes, param_specs
from agentrl.sharding import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = ModelConfig(vocab_size=40, num_layers=2, width=16, ff_width=24, num_heads=4, num_kv_heads=2, head_dim=8,
                     qk_norm=True, tied_embeddings=False)
ADAPTED = dataclasses.replace(CONFIG, lora_rank=3, lora_alpha=6.0, lora_targets=('*_proj',))


def drawn(config, seed=0):
  """Parameters that are all random, adapters' second factors as well."""
  rng = np.random.default_rng(seed)
  draw = lambda s: jnp.asarray(float(s.scale is None) + 0.3 * rng.normal(size=s.shape), config.param_dtype)
  return jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module', name='saved')
def saved_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved')
  pretrained.save_pretrained(folder, drawn(CONFIG), CONFIG, architecture='Qwen3ForCausalLM')
  return folder


@pytest.fixture(name='folder')
def own_copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoint')


def rewrite(folder, change):
  """Writes the weights again with `change` made to the dictionary of all tensors."""
  path = folder / pretrained.WEIGHTS
  tensors = {k: v.read() for k, v in safetensors_file.read_header(path).items()}
  change(tensors)
  safetensors_file.write(path, {k: v.shape for k, v in tensors.items()}, np.dtype(np.float32), tensors.get)


def set_entry(folder, **entries):
  path = folder / 'config.json'
  kept = {**json.loads(path.read_text()), **entries}
  path.write_text(json.dumps({k: v for k, v in kept.items() if v is not ...}))


def refused(folder, *words, error=ValueError, **overrides):
  with pytest.raises(error) as caught:
    pretrained.from_pretrained(folder, **overrides)
  for word in words:
    assert word in str(caught.value), (word, str(caught.value))


def test_what_is_saved_is_read_again(saved):
  config, params = pretrained.from_pretrained(saved)
  assert config == CONFIG
  equal(params, drawn(CONFIG))


def test_several_files_with_an_index_are_the_same_and_replace_a_single_one(saved, folder):
  pretrained.save_pretrained(folder, drawn(CONFIG), CONFIG, source=saved, shard_bytes=3_000)
  index = json.loads((folder / pretrained.INDEX).read_text())
  assert len(set(index['weight_map'].values())) > 2 and not (folder / pretrained.WEIGHTS).exists()
  assert index['metadata']['total_size'] == 4 * sum(x.size for x in jax.tree.leaves(drawn(CONFIG)))
  equal(pretrained.from_pretrained(folder)[1], drawn(CONFIG))


def test_the_library_of_the_format_reads_what_is_written_and_is_read(saved, folder):
  library = pytest.importorskip('safetensors.numpy', reason='the comparison needs the extra "hf"')
  tensors = library.load_file(saved / pretrained.WEIGHTS)
  ours = {k: v.read() for k, v in safetensors_file.read_header(saved / pretrained.WEIGHTS).items()}
  assert list(tensors) and tensors.keys() == ours.keys()
  equal(tensors, ours)
  library.save_file(tensors, folder / pretrained.WEIGHTS)
  equal(pretrained.from_pretrained(folder)[1], drawn(CONFIG))


def test_settings_of_a_run_and_what_a_checkpoint_has_not_are_added(saved):
  config, params = pretrained.from_pretrained(
      saved, param_dtype='bfloat16', value_head=True, lora_targets=('q_proj',), known_tokens=37)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'bfloat16'} and config.known_tokens == 37
  np.testing.assert_array_equal(params['value']['weight'], np.zeros(16))
  pair = params['layers']['lora']['q_proj']
  assert pair['a'].shape == (2, 16, 8) and pair['b'].shape == (2, 8, 32)
  assert np.std(pair['a'].astype(jnp.float32)) > 0.05 and not pair['b'].any()


def test_tensors_that_are_missing_misnamed_unexpected_or_misshapen_are_refused_by_name(folder):
  norm, query = 'model.layers.1.input_layernorm.weight', 'model.layers.0.self_attn.q_proj.weight'
  wrong = norm.replace('input', 'inputs')
  rewrite(folder, lambda t: t.update({wrong: t.pop(norm)}))
  refused(folder, 'lacks 1 tensor', repr(norm), f'there is {wrong!r}', str(folder))
  rewrite(folder, lambda t: t.update({norm: t.pop(wrong), 'model.extra': t[query]}))
  refused(folder, 'has 1 tensor', "'model.extra'")
  rewrite(folder, lambda t: t.update({query: t.pop('model.extra')[:-1]}))
  refused(folder, repr(query), '[31, 16]', '[32, 16]')
  rewrite(folder, lambda t: [t.update({query: np.zeros((32, 16), np.float32)}),
                             *(t.pop(k) for k in list(t) if 'layers.1.' in k)])
  refused(folder, 'lacks 11 tensors', ', ...')
  # Frequencies, which old checkpoints store, are nothing learnt.
  set_entry(folder, num_hidden_layers=1)
  rewrite(folder, lambda t: t.update({'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, np.float32)}))
  assert pretrained.from_pretrained(folder)[0].num_layers == 1


def test_files_that_are_cut_short_or_astray_are_refused_with_their_sizes(saved, folder):
  path = folder / pretrained.WEIGHTS
  whole = path.read_bytes()
  path.write_bytes(whole[:-5])
  last = max(safetensors_file.read_header(saved / pretrained.WEIGHTS).items(), key=lambda e: e[1].start)[0]
  refused(folder, str(path), 'cut short', repr(last), str(len(whole)), str(len(whole) - 5))
  path.write_bytes(whole[:100])
  refused(folder, str(path), '100 bytes', 'cut short')
  path.write_bytes(b'')
  refused(folder, str(path), '0 bytes')
  path.write_bytes((20).to_bytes(8, 'little') + b'no JSON at all, sir.')
  refused(folder, str(path), 'header cannot be read')
  path.unlink()
  refused(folder, pretrained.WEIGHTS, str(folder), error=FileNotFoundError)
  pretrained.save_pretrained(folder, drawn(CONFIG), CONFIG, source=saved, shard_bytes=3_000)
  gone = sorted(folder.glob('model-*'))[1]
  content = gone.read_bytes()
  gone.unlink()
  refused(folder, gone.name, pretrained.INDEX, error=FileNotFoundError)
  shutil.copy(sorted(folder.glob('model-*'))[0], gone)
  assert gone.read_bytes() != content
  refused(folder, pretrained.INDEX, gone.name, 'does not hold')


@pytest.mark.parametrize('key', ['hidden_size', 'num_key_value_heads', 'rms_norm_eps', 'rope_theta', 'head_dim'])
def test_a_config_without_a_needed_entry_is_refused_by_its_name(folder, key):
  set_entry(folder, **{key: ...})
  refused(folder, repr(key), 'Qwen3ForCausalLM', str(folder))


@pytest.mark.parametrize('entries, words', [
    (dict(hidden_act='relu'), ("hidden_act='relu'", "'silu'")),
    (dict(rope_scaling=dict(rope_type='longrope', factor=2.0)), ("rope_type='longrope'", 'yarn')),
    (dict(rope_scaling=dict(rope_type='yarn')), ("'factor'", "'yarn'")),
    (dict(rope_scaling=dict(type='yarn', factor=2.0, mscale=0.7)), ('mscale=0.7',)),
    (dict(num_attention_heads=5), ('num_heads=5', 'num_kv_heads=2')),
    (dict(use_sliding_window=True, layer_types=['full_attention']), ('layer_types', 'num_hidden_layers=2')),
    (dict(architectures=...), ("'architectures'", 'Qwen3ForCausalLM')),
])
def test_a_config_that_asks_for_something_else_is_refused(folder, entries, words):
  set_entry(folder, **entries)
  refused(folder, *words)


def test_an_unknown_architecture_lists_the_known(folder):
  set_entry(folder, architectures=['Qwen9ForCausalLM'])
  known = ('Qwen2ForCausalLM', 'Qwen3ForCausalLM', 'Qwen3MoeForCausalLM', 'LlamaForCausalLM', 'Gemma3ForCausalLM',
           'MistralForCausalLM', 'GptOssForCausalLM')
  refused(folder, "'Qwen9ForCausalLM'", *known, error=UnknownNameError)
  assert FAMILIES.names() == sorted(known)


def test_a_policy_that_the_family_has_no_word_for_is_not_written(tmp_path):
  for settings, architecture, words in (
      (dict(activation='relu2'), 'Qwen3ForCausalLM', ("activation='relu2'", "'silu'")),
      (dict(qk_norm=False), 'Qwen3ForCausalLM', ('qk_norm=False', 'True')),
      ({}, 'LlamaForCausalLM', ('qk_norm=True', 'False')),
      (dict(windows=(4, 0), qk_norm=False), 'MistralForCausalLM', ('windows=(4, 0)',)),
      (dict(lora_targets=('q_proj',)), 'Qwen3ForCausalLM', ('adapters', 'merge'))):
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(ValueError) as caught:
      pretrained.save_pretrained(tmp_path / 'out', drawn(config), config, architecture=architecture)
    assert all(word in str(caught.value) for word in words), str(caught.value)
  assert not (tmp_path / 'out').exists()


def test_host_memory_stays_under_twice_the_largest_tensor(tmp_path):
  config = dataclasses.replace(CONFIG, vocab_size=20_000, width=64, ff_width=512, num_layers=30)
  params = drawn(config)
  largest = 20_000 * 64 * 4
  assert sum(x.nbytes for x in jax.tree.leaves(params)) > 3 * largest
  tracemalloc.start()
  pretrained.save_pretrained(tmp_path, params, config, architecture='Qwen3ForCausalLM')
  assert tracemalloc.get_traced_memory()[1] < 2 * largest
  tracemalloc.reset_peak()
  _, read = pretrained.from_pretrained(tmp_path, mesh=meshes.make_mesh(dict(fsdp=4, tensor=2)))
  # On a CPU the devices' own arrays are host memory too, numpy's, and counted. On what this is for they are not.
  held = sum(shard.data.nbytes for x in jax.tree.leaves(read) for shard in x.addressable_shards)
  assert tracemalloc.get_traced_memory()[1] - held < 2 * largest
  tracemalloc.stop()
  equal(read, params)


def test_loaded_parameters_are_taken_by_programs_compiled_for_new_ones(tmp_path):
  params = jax.tree.map(jnp.asarray, drawn(CONFIG))
  pretrained.save_pretrained(tmp_path, params, CONFIG, architecture='Qwen3ForCausalLM')
  calls = []

  def double(tree):
    calls.append(0)  # once a trace
    return jax.tree.map(lambda x: 2 * x, tree)

  doubled = jax.jit(double, donate_argnums=0)
  mesh = meshes.make_mesh(dict(fsdp=4, tensor=2))
  place = lambda tree: jax.device_put(tree, meshes.shardings(param_axes(CONFIG), tree, mesh))
  want = jax.device_get(doubled(place(params)))
  _, read = pretrained.from_pretrained(tmp_path, mesh=mesh)
  equal(doubled(read), want)
  assert len(calls) == 1 and doubled._cache_size() == 1


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize('dtypes', [('bfloat16', 'bfloat16'), ('bfloat16', 'float32'), ('float32', 'float32')])
def test_a_copy_between_any_two_layouts_is_exact(order, dtypes):
  source = np.random.default_rng(0).normal(size=(5, 1, 130)).astype(jnp.dtype(dtypes[0])).transpose(order)
  target = np.zeros((2, *source.shape), jnp.dtype(dtypes[1]))
  assembly.copy(target[1], source)
  np.testing.assert_array_equal(target[1], source.astype(target.dtype))
  assert not target[0].astype(np.float32).any()


def test_an_accelerator_is_sent_what_lies_in_the_file_and_turns_it():
  source = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
  got = assembly._send(jnp.zeros((6, 3, 3)), source, [1, 1, 0], jax.devices()[0])
  want = np.zeros((6, 3, 3), np.float32)
  want[1:5, 1:3] = source
  np.testing.assert_array_equal(got, want)


def test_mxfp4_blocks_unpack_to_their_values():
  # By the format's own words: 0x5 = 0.101 = 2^(2-1) 1.5 = 3, 0x9 = 1.001 = -0.5; 129 - 127 = 2 doubles twice.
  blocks = np.zeros((1, 2, 1, 16), np.uint8)
  blocks[0, 1, 0, 3] = 0x95
  got = gpt_oss.unpack_mxfp4(blocks, np.full((1, 2, 1), 129, np.uint8)).astype(np.float32)
  expected = np.zeros((1, 32, 2))
  expected[0, 6, 1], expected[0, 7, 1] = 12.0, -2.0
  np.testing.assert_array_equal(got, expected)


def inputs(config):
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
  positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  return tokens, positions, np.ones_like(tokens)


@pytest.mark.parametrize('gated', [True, False])
def test_merged_adapters_compute_the_same_as_adapters_beside_the_weights(gated):
  config = dataclasses.replace(ADAPTED, gated_mlp=gated)
  params = drawn(config)
  merged, plain = lora.merge(params, config)
  assert plain == dataclasses.replace(config, lora_targets=()) and 'lora' not in merged['layers']
  run = lambda p, c: transformer.evaluate(p, c, *inputs(c), with_entropy=True)
  beside, within = run(params, config), run(merged, plain)
  np.testing.assert_allclose(beside.log_probs, within.log_probs, atol=2e-4)
  bare = run({**params, 'layers': {k: v for k, v in params['layers'].items() if k != 'lora'}}, plain)
  assert np.abs(bare.log_probs - within.log_probs).max() > 0.1  # they do something


def test_only_adapters_and_a_value_head_learn():
  config = dataclasses.replace(ADAPTED, lora_targets=('q_proj', 'down_proj'), value_head=True)
  params = drawn(config)

  def loss(p):
    got = transformer.evaluate(p, config, *inputs(config))
    return jnp.sum(got.log_probs) + jnp.sum(got.values)

  grads = jax.grad(loss)(params)
  optimizer = lora.adapters_only(optax.adamw(1e-2, weight_decay=0.1))
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  changed = jax.tree.map(lambda x: bool(jnp.any(x != 0)), updates)
  assert changed == lora.trained(params)
  assert changed['layers']['lora']['q_proj'] == {'a': True, 'b': True} and not changed['layers']['qkv']
  # Adam's two moments exist for what learns and for nothing else.
  trained = sum(x.size for x, t in zip(jax.tree.leaves(params), jax.tree.leaves(changed)) if t)
  assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * (trained - params['value']['bias'].size)


def test_adapters_go_out_and_in_and_others_are_refused(tmp_path):
  params = drawn(ADAPTED)
  pretrained.save_adapters(tmp_path, params, ADAPTED, base='Qwen3-8B')
  settings = pretrained.adapter_settings(tmp_path)
  config = dataclasses.replace(CONFIG, **settings)
  assert config.adapted == ADAPTED.adapted and (config.lora_rank, config.lora_alpha) == (3, 6.0)
  equal(pretrained.load_adapters(tmp_path, drawn(config, seed=1), config)['layers']['lora'], params['layers']['lora'])
  names = safetensors_file.read_header(tmp_path / pretrained.ADAPTER_WEIGHTS)
  assert len(names) == 2 * 2 * 7
  assert names['base_model.model.model.layers.1.mlp.down_proj.lora_B.weight'].shape == (16, 3)
  other = dataclasses.replace(config, lora_rank=4)
  with pytest.raises(ValueError, match='lora_rank=3.*of 4'):
    pretrained.load_adapters(tmp_path, drawn(other), other)
  entries = json.loads((tmp_path / pretrained.ADAPTER_CONFIG).read_text())
  for change, word in ((dict(use_dora=True), 'use_dora=True'), (dict(target_modules='.*'), 'write the list'),
                       (dict(r=...), "no 'r'")):
    kept = {k: v for k, v in {**entries, **change}.items() if v is not ...}
    (tmp_path / pretrained.ADAPTER_CONFIG).write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=word):
      pretrained.adapter_settings(tmp_path)
  with pytest.raises(ValueError, match='no adapters'):
    pretrained.save_adapters(tmp_path, drawn(CONFIG), CONFIG)


def test_targets_that_match_nothing_are_refused_with_those_there_are():
  with pytest.raises(ValueError, match="'k_porj' matches no linear; there are q_proj, k_proj"):
    dataclasses.replace(CONFIG, lora_targets=('q_proj', 'k_porj'))
  with pytest.raises(ValueError, match='up_proj'):
    dataclasses.replace(CONFIG, num_experts=2, experts_per_token=1, lora_targets=('up_proj',))
