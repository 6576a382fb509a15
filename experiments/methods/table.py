"""Sets each method beside its own baseline in what its source claims: `python experiments/methods/table.py`.

Reads results/*.json, writes results.md and results.png beside this file. README.md says what the
verdicts mean. Needs matplotlib (extra `viz`) for the figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import pathlib
import statistics
import sys
from typing import Any, Mapping, Sequence

import rich.console
from scipy import stats

_HERE = pathlib.Path(__file__).resolve().parent
_CONFIGS = _HERE.parents[1] / 'configs' / 'methods'
# An economy that costs more success than this is none.
SUCCESS_MARGIN = 0.03
METRICS = {'success': 'success', 'calls_per_task': 'calls a task', 'avoidable_calls': 'avoidable calls a task',
           'failed_call_rate': 'share of calls that fail', 'response_tokens': 'tokens a task', 'entropy': 'entropy, nats',
           'seconds': 'seconds of training'}
YES, DIRECTION, COSTLY, NO = 'reproduced', 'direction only', 'at the cost of success', 'not reproduced'

Results = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A method beside its baseline.

  Attributes:
    method: Name of its config.
    title: As the config has it.
    than: Name of the baseline; '' where nothing is claimed.
    metric: What the claim is about; '' where nothing is claimed.
    ours: Value of the metric by seed.
    theirs: The same of the baseline, of the same seeds.
    gain: Mean over seeds of how much better the method is, positive as claimed.
    low: Lower end of its 95 % interval; NaN below two seeds.
    success: Mean success of the method and of the baseline.
    verdict: See README.md; '' where nothing is claimed.
  """

  method: str
  title: str
  than: str
  metric: str
  ours: tuple[float, ...]
  theirs: tuple[float, ...]
  gain: float
  low: float
  success: tuple[float, float]
  verdict: str


def read_results(folder: pathlib.Path) -> Results:
  """Returns the results by (method, world) and seed."""
  found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
  for path in sorted(folder.glob('*.json')):
    result = json.loads(path.read_text(encoding='utf-8'))
    found.setdefault((result['method'], result['world']), {})[result['seed']] = result
  return found


def compare(method: str, description: Mapping[str, Any], results: Results) -> Comparison | None:
  """Returns the comparison, or None while results of the method or of its baseline are missing."""
  own, claim = results.get((method, method), {}), description['claim']
  if claim is None:
    success = _mean(_values(own, 'success'))
    return Comparison(method, description['title'], '', '', (), (), math.nan, math.nan,
                      (success, math.nan), '') if own else None
  base = _in_same_world(own, [results.get((claim['than'], world), {}) for world in (method, claim['than'])])
  seeds = sorted(own.keys() & base.keys())
  if not seeds:
    return None
  own, base = {s: own[s] for s in seeds}, {s: base[s] for s in seeds}
  ours, theirs = _values(own, claim['metric']), _values(base, claim['metric'])
  sign = 1.0 if claim['better'] == 'higher' else -1.0
  gains = [sign * (a - b) for a, b in zip(ours, theirs)]
  gain, low = _mean(gains), lower_end(gains)
  success = _mean(_values(own, 'success')), _mean(_values(base, 'success'))
  return Comparison(method, description['title'], claim['than'], claim['metric'], ours, theirs, gain, low, success,
                    verdict(gain, low, success))


def _in_same_world(own: Mapping[int, Mapping[str, Any]],
                   candidates: Sequence[Mapping[int, Mapping[str, Any]]]) -> Mapping[int, Mapping[str, Any]]:
  worlds = {r['world_hash'] for r in own.values()}
  return next((c for c in candidates if c and {r['world_hash'] for r in c.values()} == worlds), {})


def verdict(gain: float, low: float, success: tuple[float, float]) -> str:
  """Returns the verdict in words; see README.md.

  Example:
    >>> verdict(0.2, 0.1, (0.8, 0.8)), verdict(0.2, -0.1, (0.8, 0.8)), verdict(0.2, 0.1, (0.5, 0.8))
    ('reproduced', 'direction only', 'at the cost of success')
  """
  if not gain > 0:
    return NO
  if success[0] < success[1] - SUCCESS_MARGIN:
    return COSTLY
  return YES if low > 0 else DIRECTION


def lower_end(gains: Sequence[float]) -> float:
  """Returns the lower end of the 95 % interval of the mean of paired differences, by Student's t.

  Example:
    >>> round(lower_end([1.0, 2.0, 3.0]), 3)  # 2 - 4.303 * 1 / sqrt(3)
    -0.484
  """
  n = len(gains)
  if n < 2:
    return math.nan
  return _mean(gains) - float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(gains) / math.sqrt(n)


def _values(results: Mapping[int, Mapping[str, Any]], metric: str) -> tuple[float, ...]:
  return tuple(float(r['final'][metric]) for r in results.values())


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values) if values else math.nan


