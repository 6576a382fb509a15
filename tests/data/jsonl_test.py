"""JSONL tasks: what a line gives, and what a wrong line is told."""

from __future__ import annotations

import pytest

from agentrl.core import registry
from agentrl.core import types
from agentrl.data import base


def _write(tmp_path, *lines):
  path = tmp_path / 'tasks.jsonl'
  path.write_text('\n'.join(lines), encoding='utf-8')
  return str(path)


def test_lines_become_tasks(tmp_path):
  path = _write(
      tmp_path, '{"question": "1 + 1?", "answer": "2"}', '',
      '{"id": "b", "environment": "maze", "messages": [{"role": "system", "content": "s"}], '
      '"answer": {"x": 1}, "metadata": {"family": "f"}}',
      '{"messages": [{"role": "tool", "content": "4", "name": "add"}], "answer": 4}')
  source = base.make_source('jsonl', path=path)
  assert len(source) == 3 and source[2].messages == (types.Message('tool', '4', 'add'),)
  assert source[0] == types.Task('1', 'tools', (types.Message('user', '1 + 1?'),), '2', {})
  assert source[1] == types.Task('b', 'maze', (types.Message('system', 's'),), {'x': 1},
                                 {'family': 'f'})


@pytest.mark.parametrize('line, key', [
    ('{"question": 1, "answer": ""}', "'question'"),
    ('{"question": "q"}', "'answer'"),
    ('{"answer": "a"}', "'question'"),
    ('{"question": "q", "messages": [], "answer": ""}', "'messages'"),
    ('{"messages": [], "answer": ""}', "'messages'"),
    ('{"messages": [{"role": "user"}], "answer": ""}', r"'messages\[0\]'"),
    ('{"messages": [{"role": "bot", "content": ""}], "answer": ""}', r"'messages\[0\].role'"),
    ('{"messages": [{"role": "user", "content": "", "name": "a"}], "answer": ""}', r"'messages\[0\].name'"),
    ('{"messages": [{"role": "tool", "content": "", "name": 1}], "answer": ""}', r"'messages\[0\]'"),
    ('{"question": "q", "answer": "", "anwser": ""}', "'anwser'"),
    ('{"question": "q", "answer": "", "id": 3}', "'id'"),
    ('{"question": "q", "answer": "", "id": "1"}', "'id'"),
    ('{"question": "q", "answer": "", "metadata": []}', "'metadata'"),
    ('[1]', 'list'), ('{"question":', 'JSON')])
def test_a_wrong_line_is_named_with_file_line_and_key(tmp_path, line, key):
  path = _write(tmp_path, '{"question": "q", "answer": "a"}', line)
  with pytest.raises(base.DataError, match=rf'tasks\.jsonl:2.*{key}'):
    base.make_source('jsonl', path=path)


def test_an_empty_file_is_refused(tmp_path):
  with pytest.raises(base.DataError, match='no task'):
    base.make_source('jsonl', path=_write(tmp_path, ''))


def test_an_unknown_source_lists_the_known():
  with pytest.raises(registry.UnknownNameError, match='reasoning_gym'):
    base.make_source('reasoning-gym')
