"""The page shows a run whole, whatever the run wrote, and asks nobody for anything."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from agentrl.core import types
from agentrl.metrics import writers
from agentrl.rollout import store
from agentrl.viz import charts
from agentrl.viz import report
from agentrl.viz import samples

_VOID = {'meta', 'input', 'circle', 'line', 'path', 'polygon'}


class Page(html.parser.HTMLParser):
  """What a browser sees: tags, attributes, and the text of tokens."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.open: list[str] = []
    self.text = ''
    self.feed(text)
    assert self.open == []  # Everything that was opened was closed.

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not {'script', 'style'} & set(self.open):
      self.text += data

  def with_class(self, name: str) -> list[dict]:
    return [attrs for _, attrs in self.tags if name in (attrs.get('class') or '').split()]


@pytest.fixture(scope='module')
def text(run_folder) -> str:
  return report.write_report(run_folder).read_text(encoding='utf-8')


def test_hostile_text_stays_text(text, hostile):
  page = Page(text)
  assert hostile in page.text  # Shown as it was, in the output of the tool and in the config.
  assert [tag for tag, _ in page.tags
         ].count('script') == 1 and 'img' not in [tag for tag, _ in page.tags]
  assert not [name for _, attrs in page.tags for name in attrs if name.startswith('on')]


def test_nothing_is_loaded_from_anywhere(text):
  for tag, attrs in Page(text).tags:
    assert tag not in ('link', 'iframe', 'object', 'embed', 'base', 'image', 'use'), tag
    assert not {'src', 'href', 'xlink:href', 'srcset', 'action'} & set(attrs), (tag, attrs)
  style = re.search(r'<style>(.*?)</style>', text, re.S).group(1)
  assert 'url(' not in style and '@import' not in style
  assert "default-src 'none'" in text


def test_the_browser_runs_our_script_only(text):
  import base64
  import hashlib
  script = re.search(r'<script>(.*?)</script>', text, re.S).group(1)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}'\"" in text


def test_headline_metrics_come_first_and_the_rest_is_folded(text):
  rl = re.search(r'<h2>rl</h2>(.*?)<h2>', text, re.S).group(1)
  before, folded = rl.split('<details>')
  titles = lambda part: re.findall(r'<figcaption>(.*?)</figcaption>', part)
  assert titles(before) == [
      'success', 'reward', 'loss', 'entropy (nats)', 'tool calls per task', 'failed call rate',
      'response tokens', 'KL to the behaviour policy', 'tokens per second', 'seconds by phase'
  ]
  assert {'how trajectories end', 'grad norm', 'log prob gap max'} <= set(titles(folded))


def test_figures_of_the_summary_and_evaluations_are_shown(text):
  page = Page(text)
  assert '94.0%' in page.text and '90.0% to 97.0%' in page.text and '10 min 55 s' in page.text
  # The RL curve carries both evaluations, and each step's values are there for hovering.
  charts = [json.loads(attrs['data-chart']) for _, attrs in page.tags if 'data-chart' in attrs]
  success = next(c for c in charts if c['series'][0][0] == 'success' and c['marks'])
  assert [mark[1:] for mark in success['marks']] == [[200, 0.55], [280, 0.94]]
  assert len(success['series'][0][1]) == 80


def _section(text: str) -> str:
  return re.search(r'<h2>Engine</h2>(.*?)<h2>', text, re.S).group(1)


def test_the_engine_has_a_section_of_its_own(text):
  section = _section(text)
  assert re.findall(r'<figcaption>(.*?)</figcaption>', section) == [
      'last rollout: step 279, 2 s', 'wall time of a rollout (s)', 'shares', 'tokens of a step',
      'sessions wait: seconds, added up over sessions', 'tokens per second of the device alone',
      'seats over time: the rollout of step 279 (rl); blank where a seat is free and while the host is at work'
  ]
  shares = re.findall(r'width:([\d.]+)%', section)
  assert shares == ['80.00', '5.00', '10.00', '2.50', '2.50']  # of 2 s
  assert 'decode: 1.6 s, 80 %' in section and 'idle, all wait for tools: 0.1 s, 5 %' in section
  # What is shown here is shown nowhere else.
  assert 'cache_fill' not in text and 'decode alone' not in text


def test_the_timeline_has_a_span_for_every_run_of_bins(text):
  svg = re.search(r'<svg class="spans".*?</svg>', _section(text), re.S).group(0)
  paths = dict(re.findall(r'--k:var\(--c(\d)\)" d="(.*?)"', svg))
  # Blue for 64 slots that draw, orange for those that wait; the device's prefill first.
  names = re.findall(r'--c(\d)', svg)
  assert names == ['2', '0', '1', '0', '1']
  spans = re.findall(r'd="(.*?)"', svg)
  assert [path.count('M') for path in spans] == [1, 1, 1, 64, 64] and set(paths) == {'0', '1', '2'}
  # The rows do not overlap, and every eighth seat is named.
  tops = [float(y) for y in re.findall(r'M[\d.]+ ([\d.]+)H', spans[3])]
  assert tops == sorted(tops) and {b - a for a, b in zip(tops, tops[1:])} == {7.0}
  assert re.findall(r'>(seat \d+)<', svg) == [f'seat {i}' for i in range(0, 64, 8)]
  left, right = (float(x) for x in re.search(r'M([\d.]+) [\d.]+H([\d.]+)', spans[1]).groups())
  prefill = re.search(r'M([\d.]+) [\d.]+H([\d.]+)', spans[0]).groups()
  assert float(prefill[1]) == left and right - left == pytest.approx(8 * (left - float(prefill[0])), abs=0.5)