def as_markdown(comparisons: Sequence[Comparison], results: Results) -> str:
  """Returns the table, and beneath it where every method ended."""
  counts = {v: sum(c.verdict == v for c in comparisons) for v in (YES, DIRECTION, COSTLY, NO)}
  lines = [', '.join(f'{n} {v}' for v, n in counts.items()) + '.', '',
           '| method | claim | method | baseline | better by | 95 % at least | success, baseline | verdict |',
           '|---|---|--:|--:|--:|--:|--:|---|']
  for c in comparisons:
    if not c.verdict:
      continue
    lines.append(f'| {c.title} | {METRICS[c.metric]} than {c.than} | {_number(_mean(c.ours))} | {_number(_mean(c.theirs))} '
                 f'| {_number(c.gain)} | {_number(c.low)} | {c.success[0]:.3f}, {c.success[1]:.3f} | {c.verdict} |')
  lines += ['', '| run | seeds | ' + ' | '.join(METRICS.values()) + ' |', '|---|--:|' + '--:|' * len(METRICS)]
  for (method, world), seeds in sorted(results.items()):
    name = method if world == method else f'{method} in the world of {world}'
    cells = [_spread(_values(seeds, m)) for m in METRICS]
    lines.append(f'| {name} | {len(seeds)} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _number(value: float) -> str:
  return '' if math.isnan(value) else f'{value:.3g}' if abs(value) < 100 else f'{value:.0f}'


def _spread(values: Sequence[float]) -> str:
  if len(values) < 2:
    return _number(_mean(values))
  return f'{_number(_mean(values))} ± {_number(statistics.stdev(values))}'


def write_figure(comparisons: Sequence[Comparison], path: pathlib.Path):
  """Draws a panel a metric: each method a filled mark, its baseline a hollow one, seeds as dots."""
  from matplotlib import figure as figure_lib  # Its objects need no display or global state.
  colours = {YES: '#23946a', DIRECTION: '#2563c9', COSTLY: '#d9702b', NO: '#c23b4e'}
  panels = {m: sorted((c for c in comparisons if c.metric == m), key=lambda c: c.gain) for m in METRICS}
  panels = {m: rows for m, rows in panels.items() if rows}
  heights = [len(rows) + 1.5 for rows in panels.values()]
  figure = figure_lib.Figure(figsize=(9, 0.26 * sum(heights) + 0.8), layout='constrained')
  axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
  for ax, (metric, rows) in zip(axes, panels.items()):
    for y, c in enumerate(rows):
      colour = colours[c.verdict]
      ax.plot([_mean(c.theirs), _mean(c.ours)], [y, y], color=colour, lw=1.2)
      ax.plot(c.ours, [y] * len(c.ours), '.', color=colour, ms=3, alpha=0.6)
      ax.plot(_mean(c.theirs), y, 'o', mfc='white', mec=colour, ms=5)
      ax.plot(_mean(c.ours), y, 'o', color=colour, ms=5)
    ax.set_yticks(range(len(rows)), [f'{c.title} / {c.than}' for c in rows], fontsize=7)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_title(METRICS[metric], fontsize=8, loc='left')
    ax.tick_params(axis='x', labelsize=7)
    ax.grid(axis='x', lw=0.3)
    ax.spines[['top', 'right']].set_visible(False)
  marks = [axes[0].plot([], [], 'o', color=colour, ms=5, label=label)[0] for label, colour in colours.items()]
  marks.append(axes[0].plot([], [], 'o', mfc='white', mec='#6b7280', ms=5, label='baseline')[0])
  figure.legend(handles=marks, loc='outside lower center', ncols=5, fontsize=7, frameon=False)
  figure.savefig(path, dpi=160)


def _description(path: pathlib.Path) -> dict[str, Any]:
  spec = importlib.util.spec_from_file_location(f'method_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return dict(module.METHOD)


def main(argv: Sequence[str] | None = None) -> int:
  """Writes both files; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--results', type=pathlib.Path, default=_HERE / 'results')
  parser.add_argument('--out', type=pathlib.Path, default=_HERE, help='folder of results.md and results.png')
  options = parser.parse_args(argv)
  sys.path.insert(0, str(_HERE.parents[1]))  # configs are imported by name
  results = read_results(options.results)
  console = rich.console.Console()
  if not results:
    console.print(f'No results in {options.results}; run.py makes them.')
    return 1
  paths = sorted(p for p in _CONFIGS.glob('*.py') if p.name != '__init__.py')
  found = {p.stem: compare(p.stem, _description(p), results) for p in paths}
  comparisons = [c for c in found.values() if c is not None]
  missing = [name for name, c in found.items() if c is None]
  (options.out / 'results.md').write_text(as_markdown(comparisons, results), encoding='utf-8')
  if any(c.verdict for c in comparisons):
    write_figure(comparisons, options.out / 'results.png')
  console.print(f'{len(comparisons)} methods in {options.out}/results.md'
                + (f'; no results yet: {", ".join(missing)}' if missing else ''), highlight=False)
  return 0


if __name__ == '__main__':
  sys.exit(main())
