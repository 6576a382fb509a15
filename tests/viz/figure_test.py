"""The figure of one run and of several."""

from __future__ import annotations

import pytest

from agentrl.metrics import writers
from agentrl.viz import figure


def test_draws_one_run_and_several(tmp_path, run_folder):
  one = figure.write_figure(run_folder, tmp_path / 'new' / 'one.png')
  three = figure.write_figure([run_folder] * 3, tmp_path / 'three.png')
  for path in (one, three):
    assert path.read_bytes().startswith(b'\x89PNG')
  assert one.read_bytes() != three.read_bytes()


def test_a_run_without_the_stage_is_named(tmp_path):
  with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, 'sft', {'success': 0.5})
  with pytest.raises(ValueError, match=r"no 'success' in stage 'rl'; it has stages \['sft'\]"):
    figure.write_figure(tmp_path, tmp_path / 'x.png')