def test_few_slots_are_all_named():
  rows = [('device', [('decode', 0, 5)]), *((f'<slot {i}>', [('draw', 0, 5)]) for i in range(3))]
  svg = charts.span_chart('a & b', rows, 5, 1.0, {'draw': 0}, (('draws', 0),))
  assert [f'&lt;slot {i}&gt;' in svg for i in range(3)] == [True] * 3 and 'a &amp; b' in svg
  Page(svg)
  Page(charts.span_chart('nothing', [('device', [])], 5, 0.0, {}, ()))


def test_a_run_of_few_rollouts_shows_the_last_one(tmp_path, run_folder):
  line = next(l for l in reversed(writers.read_metrics(run_folder)) if l['stage'] == 'rl')
  with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, 'eval', {k: v for k, v in line.items() if k not in writers.RESERVED})
  page = report.render(tmp_path)
  assert 'last rollout: step 0, 2 s' in page and 'slots over time' not in page
  (tmp_path / 'timeline.json').write_text('{"step"')
  page = Page(report.render(tmp_path))
  assert len(page.with_class('note')) == 1 and 'timeline.json holds no timeline' in page.text


def test_tokens_carry_who_wrote_them_and_their_numbers(tmp_path):
  task = types.Task('t', 'math', (), 0)
  trajectory = types.Trajectory(task,
                                0,
                                'g',
                                0,
                                status=types.Status.FINISHED,
                                rewards={'total': 1.0})
  segment = trajectory.segments[0]
  segment.append_forced([0, 1], 0)
  segment.append_sampled([2, 3], [-0.05, -5.0], [0.01, 2.0], 0)
  segment.append_forced([4], 1)
  segment.append_sampled([5], [-1.0], [0.5], 1)
  trajectory.turns = [types.Turn(0, 0, 2, 4, 'x', 'stop'), types.Turn(1, 0, 5, 6, 'y', 'length')]
  pieces = ['<|user|>', '▁2', '<call>', '+', '<0x0A>', '\t']
  store.TrajectoryStore(tmp_path, pieces.__getitem__).write(
      0, [trajectory], {'advantages': [[np.array([9, 9, 1.0, -2.0, 9, 0.0])]]})
  rendered = samples.render_samples(tmp_path)
  tokens = [attrs for _, attrs in Page(rendered).tags if 't' in (attrs.get('class') or '').split()]
  # Shades: advantages over the largest, 2, in quarters; log-prob and entropy by the edges in
  # samples.py.
  assert [attrs['class'].split()[1:] for attrs in tokens] == [['p', 'm'], ['p'],
                                                              ['s', 'm', 'l0', 'e0', 'a2'],
                                                              ['s', 'l4', 'e4', 'a-4'], ['o'],
                                                              ['s', 'l2', 'e2', 'a0']]
  assert 'advantage -2.000' in tokens[3]['data-i'] and 'log-prob -5.000' in tokens[3]['data-i']
  assert 'turn 0: stop' in rendered and 'turn 1: length' in rendered


def test_best_and_worst_of_first_middle_and_last_step_are_shown(run_folder, text):
  files = store.list_paths(run_folder / 'trajectories')
  assert [store.step_of(p) for p in files] == [200, 240, 279]
  sections = re.split(r'<h3>Step ', text)[1:]
  assert [int(section.split()[0]) for section in sections] == [200, 240, 279]
  for path, section in zip(files, sections):
    rewards = sorted(t.rewards['total'] for t in store.read(path).trajectories)
    shown = [float(x) for x in re.findall(r'total ([\d.]+)', section)]
    assert len(shown) == 4
    assert shown[:2] == pytest.approx(rewards[-2:]) and shown[2:] == pytest.approx(rewards[:2])


@pytest.mark.parametrize('missing',
                         ['config.json', 'summary.json', 'metrics.jsonl', 'trajectories', None])
def test_a_run_that_is_not_finished_is_shown_as_far_as_it_went(tmp_path, run_folder, missing):
  folder = tmp_path / 'run'
  shutil.copytree(run_folder, folder)
  if missing == 'trajectories':
    shutil.rmtree(folder / missing)
  elif missing:
    (folder / missing).unlink()
  else:
    (folder / 'summary.json').write_text('{"final": ')
    with open(folder / writers.FILE_NAME, 'a') as f:
      f.write('{"step": 281, "st')
    damaged = store.list_paths(folder / 'trajectories')[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
  page = Page(report.write_report(folder).read_text(encoding='utf-8'))
  assert ('No metrics yet' in page.text) == (missing == 'metrics.jsonl')
  assert len(page.with_class('note')) == (2 if missing is None else 0
                                         )  # The summary and the trajectory file.
  assert len(page.with_class('traj')) == {'trajectories': 0, None: 8}.get(missing, 12)


def test_any_names_of_metrics_and_stages_will_do(tmp_path):
  with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in range(5):
      writer.write(step, '<odd>', {
          'a/b/c': step,
          'no value': float('nan'),
          '<x>': -1e30,
          'success/one': 0.5
      })
  page = Page(report.render(tmp_path))
  assert '<odd>' in page.text and '<x>' in page.text


def test_a_folder_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='workdir'):
    report.write_report(tmp_path / 'nowhere')


def test_runs_from_the_command_line(run_folder):
  done = subprocess.run([sys.executable, '-m', 'agentrl.viz.report',
                         str(run_folder)],
                        capture_output=True,
                        text=True,
                        timeout=60)
  assert done.returncode == 0 and done.stdout.strip() == str(run_folder / 'report.html')
