"""Tests of the command line: bad input gets exit code 2 and a line on what, where and the mend."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import pytest

from agentrl import main as main_lib
from agentrl.core import config as config_lib
from agentrl.tokens import tokenizer
from agentrl.training import loop

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_process(*arguments):
  environment = {**os.environ, 'XLA_FLAGS': ''}
  return subprocess.run([sys.executable, '-m', 'agentrl.main', *arguments], cwd=_ROOT,
                        env=environment, capture_output=True, text=True, timeout=300)


def refusal(done):
  """Returns the one line of a refused start."""
  assert done.returncode == 2, done.stderr[-3000:]
  assert 'Traceback' not in done.stderr and 'Traceback' not in done.stdout
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('agentrl: ')]
  assert done.stderr.splitlines()[-1] == line  # whatever was logged came before
  return line


def run_here(config, workdir):
  """Returns the exit code of main in this process."""
  with flagsaver.flagsaver():
    flags.FLAGS(['main', '--config=given', f'--workdir={workdir}'])
    return main_lib.main(config)


@pytest.mark.parametrize('flag, words', [
    ('--trace=first', "--trace='first': 'first' names no steps of the run; give 'all', or steps such as 5 or 100-120"),
    ('--profile=-1', '--profile=-1 must be a number of steps, such as 3, or 0 for no profile'),
])
def test_steps_that_are_none_are_refused(tiny_config, tmp_path, capsys, flag, words):
  with flagsaver.flagsaver():
    flags.FLAGS(['main', '--config=given', f'--workdir={tmp_path / "run"}', flag])
    assert main_lib.main(tiny_config()) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()


@pytest.fixture
def call(tiny_config, tiny_workdir, capsys):
  """Returns a function that calls main in this process and returns what it refuses with."""

  def start(overrides=None, workdir=tiny_workdir):
    code = run_here(tiny_config(overrides), workdir)
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith('agentrl: ')]
    assert code == 2 and len(found) == 1
    return found[0]

  return start


# ---- the whole way, in a process of its own -----------------------------------------------------


def test_an_unknown_key_is_refused_by_the_nearest_one(tmp_path):
  line = refusal(run_process('--config=tests/training/tiny.py', f'--workdir={tmp_path / "run"}',
                             '--config.rl.lerning_rate=1e-3'))
  assert "unknown config key 'rl.lerning_rate'; the nearest is 'rl.learning_rate' (float" in line
  assert not (tmp_path / 'run').exists()


def test_a_refusal_at_the_start_is_one_line(tmp_path):
  line = refusal(run_process('--config=tests/training/tiny.py', f'--workdir={tmp_path / "run"}',
                             '--config.rl.algorithm=grop'))
  assert "unknown objective 'grop'; did you mean 'grpo'? Known: compose, grpo, ppo" in line


# ---- in this process, which is quicker ----------------------------------------------------------


def _refused_config(tiny_config, overrides):
  with pytest.raises(config_lib.ConfigError) as caught:
    tiny_config(overrides)
  return str(caught.value)


@pytest.mark.parametrize('key, text, words', [
    ('rl.steps', 'many', "'rl.steps' expects an int, such as 3; got 'many'"),
    ('rl.learning_rate', 'fast', "'rl.learning_rate' expects a float"),
    ('rl.reference', 'perhaps', "'rl.reference' expects true or false"),
    ('rl.options', '3', "'rl.options' is a section"),
    ('model.depth', '3', "unknown config key 'model.depth'; the nearest is"),
])
def test_values_of_the_wrong_type_are_refused(tiny_config, key, text, words):
  # `command_line.run` makes exit code 2 and a line of these errors, as the process above shows.
  assert words in _refused_config(tiny_config, {key: text})


@pytest.mark.parametrize('overrides, words', [
    ({'rl.algorithm': 'pppo'}, "unknown objective 'pppo'; did you mean 'ppo'?"),
    ({'rl.options.clip_hi': '0.3'}, "unexpected keyword argument 'clip_hi'; known: advantage"),
    ({'rl.options.kl_coef': '0.1'}, 'cannot go with a run that keeps no reference policy'),
    ({'rl.group_size': '1'}, 'a group size of 1: every advantage would be 0; take a group size of'),
    ({'tools.names': 'pithon'}, "unknown tool 'pithon'; did you mean 'python'?"),
    ({'tools.call_format': 'jason'}, "unknown call format 'jason'. Known: fenced, harmony, hermes"),
    ({'data.source': 'reasoning_gim'}, "unknown task source 'reasoning_gim'; did you mean"),
    ({'data.options.famlies': '3'}, "data.options: got an unexpected keyword argument 'famlies'"),
    ({'environment.name': 'tolls'}, "unknown environment 'tolls'; did you mean 'tools'?"),
    ({'stages': 'sft,rll'}, "unknown stage 'rll'; did you mean 'rl'? Known: eval, eval_without"),
    ({'eval.tasks': '17'}, 'eval.tasks=17 must be between 1 and the 16 held-out tasks; lower it'),
    ({'rl.prompts': '5000'}, 'batch must be between 1 and the 120 tasks'),
    ({'rl.prompts': '3', 'rl.minibatches': '2'}, 'rl.minibatches=2 does not divide rl.prompts=3'),
    ({'rl.optimizer': 'sgdd'}, "optimiser 'sgdd' is unknown; known: adafactor, adamw, muon"),
    ({'rl.schedule': 'cosin'}, "schedule 'cosin' is unknown"),
    ({'reward.weights.acuracy': '1.0'}, "weight of unknown part 'acuracy'; parts: ["),
    ({'mesh.data': '3'}, 'a mesh of data=3'),
    ({'model.num_kv_heads': '3'}, 'num_heads=2 is not a multiple of num_kv_heads=3'),
    ({'rollout.context_tokens': '30'}, 'leaves no room in rollout.context_tokens=30; raise it'),
    ({'rollout.context_tokens': '256'}, 'train.row_length=128 is below rollout.context_tokens=256'),
    ({'tokenizer.path': '/nowhere/tokenizer.model'}, '/nowhere/tokenizer.model'),
    ({'checkpoint.keep': '0'}, 'keep=0: at least one checkpoint must be kept'),
])
def test_settings_that_no_run_can_have_are_refused(call, overrides, words):
  assert words in call(overrides)


def test_a_refused_setting_can_be_mended_in_the_same_workdir(call, tmp_path):
  # Each start gets past what stopped the one before: a workdir where nothing was trained takes any
  # config.
  workdir = tmp_path / 'new'
  assert 'vocab_size 300 has no room' in call({'tokenizer.vocab_size': '300'}, workdir)
  assert 'leaves no room' in call({'rollout.context_tokens': '30'}, workdir)
  mended = {'tokenizer.vocab_size': '600', 'rl.schedule': 'cosin'}
  assert "'cosin' is unknown" in call(mended, workdir)
  assert tokenizer.Tokenizer.load(str(workdir / 'tokenizer.model')).vocab_size == 600


def test_too_few_demonstrations_are_refused(call, tmp_path):
  line = call({'sft.traces': '8'}, tmp_path / 'new')
  assert 'fewer than sft.batch_rows=8; raise sft.traces or lower sft.batch_rows' in line


def test_a_file_in_place_of_the_workdir_is_refused(call, tmp_path):
  (tmp_path / 'file').write_text('')
  assert f'the workdir {tmp_path / "file"} cannot be written' in call(workdir=tmp_path / 'file')
  assert 'Pass another --workdir' in call(workdir=tmp_path / 'file' / 'below')


def test_a_workdir_in_use_is_refused(call, tmp_path):
  (tmp_path / 'busy').mkdir()
  with open(tmp_path / 'busy' / '.lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    line = call(workdir=tmp_path / 'busy')
  assert f'another process is running in {tmp_path / "busy"}; wait for it' in line


def _jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


_GOOD = {'question': '1 + 1?', 'metadata': {'family': 'gcd'},
         'answer': {'family': 'gcd', 'question': '1 + 1?', 'answer': '2', 'metadata': {}}}


@pytest.mark.parametrize('row, words', [
    ({'question': '1 + 1?'}, "rows.jsonl:2: key 'answer' is missing"),
    ({'question': 1, 'answer': '2'}, "rows.jsonl:2: key 'question': expected str, got int"),
    (['1 + 1?'], 'rows.jsonl:2: expected an object, got list'),
    ({'question': '1 + 1?', 'answer': '2'}, "the answer of train task '2' cannot be scored"),
    ({**_GOOD, 'answer': {**_GOOD['answer'], 'family': 'gdc'}}, "train task '2' cannot be scored"),
    ({**_GOOD, 'metadata': {}}, "task '2' has no \"family\" in its metadata"),
])
def test_a_data_set_of_the_wrong_shape_is_refused(tiny_config, tmp_path, row, words, capsys):
  path = _jsonl(tmp_path / 'rows.jsonl', [_GOOD, row])
  config = tiny_config({'data.source': 'jsonl', 'data.options.path': path})
  with config.unlocked():
    del config.data.options['families']
  assert run_here(config, tmp_path / 'jsonl') == 2
  assert words in capsys.readouterr().err


def test_a_missing_data_file_is_refused(tiny_config, tmp_path, capsys):
  config = tiny_config({'data.source': 'jsonl', 'data.options.path': '/nowhere/rows.jsonl'})
  with config.unlocked():
    del config.data.options['families']
  assert run_here(config, tmp_path / 'jsonl') == 2
  assert "'/nowhere/rows.jsonl'" in capsys.readouterr().err


@pytest.fixture(scope='module')
def begun(tiny_config, tiny_folder, tmp_path_factory, quick_compile):
  """A workdir in which one evaluation was made."""
  workdir = shutil.copytree(tiny_folder, tmp_path_factory.mktemp('begun') / 'run')
  loop.run(tiny_config({'stages': 'eval:first'}), workdir)
  return pathlib.Path(workdir)


def test_a_workdir_of_another_config_is_refused(call, begun):
  before = (begun / 'config.json').read_text()
  line = call({'stages': 'eval:first', 'rl.learning_rate': '0.5', 'seed': '3'}, begun)
  assert f'{begun} was started with another config' in line
  assert 'rl.learning_rate: 0.001 -> 0.5' in line and 'seed: 0 -> 3' in line
  assert 'another --workdir' in line
  assert (begun / 'config.json').read_text() == before


def test_a_checkpoint_of_another_architecture_is_refused(call, begun):
  # Without config.json the check of the config has nothing to compare with: the arrays themselves
  # are checked.
  text = (begun / 'config.json').read_text()
  (begun / 'config.json').unlink()
  line = call({'stages': 'eval:first,eval:second', 'model.width': '48'}, begun)
  assert 'is of another architecture: leaf params.embedding has shape (512, 32)' in line
  assert "Take another workdir" in line
  (begun / 'config.json').write_text(text)


def test_a_finished_run_prints_its_summary(tiny_config, begun, capsys):
  assert run_here(tiny_config({'stages': 'eval:first'}), begun) == 0
  shown = capsys.readouterr().out
  assert all(words in shown for words in ('first.success', 'steps', 'report.html'))
