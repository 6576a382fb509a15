"""Tests of config files and overrides. Expected values are those written in the config below."""

from __future__ import annotations

import json
import math
import sys

from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_dict
from ml_collections import ConfigDict
import pytest

from agentrl.core import config as config_lib

_BASE = """
from ml_collections import ConfigDict, config_dict

def get_config():
  config = ConfigDict()
  config.seed = 0
  config.name = 'base'
  config.limit = config_dict.placeholder(int)
  config.note = None
  config.stages = ('sft', 'rl')
  config.optimizer = ConfigDict({'learning_rate': 0.1, 'warmup': 3, 'nesterov': False})
  config.tool_options = ConfigDict()
  config.clip = (0.2, 0.2)
  return config.lock()
"""


def _base() -> ConfigDict:
  namespace = {}
  exec(_BASE, namespace)
  return namespace['get_config']().unlock()


def _folder(path, **files):
  folder = path / 'configs'
  folder.mkdir()
  (folder / 'base.py').write_text(_BASE)
  for name, text in files.items():
    (folder / f'{name}.py').write_text(text)
  return folder


_DERIVED = 'from configs import base\ndef get_config():\n  config = base.get_config()\n'


@pytest.mark.parametrize('path, text, expected', [
    ('seed', '7', 7),
    ('seed', '1_000', 1000),
    ('seed', '-3', -3),
    ('optimizer.learning_rate', '1', 1.0),
    ('optimizer.learning_rate', '3e-4', 3e-4),
    ('optimizer.learning_rate', 'inf', math.inf),
    ('optimizer.nesterov', 'True', True),
    ('optimizer.nesterov', '0', False),
    ('optimizer.nesterov', None, True),
    ('name', '3', '3'),
    ('name', 'a=b,c', 'a=b,c'),
    ('name', '', ''),
    ('note', '3', 3),
    ('note', 'three words here', 'three words here'),
    ('note', 'None', None),
    ('limit', '5', 5),
    ('limit', 'None', None),
    ('stages', 'eval', ('eval',)),
    ('stages', 'sft,eval', ('sft', 'eval')),
    ('stages', "('sft', 'eval')", ('sft', 'eval')),
    ('stages', '()', ()),
    ('clip', '[1, 0.3]', (1.0, 0.3)),
])
def test_override_takes_the_type_of_the_default(path, text, expected):
  config = _base()
  config_lib.apply_overrides(config, {path: text})
  value = config_lib.flatten(config)[path]
  assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize('path, text, words', [
    ('sed', '1', "unknown config key 'sed'; the nearest is 'seed' (int, 0)"),
    ('optimizer.learningrate', '1', "the nearest is 'optimizer.learning_rate' (float, 0.1)"),
    ('learning_rate', '1', "the nearest is 'optimizer.learning_rate'"),
    ('optimiser.warmup', '1', "the nearest is 'optimizer.warmup' (int, 3)"),
    ('seed.deeper', '1', "unknown config key 'seed.deeper'"),
    ('qqqqq', '1', 'known sections and keys: clip, limit, name'),
    ('seed', 'x', "config key 'seed' expects an int, such as 0; got 'x'"),
    ('seed', '1.5', 'expects an int'),
    ('seed', '1e6', 'expects an int'),
    ('seed', 'None', 'expects an int'),
    ('seed', None, "config key 'seed' needs a value: --config.seed=0"),
    ('limit', 'x', 'expects an int'),
    ('optimizer.learning_rate', 'fast', 'expects a float, such as 0.1'),
    ('optimizer.learning_rate', 'nan', 'expects a float'),
    ('optimizer.nesterov', 'maybe', 'expects true or false'),
    ('optimizer', '4', 'is a section without a value; its keys: optimizer.learning_rate'),
    ('clip', 'a,b', 'expects a tuple of float'),
    ('stages', '(1, 2)', 'expects a tuple of str'),
])
def test_wrong_override_is_refused_in_words(path, text, words):
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.apply_overrides(_base(), {path: text})
  assert words in str(info.value)


def test_nothing_changes_when_one_of_several_overrides_is_refused():
  config = _base()
  with pytest.raises(config_lib.ConfigError):
    config_lib.apply_overrides(config, {'seed': '5', 'name2': 'x'})
  assert config_lib.diff(config, _base()) == {}


def test_override_reaches_into_a_tuple_of_sections():
  config = ConfigDict({'stages': (ConfigDict({'steps': 1}), ConfigDict({'steps': 2}))})
  config_lib.apply_overrides(config, {'stages.1.steps': '9'})
  assert [stage.steps for stage in config.stages] == [1, 9]
  with pytest.raises(config_lib.ConfigError):
    config_lib.apply_overrides(config, {'stages.2.steps': '9'})


def test_override_follows_references():
  # ml_collections keeps a reference to another key lazy; an override of the key must reach it.
  config = ConfigDict({'seed': 1})
  config.other = config.get_ref('seed') * 2
  config_lib.apply_overrides(config, {'seed': '4'})
  assert config.other == 8


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(),
                 st.lists(st.integers(), min_size=1).map(tuple)))
def test_text_of_a_value_overrides_to_that_value(value):
  config = ConfigDict({'key': value})
  config_lib.apply_overrides(config, {'key': str(value)})
  assert config.key == value


