"""A run's folder as one self-contained page: `python -m agentrl.viz.report runs/quickstart`.

Reads config.json, summary.json, metrics.jsonl, timeline.json and trajectories/, each of which may be
missing or unfinished.
"""

from __future__ import annotations

import html
import json
import os
import pathlib
import sys
from typing import Any, Mapping, Sequence

from agentrl.metrics import writers
from agentrl.viz import charts
from agentrl.viz import engine
from agentrl.viz import page
from agentrl.viz import samples

# Shown first, in this order; names that end in '/' are families drawn together. Others are folded
# away.
HEADLINE = ('success', 'reward', 'token_accuracy', 'loss', 'entropy', 'calls_per_task',
            'failed_call_rate', 'response_tokens', 'kl_behaviour', 'tokens_per_second',
            'tokens_per_second/', 'seconds/')
_FRACTIONS = ('success', 'token_accuracy')  # Drawn on an axis from 0 to 1.
_TITLES = {
    'calls_per_task': 'tool calls per task',
    'kl_behaviour': 'KL to the behaviour policy',
    'seconds/': 'seconds by phase',
    'tokens_per_second/': 'tokens per second',
    'status/': 'how trajectories end',
    'entropy': 'entropy (nats)',
    'reward_std': 'reward, standard deviation'
}
_FEW = 3  # A stage of fewer lines is a table, not curves.
_FAMILY_LIMIT = 8  # Curves in one chart.

Lines = Sequence[Mapping[str, Any]]


