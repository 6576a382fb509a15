"""The cold start's demonstrations: written once a workdir, then read back."""

from __future__ import annotations

import functools
import gzip
import json
import os
import pathlib
from typing import Any, Mapping, Sequence

from absl import logging
import numpy as np

from agentrl.core import registry
from agentrl.core.types import Message, Task
from agentrl.synthesis.base import DEMONSTRATORS
from agentrl.tokens.chat import ChatTemplate
from agentrl.training.packing import TokenSequence

FILE_NAME = 'demonstrations.json.gz'
Chat = tuple[Message, ...]


def read_or_write(workdir: pathlib.Path, name: str, tasks: Sequence[Task], executor: Any, call_format: Any, *,
                  seed: int, share_right: float, options: Mapping[str, Any]) -> list[Chat]:
  """Returns one scripted chat a task, without the system message.

  Blocks while the calls of new demonstrations run, about half a millisecond each.

  Args:
    workdir: Where they are kept.
    name: Of the demonstrator; see `agentrl.synthesis.base`.
    tasks: What to demonstrate.
    executor: Of the run.
    call_format: Of the run.
    seed: Of the demonstrator's choices.
    share_right: Share that is scripted to end in a right answer.
    options: Further arguments of the demonstrator.
  Raises:
    ValueError: if the workdir holds others, or the demonstrator refuses the tasks or its options.
  """
  path = workdir / FILE_NAME
  recipe = {'demonstrator': name, 'tasks': len(tasks), 'seed': seed, 'share_right': share_right, **options}
  if path.exists():
    with gzip.open(path, 'rt', encoding='utf-8') as file:
      stored = json.load(file)
    if stored['recipe'] == recipe:
      return [tuple(Message(*m) for m in chat) for chat in stored['chats']]
    raise ValueError(f'{path} was written for {stored["recipe"]}, the config now asks for {recipe}; '
                     'use another workdir or remove the file')
  write = functools.partial(DEMONSTRATORS.get(name), tasks, executor, seed=seed, share_right=share_right,
                            call_format=call_format)
  traces = registry.call('sft.options', write, options)
  logging.info('%d demonstrations, %.0f %% end in a right answer', len(traces),
               100 * np.mean([t.right for t in traces]))
  temporary = path.with_suffix('.tmp')
  with gzip.open(temporary, 'wt', encoding='utf-8', compresslevel=3) as file:
    json.dump({'recipe': recipe, 'chats': [[_row(m) for m in t.messages] for t in traces]}, file)
  os.replace(temporary, path)
  return [t.messages for t in traces]


def _row(message: Message) -> tuple[str, ...]:
  return (message.role, message.content, *([message.name] if message.name else ()))


def tokenize(chats: Sequence[Chat], template: ChatTemplate, schemas: Sequence[Any],
             row_length: int) -> list[TokenSequence]:
  """Returns the chats as sequences whose loss mask is what the assistant wrote.

  Chats longer than a row are left out and counted in the log.
  """
  sequences = []
  for i, messages in enumerate(chats):
    ids, mask = template.render_with_mask(messages, tools=schemas)
    if len(ids) <= row_length:
      n = len(ids)
      sequences.append(TokenSequence(np.asarray(ids, np.int32), np.asarray(mask, bool), np.zeros(n, np.float32),
                                     np.zeros(n, np.int32), len(sequences)))
  if len(sequences) < len(chats):
    logging.warning('%d of %d demonstrations are longer than train.row_length=%d and are left out',
                    len(chats) - len(sequences), len(chats), row_length)
  return sequences
