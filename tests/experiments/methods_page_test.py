"""docs/methods.md says what the configs are, and its guide is true."""

from __future__ import annotations

import re

import numpy as np
import pytest

from agentrl import algorithms
from agentrl.algorithms.examples import example_batch
from experiments.methods import document


@pytest.fixture(autouse=True)
def _no_results(monkeypatch, tmp_path):
  """Results come in while tests run."""
  monkeypatch.setattr(document, 'RESULTS', tmp_path)


def test_the_page_is_what_the_configs_say():
  # But for the last column, of results.
  page, now = (re.sub(r'^(\| \[.*\|)[^|]*\|$', r'\1', text, flags=re.M) for text in (
      document.PAGE.read_text(), document.write()))
  assert page == now, 'run python -m experiments.methods.document'


def test_a_result_is_told_beside_the_baseline():
  run = lambda success: {'world_hash': 'w', 'final': {'success': success}}
  results = {('dapo', 'dapo'): {0: run(.75), 1: run(.5)}, ('grpo', 'grpo'): {0: run(.5), 1: run(.25)}}
  method = {'title': 'DAPO', 'claim': dict(metric='success', better='higher', than='grpo')}
  assert document._result('dapo', method, results) == 'success 0.625, grpo 0.375, 2 seeds: reproduced'
  assert document._result('tapo', method, results) == ''


def test_a_config_without_differences_is_the_toy_world():
  assert list(document.differences(document.FOLDER / 'grpo.py')) == []
  (words,) = document.differences(document.FOLDER / 'otc_grpo.py')
  assert words == 'reward mult_eff (variant fewest, max_calls 7)'


def test_the_example_of_the_guide_is_a_whole_one():
  text = document.write()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.S)
  exec(compile(re.sub('^   ', '', code, flags=re.M), 'signs.py', 'exec'), {'__name__': 'signs'})
  (options,) = re.findall(r'`c.rl.options = ConfigDict\((.*?)\)`', text)
  batch, _ = example_batch()
  plain, signs = (algorithms.make('compose', **o).estimate(batch).advantages for o in ({}, eval(options)))
  np.testing.assert_allclose(signs, 0.5 * np.sign(plain))