def write_report(rundir: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` into a run's folder and returns its path.

  The page needs no network and no other file; everything that comes from the run is escaped.

  Args:
    rundir: A run's folder, of a finished, running or killed run.
  Raises:
    FileNotFoundError: if there is no such folder.
  """
  rundir = pathlib.Path(rundir)
  if not rundir.is_dir():
    raise FileNotFoundError(f'{rundir} is no folder; give the workdir of a run')
  path = rundir / 'report.html'
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(render(rundir), encoding='utf-8')
  os.replace(temporary, path)
  return path


def render(rundir: str | os.PathLike) -> str:
  """Returns the page as a string."""
  rundir = pathlib.Path(rundir)
  notes: list[str] = []
  config = _read_json(rundir / 'config.json', notes)
  summary = _read_json(rundir / 'summary.json', notes)
  try:
    lines = writers.read_metrics(rundir)
  except ValueError as error:
    lines = []
    notes.append(str(error))
  name = rundir.resolve().name
  body = [
      _header(name, lines), *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
      _cards(summary, lines),
      _tables(summary, config)
  ]
  evaluations = [
      line for line in lines if line.get('stage') == 'eval' and line.get('success') is not None
  ]
  stages = dict.fromkeys(line.get('stage', '') for line in lines)
  for stage in sorted(stages, key=lambda name: not str(name).startswith('eval')):
    body.append(
        _stage(str(stage), [line for line in lines if line.get('stage', '') == stage], evaluations))
  body.append(engine.render_engine(rundir, lines))
  body.append(samples.render_samples(rundir / 'trajectories'))
  if not lines:
    body.append('<p class="dim">No metrics yet.</p>')
  return page.document(f'{name} – agentrl', '\n'.join(body))


def _read_json(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
    return value if isinstance(value, dict) else {'value': value}
  except ValueError as error:
    notes.append(f'{path.name} cannot be read: {error}')
    return {}


def _header(name: str, lines: Lines) -> str:
  text = 'agentrl run'
  times = [line['time'] for line in lines if isinstance(line.get('time'), (int, float))]
  if times:
    minutes = (max(times) - min(times)) / 60
    text += f', {len(lines)} lines of metrics over {minutes:.1f} minutes'
    text += f', last step {lines[-1]["step"]}'
  return f'<h1>{html.escape(name)}</h1><p class="sub">{text}</p>'


def _flatten(value: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, item in value.items():
    if isinstance(item, Mapping) and item:
      flat.update(_flatten(item, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = item
  return flat


def _cards(summary: Mapping[str, Any], lines: Lines) -> str:
  """The few figures a reader wants first: the summary's, else the last of the metrics."""
  flat = _flatten(summary)
  cards = []
  for name, text, form in (('cold_start.success', 'success after cold start',
                            _percent), ('final.success', 'success at the end', _percent),
                           ('final.success_without_tool', 'the same without its tool', _percent),
                           ('final.calls_per_task', 'tool calls per task',
                            charts.number), ('final.failed_call_rate', 'of calls fail', _percent),
                           ('tokens_per_second.decode', 'tokens/s, decode',
                            charts.number), ('tokens_per_second.update', 'tokens/s, update',
                                             charts.number), ('seconds.total', 'total', _duration),
                           ('compilations_after_warmup', 'compilations after warm-up',
                            charts.number)):
    if isinstance(flat.get(name), (int, float)):
      interval = flat.get(f'{name}_ci95')
      small = ''
      if isinstance(interval, (list, tuple)) and len(interval) == 2:
        small = f' <small>95 %: {_percent(interval[0])} to {_percent(interval[1])}</small>'
      cards.append(f'<div class="card"><b>{form(flat[name])}</b><span>{text}</span>{small}</div>')
  if not cards and lines:
    for name in ('success', 'reward', 'loss', 'calls_per_task'):
      last = next((line[name] for line in reversed(lines) if _is_number(line.get(name))), None)
      if last is not None:
        cards.append(
            f'<div class="card"><b>{charts.number(last)}</b><span>{_title(name)}, last</span></div>'
        )
  return f'<div class="cards">{"".join(cards)}</div>' if cards else ''


def _percent(value: float) -> str:
  return f'{100 * value:.1f}%'


def _duration(seconds: float) -> str:
  return f'{int(seconds) // 60} min {int(seconds) % 60} s'


def _tables(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  parts = []
  for name, value in (('Summary', summary), ('Config', config)):
    if value:
      rows = ''.join(
          f'<tr><td>{html.escape(key)}</td><td class="mono">{html.escape(_short(item))}</td></tr>'
          for key, item in _flatten(value).items())
      parts.append(
          f'<details><summary>{name}</summary><div class="columns">'
          f'<table>{rows}</table></div></details>'
      )
  return ''.join(parts)


def _short(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.6g}'
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= 400 else text[:400] + '…'


def _stage(stage: str, lines: Lines, evaluations: Lines) -> str:
  names = list(
      dict.fromkeys(name for line in lines for name, value in line.items()
                    if name not in writers.RESERVED and _is_number(value) and not engine.is_shown(name)))
  title = f'<h2>{html.escape(stage or "metrics")}</h2>'
  if len(lines) < _FEW:
    shown = _family_bars(lines, names) + _line_table(lines, names)
    return f'{title}<div class="grid2">{shown}</div>'
  steps = f'<p class="sub">steps {lines[0]["step"]} to {lines[-1]["step"]}</p>'
  groups = _group(names)
  first = [_group_charts(key, groups[key], lines, evaluations) for key in HEADLINE if key in groups]
  rest = [
      _group_charts(key, groups[key], lines, evaluations) for key in groups if key not in HEADLINE
  ]
  folded = (
      f'<details><summary>{len(rest)} more</summary>'
      f'<div class="grid2">{"".join(rest)}</div></details>'
      if rest else '')
  shown = ''.join(first) + _family_bars(lines, names)
  return f'{title}{steps}<div class="grid2">{shown}</div>{folded}'


def _is_number(value: Any) -> bool:
  return isinstance(value,
                    (int, float)) and not isinstance(value, bool) and abs(value) < float('inf')


def _group(names: Sequence[str]) -> dict[str, list[str]]:
  """Names by the chart they share: those with a common 'prefix/' one, every other one its own."""
  groups: dict[str, list[str]] = {}
  for name in names:
    groups.setdefault(name.split('/')[0] + '/' if '/' in name else name, []).append(name)
  return groups


def _group_charts(key: str, names: Sequence[str], lines: Lines, evaluations: Lines) -> str:
  title = _title(key)
  if key == 'seconds/':
    kept = [line for line in lines if any(_is_number(line.get(name)) for name in names)]
    return charts.area_chart(title, [_series(name, kept) for name in names])
  fraction = all(name.split('/')[0] in _FRACTIONS for name in names)
  marks = []
  if key == 'success' and lines[0].get('stage') != 'eval':
    marks = [
        charts.Mark(line['step'], line['success'], line.get('success_ci95_low'),
                    line.get('success_ci95_high'), 'held-out') for line in evaluations
    ]
  return ''.join(
      charts.line_chart(title, [_series(name, lines)
                                for name in names[i:i + _FAMILY_LIMIT]], marks, fraction)
      for i in range(0, len(names), _FAMILY_LIMIT))


def _series(name: str, lines: Lines) -> charts.Series:
  ys = [line[name] if _is_number(line.get(name)) else None for line in lines]
  return charts.Series(name.split('/', 1)[-1], [line['step'] for line in lines], ys)


def _title(key: str) -> str:
  return _TITLES.get(key, key.rstrip('/').replace('_', ' '))


def _family_bars(lines: Lines, names: Sequence[str]) -> str:
  """Success by family at the first and the last of a few evaluations."""
  families = [name for name in names if name.startswith('success/')]
  if not families or len(lines) >= _FEW and lines[0].get('stage') != 'eval':
    return ''
  ends = [lines[0], lines[-1]] if len(lines) > 1 else [lines[0]]
  rows = [(name.split('/',
                      1)[1], [line[name] if _is_number(line.get(name)) else None
                              for line in ends])
          for name in sorted(families)]
  columns = [f'step {line["step"]}' for line in ends]
  return charts.bar_table('success by family', columns, rows)


def _line_table(lines: Lines, names: Sequence[str]) -> str:
  names = [name for name in names if not name.startswith('success/')]
  head = ''.join(f'<th class="n">step {html.escape(str(line["step"]))}</th>' for line in lines)
  rows = ''.join(f'<tr><td>{html.escape(_title(name))}</td>' +
                 ''.join(f'<td class="n">{charts.number(line.get(name))}</td>'
                         for line in lines) + '</tr>'
                 for name in names)
  return f'<figure class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></figure>'


def main(argv: Sequence[str]) -> int:
  """Writes the report of each folder named on the command line."""
  if len(argv) < 2:
    sys.stderr.write('usage: python -m agentrl.viz.report RUNDIR...\n')
    return 2
  for rundir in argv[1:]:
    sys.stdout.write(f'{write_report(rundir)}\n')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