@pytest.mark.parametrize('change, words', [
    ({'sede': 1}, "unknown config key 'sede'; the nearest is 'seed'"),
    ({'optimizer': {'lerning_rate': 1.0}}, "'optimizer.lerning_rate'; the nearest is "
                                           "'optimizer.learning_rate'"),
    ({'seed': 'x'}, "config key 'seed' expects an int"),
    ({'seed': True}, 'expects an int'),
    ({'seed': None}, 'expects an int'),
    ({'seed': 1.0}, 'expects an int'),
    ({'optimizer': {'nesterov': 1}}, 'expects true or false'),
    ({'optimizer': 3}, 'expects a section'),
    ({'name': {'a': 1}}, 'expects a str'),
])
def test_config_that_disagrees_with_the_reference_is_refused(change, words):
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.check_keys(ConfigDict(change), _base())
  assert words in str(info.value)


@pytest.mark.parametrize('change', [
    {}, {'limit': 3}, {'limit': None}, {'note': (1, 2)}, {'stages': ['rl']},
    {'optimizer': {'learning_rate': 1}}, {'tool_options': {'timeout': 3, 'deeper': {'x': None}}},
])
def test_config_that_agrees_with_the_reference_passes(change):
  config_lib.check_keys(ConfigDict(change), _base())


def test_load_reads_a_file_that_imports_base_from_any_folder(tmp_path, monkeypatch):
  folder = _folder(tmp_path, run=_DERIVED + '  config.name = "run"\n  return config\n')
  monkeypatch.chdir('/')
  for name in [name for name in sys.modules if name.partition('.')[0] == 'configs']:
    monkeypatch.delitem(sys.modules, name)
  config = config_lib.load(folder / 'run.py', {'seed': '3'}, folder / 'base.py')
  assert (config.name, config.seed, config.optimizer.warmup) == ('run', 3, 3)
  with pytest.raises(AttributeError):
    config.unheard_of = 1


def test_load_passes_on_what_follows_a_colon(tmp_path):
  path = tmp_path / 'sweep.py'
  path.write_text('from ml_collections import ConfigDict\n'
                  'def get_config(index):\n  return ConfigDict({"index": index})\n')
  assert config_lib.load(f'{path}:3').index == '3'


@pytest.mark.parametrize('text, words', [
    ('def get_config(:', 'SyntaxError'),
    ('import does_not_exist_anywhere', 'at line 1: ModuleNotFoundError'),
    ('x = 1', 'has no attribute'),
    ('def get_config():\n  return {}', 'returned a dict, not a ConfigDict'),
    (_BASE.replace('return config.lock()', 'config.lock()\n  config.sede = 1'),
     'AttributeError: Key "sede" does not exist'),
    (_BASE.replace('return config.lock()', 'config.seed = "x"\n  return config'), 'TypeError'),
])
def test_broken_config_file_is_reported_as_such(tmp_path, text, words):
  path = tmp_path / 'broken.py'
  path.write_text(text)
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.load(path)
  assert 'broken.py' in str(info.value) and words in str(info.value)
  assert 'FieldReference' not in str(info.value)


def test_missing_config_file_names_the_nearest(tmp_path):
  folder = _folder(tmp_path)
  with pytest.raises(config_lib.ConfigError, match='no config file .*; the nearest is .*base.py'):
    config_lib.load(folder / 'bass.py')


def test_types_of_overrides_come_from_the_reference(tmp_path):
  # The file's own types are narrower than base's: an int learning rate, a note that is a number.
  path = tmp_path / 'own.py'
  path.write_text('from ml_collections import ConfigDict\ndef get_config():\n'
                  '  return ConfigDict({"optimizer": {"learning_rate": 1}, "note": 3})\n')
  config = config_lib.load(path, {'optimizer.learning_rate': '0.5', 'note': 'None'}, _base())
  assert config.optimizer.learning_rate == 0.5 and config.note is None


def test_json_round_trip_differs_in_nothing():
  config = _base()
  assert config_lib.diff(config, config_lib.from_json(config_lib.to_json(config))) == {}
  assert json.loads(config_lib.to_json(config))['stages'] == ['sft', 'rl']


def test_json_names_the_key_that_cannot_be_written():
  with pytest.raises(config_lib.ConfigError, match="config key 'a.b' holds"):
    config_lib.to_json(ConfigDict({'a': {'b': len}}))


def test_diff_names_changed_added_and_removed_keys():
  old = ConfigDict({'a': 1, 'b': {'c': 2, 'd': 3}})
  new = ConfigDict({'a': 1, 'b': {'c': 5}, 'e': 6})
  assert config_lib.diff(old, new) == {
      'b.c': (2, 5), 'b.d': (3, config_lib.ABSENT), 'e': (config_lib.ABSENT, 6)}


def test_diff_tells_a_bool_from_an_int_and_keeps_int_equal_to_float():
  # True == 1 in Python, yet it is another setting.
  assert config_lib.diff(ConfigDict({'a': True}), ConfigDict({'a': 1})) == {'a': (True, 1)}
  assert config_lib.diff(ConfigDict({'a': 1.0}), ConfigDict({'a': 1})) == {}


def test_flatten_keeps_empty_sections_and_placeholders():
  config = ConfigDict({'a': {}, 'b': config_dict.placeholder(int)})
  assert config_lib.flatten(config) == {'a': ConfigDict(), 'b': None}


@pytest.mark.parametrize('path, text, value', [
    ('tool_options.coef', '0.1', 0.1),
    ('tool_options.clip', 'recip', 'recip'),
    ('tool_options.whiten', None, True),
])
def test_overrides_may_put_keys_into_open_sections(path, text, value):
  # What Python reads the text as; what it cannot read stays text.
  config = _base().lock()
  config_lib.apply_overrides(config, {path: text}, _base())
  assert config_lib.flatten(config)[path] == value
  with pytest.raises(config_lib.ConfigError):
    config_lib.apply_overrides(config, {path + 'x': text})
