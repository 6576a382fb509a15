"""Tasks from a JSONL file."""

from __future__ import annotations

import json
from typing import Any

from agentrl.core import types
from agentrl.data import base


@base.SOURCES.register('jsonl')
class JsonlSource:
  """Tasks of one file, a JSON object a line.

  Keys: `question` (str) or `messages` (list of {role, content}, and {name} of a tool), `answer` (anything); optional are
  `id` (str, the line number otherwise), `environment` (str) and `metadata` (object).

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile('w', suffix='.jsonl') as f:
    ...   _ = f.write('{"question": "1 + 1?", "answer": "2"}')
    ...   f.flush()
    ...   JsonlSource(f.name)[0].ground_truth
    '2'
  """

  def __init__(self, path: str, environment: str = 'tools'):
    """Reads the whole file.

    Args:
      path: The file.
      environment: Environment of the tasks that name none.
    Raises:
      FileNotFoundError: if there is no such file.
      base.DataError: naming file, line and key, if a line has another shape or an id comes twice.
    """
    self._tasks = []
    seen: dict[str, int] = {}
    with open(path, encoding='utf-8') as lines:
      for number, line in enumerate(lines, start=1):
        if not line.strip():
          continue
        task = _parse_line(line, number, path, environment)
        if task.id in seen:
          raise base.DataError(
              f"{path}:{number}: key 'id': {task.id!r} is taken by line {seen[task.id]}")
        seen[task.id] = number
        self._tasks.append(task)
    if not self._tasks:
      raise base.DataError(f'{path}: holds no task')

  def __len__(self) -> int:
    return len(self._tasks)

  def __getitem__(self, index: int) -> types.Task:
    return self._tasks[index]


def _parse_line(line: str, number: int, path: str, environment: str) -> types.Task:
  where = f'{path}:{number}'
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise base.DataError(f'{where}: no JSON: {error}') from error
  if not isinstance(row, dict):
    raise base.DataError(f'{where}: expected an object, got {type(row).__name__}')
  unknown = set(row) - {'id', 'environment', 'question', 'messages', 'answer', 'metadata'}
  if unknown:
    raise base.DataError(f'{where}: key {sorted(unknown)[0]!r} is unknown')
  if ('question' in row) == ('messages' in row):
    raise base.DataError(
        f"{where}: key 'question' or key 'messages' is needed, and only one of them")
  if 'answer' not in row:
    raise base.DataError(f"{where}: key 'answer' is missing")
  if 'question' in row:
    messages = (types.Message('user', _expect(row, 'question', str, where)),)
  else:
    messages = _parse_messages(_expect(row, 'messages', list, where), where)
  return types.Task(
      id=_expect(row, 'id', str, where, default=str(number)),
      environment=_expect(row, 'environment', str, where, default=environment),
      messages=messages,
      ground_truth=row['answer'],
      metadata=_expect(row, 'metadata', dict, where, default={}))


def _parse_messages(rows: list[Any], where: str) -> tuple[types.Message, ...]:
  if not rows:
    raise base.DataError(f"{where}: key 'messages': empty")
  for i, row in enumerate(rows):
    if not isinstance(row, dict) or set(row) - {'name'} != {'role', 'content'} or not all(
        isinstance(v, str) for v in row.values()):
      raise base.DataError(
          f"{where}: key 'messages[{i}]': expected {{role, content}} of strings, and a name for a tool's, got {row!r}")
    if row['role'] not in ('system', 'user', 'assistant', 'tool'):
      raise base.DataError(f"{where}: key 'messages[{i}].role': unknown role {row['role']!r}")
    if 'name' in row and row['role'] != 'tool':
      raise base.DataError(f"{where}: key 'messages[{i}].name': only results of tools have one")
  return tuple(types.Message(**row) for row in rows)


def _expect(row: dict[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
  if key not in row and default is not None:
    return default
  if not isinstance(row[key], kind):
    raise base.DataError(
        f'{where}: key {key!r}: expected {kind.__name__}, got {type(row[key]).__name__}')
  return row[key]
