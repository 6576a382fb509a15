"""Tasks of the chain world."""

from __future__ import annotations

import json
import re

import pytest

from agentrl.data import base
from agentrl.data import chains as data
from agentrl.tools import chains


def _walk(question, table):
  """The chain by its definition: digit, then letters and sums from left to right."""
  start, *steps = re.findall(r'\+\d|.', question)
  value = int(start)
  for step in steps:
    value = value + int(step) if step[0] == '+' else chains.fact(f'{step}{value}', table)
  return str(value)


def test_answers_are_what_the_chain_comes_to():
  source = base.make_source('chains', split='train', size=300)
  for i in range(len(source)):
    task = source[i]
    truth = task.ground_truth
    assert truth['answer'] == _walk(task.messages[0].content, truth['table'])
    assert set(''.join(truth['needed'])) <= set(chains.PRIVATE + '0123456789')
    assert truth == json.loads(json.dumps(truth))
    facts = truth['needed'] + truth['known']
    assert len(set(facts)) == len(facts)


def test_reading_twice_gives_equal_tasks_and_seeds_differ():
  read = lambda **kw: [data.ChainSource('train', size=50, **kw)[i] for i in range(50)]
  assert read() == read() != read(seed=1)
  assert data.ChainSource('train', size=50)[-1] == read()[-1]


def test_splits_share_no_question():
  questions = {split: {t.messages[0].content for t in data.ChainSource(split, size=2_000, test_size=2_000)}
               for split in ('train', 'test')}
  assert questions['train'] and questions['test']
  assert not questions['train'] & questions['test']


def test_known_share_decides_what_needs_a_call():
  never = [t.ground_truth for t in data.ChainSource('train', size=200, known_share=0.0)]
  assert not any(t['known'] for t in never)
  # Never two known steps in a row, so with share 1 they alternate: of four steps two are known.
  always = data.ChainSource('train', size=200, known_share=1.0, hops=(4, 4))
  kinds = {re.sub(r'\+\d|[PQ]', 'k', re.sub('[FGHK]', 'p', t.messages[0].content[1:]))
           for t in always}
  assert kinds == {'kpkp'}


@pytest.mark.parametrize('settings', [
    dict(split='dev'), dict(hops=(0, 1)), dict(hops=(3, 2)), dict(size=0), dict(test_size=0), dict(known_share=1.5),
    dict(sum_share=-1)])
def test_settings_out_of_range_are_refused(settings):
  with pytest.raises(ValueError):
    data.ChainSource(**{'split': 'train', **settings})


def test_an_index_out_of_range_ends_iteration():
  with pytest.raises(IndexError):
    data.ChainSource('test', test_size=3)[3]  # pylint: disable=expression-not-assigned
