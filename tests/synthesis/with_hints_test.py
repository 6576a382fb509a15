"""Tests of demonstrations with hints: a share of another demonstrator's traces, otherwise as they were."""

from __future__ import annotations

import pytest

from agentrl import tools
from agentrl.data.chains import ChainSource
from agentrl.synthesis import base
from agentrl.tokens import formats


@pytest.fixture(scope='module', name='write')
def _write():
  with tools.Executor([tools.make('lookup'), tools.make('noise')]) as executor:
    call_format = formats.make('xml', list(executor.tools.values()))
    source = ChainSource('train', size=60)
    yield lambda name, **o: base.DEMONSTRATORS.get(name)(
        [source[i] for i in range(60)], executor, seed=1, share_right=0.7, call_format=call_format, **o)


@pytest.mark.parametrize('kind', ['cases', 'advice'])
def test_a_share_of_the_traces_begins_with_a_hint(write, kind):
  plain, hinted = write('chains'), write('with_hints', kind=kind, share=0.5)
  extra = [h.messages[:len(h.messages) - len(p.messages)] for p, h in zip(plain, hinted)]
  assert all(h.messages[len(e):] == p.messages for p, h, e in zip(plain, hinted, extra))
  found = [e[0] for e in extra if e]
  assert 15 < len(found) < 45 and all(len(e) <= 1 for e in extra) and {m.role for m in found} == {'system'}
  words = ('yes', 'no') if kind == 'cases' else ('do',)
  assert all(set(words) & set(m.content.split()) for m in found)
  assert hinted == write('with_hints', kind=kind, share=0.5)
  assert write('with_hints', kind=kind, share=0.0) == plain


@pytest.mark.parametrize('options, words', [({'kind': 'rumours'}, 'one of cases, advice'), ({'share': 2.0}, r'in \[0, 1\]'),
                                            ({'noice': 0.1}, 'noice')])
def test_bad_options_are_refused(write, options, words):
  with pytest.raises((ValueError, TypeError), match=words):
    write('with_hints', **options)
