"""A run that starts from the policy of another."""

from __future__ import annotations

import pathlib
import shutil

import jax
import numpy as np
import pytest

from agentrl.checkpointing.checkpoints import Checkpointer
from agentrl.sampling.draw import SamplingParams
from agentrl.training import build
from agentrl.training import init_from
from agentrl.training import loop
from agentrl.training.state import LearnerState


@pytest.fixture(scope='module')
def cold_start(tiny_folder, tiny_config, tmp_path_factory, quick_compile):
  """The workdir of a run that ended after its supervised stage."""
  workdir = tmp_path_factory.mktemp('cold') / 'run'
  shutil.copytree(tiny_folder, workdir)
  loop.run(tiny_config({'stages': 'sft,', 'report': 'false'}), workdir)
  return workdir


def _new_params(config, workdir):
  parts = build.build(config, workdir)
  parts.close()
  return parts.init_params()


def test_a_run_goes_on_with_the_other_runs_policy(cold_start, tiny_config, tmp_path, quick_compile):
  settings = {'stages': 'eval:first', 'report': 'false'}
  begun = loop.run(tiny_config({**settings, 'checkpoint.init_from': str(cold_start)}), tmp_path / 'a')
  # The same evaluation as a further stage of the run itself, by its own tokenizer and parameters.
  other = shutil.copytree(cold_start, tmp_path / 'b')
  went_on = loop.run(tiny_config({**settings, 'stages': 'sft,eval:first'}), other)
  assert begun['first'] == went_on['first'] and begun['steps'] == 1
  assert (tmp_path / 'a' / 'tokenizer.model').read_bytes() == (
      cold_start / 'tokenizer.model').read_bytes()


def test_all_parameters_are_taken_over_but_a_value_head(cold_start, tiny_config, tmp_path):
  config = tiny_config({'checkpoint.init_from': str(cold_start), 'rl.algorithm': 'ppo', 'seed': '5'})
  new = _new_params(config, tmp_path)
  loaded = init_from.load_params(str(cold_start), new)
  with Checkpointer(cold_start / 'checkpoints') as checkpointer:
    kept = {name: leaf for name, leaf in new.items() if name != 'value'}
    saved = checkpointer.restore(LearnerState(kept, {}, np.int32(0)), partial=True).arrays.params
  assert set(loaded) == set(saved) | {'value'}
  jax.tree.map(np.testing.assert_array_equal, {**saved, 'value': new['value']}, loaded)
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(saved)))


def test_a_tied_output_layer_can_be_untied(cold_start, tiny_config, tmp_path):
  config = tiny_config({'checkpoint.init_from': str(cold_start), 'model.tied_embeddings': 'false'})
  loaded = init_from.load_params(str(cold_start), _new_params(config, tmp_path))
  np.testing.assert_array_equal(loaded['head'], loaded['embedding'])


def test_another_architecture_is_refused_by_name(cold_start, tiny_config, tmp_path):
  config = tiny_config({'checkpoint.init_from': str(cold_start), 'model.ff_width': '32'})
  with pytest.raises(loop.RunError, match=r'init_from.*shape'):
    loop.run(config, tmp_path / 'run')


@pytest.mark.parametrize('missing', ['checkpoints', 'tokenizer.model'])
def test_a_folder_that_is_no_run_is_refused(cold_start, tiny_config, tmp_path, missing):
  folder = pathlib.Path(shutil.copytree(cold_start, tmp_path / 'other'))
  path = folder / missing
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  with pytest.raises(loop.RunError, match='init_from.*workdir of a run'):
    loop.run(tiny_config({'checkpoint.init_from': str(folder)}), tmp_path / 'run')


def test_every_engine_of_a_run_has_the_policies_that_it_names(cold_start, tiny_config, tmp_path):
  folder = shutil.copytree(cold_start, tmp_path / 'run')
  config = tiny_config({'checkpoint.init_from': str(cold_start)})
  with config.unlocked():
    config.rollout.policies = {'judge': str(cold_start)}
  parts = build.build(config, folder)
  saved = init_from.load_params(str(cold_start), parts.init_params())
  for temperature in (1.0, 0.0):
    sampler = parts.engine(SamplingParams(temperature=temperature)).sampler
    assert sampler.policies == ('judge',)
    np.testing.assert_array_equal(sampler._params['judge']['embedding'], saved['embedding'])
  parts.close()


@pytest.mark.parametrize('spoil, message', [
    (lambda folder: (folder / 'tokenizer.model').write_bytes(b'another'), 'has not the tokenizer of this run'),
    (lambda folder: (folder / 'tokenizer.model').unlink(), 'has not the tokenizer of this run'),
    (lambda folder: shutil.rmtree(folder / 'checkpoints'), 'holds no checkpoint'),
])
def test_a_folder_without_a_policy_of_this_run_is_refused(cold_start, tiny_config, tmp_path, spoil, message):
  folder, other = (shutil.copytree(cold_start, tmp_path / name) for name in ('run', 'other'))
  spoil(other)
  config = tiny_config({'checkpoint.init_from': str(cold_start)})
  with config.unlocked():
    config.rollout.policies = {'judge': str(other)}
  parts = build.build(config, folder)
  with pytest.raises(ValueError, match=f'rollout.policies.judge=.*{message}'):
    parts.engine(SamplingParams())
  parts.close()
