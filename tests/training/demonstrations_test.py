"""Demonstrations are written once and come back as they were."""

from __future__ import annotations

import gzip
import json

import pytest

from agentrl.core.types import Message, Task
from agentrl.synthesis import base
from agentrl.training import demonstrations

CHAT = (Message('user', '1 + 2?'), Message('assistant', '<add>1,2</add>'), Message('tool', '3', 'add'),
        Message('assistant', '3'))
TASK = Task('t', 'tools', CHAT[:1], '3')


@pytest.fixture(name='read')
def reader(tmp_path, monkeypatch):
  """Returns a function that reads the demonstrations of a workdir, or writes them."""
  def demonstrate(tasks, executor, *, seed, share_right, call_format):
    return [base.Trace(task, CHAT, 'add', True) for task in tasks]

  monkeypatch.setattr(demonstrations.DEMONSTRATORS, 'get', lambda name: demonstrate)
  return lambda: demonstrations.read_or_write(tmp_path, 'scripted', [TASK], None, None, seed=0, share_right=1.0, options={})


def test_chats_come_back_with_the_names_of_tools(read):
  assert read() == read() == [CHAT]


def test_files_of_before_messages_had_names_are_read(read, tmp_path):
  read()
  path = tmp_path / demonstrations.FILE_NAME
  stored = json.loads(gzip.decompress(path.read_bytes()))
  stored['chats'] = [[row[:2] for row in chat] for chat in stored['chats']]
  path.write_bytes(gzip.compress(json.dumps(stored).encode()))
  [chat] = read()
  assert [(m.role, m.content, m.name) for m in chat] == [(m.role, m.content, None) for m in CHAT]
