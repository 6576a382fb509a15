"""Charts as HTML with inline SVG: colours by CSS variable, values on hover by data attribute."""

from __future__ import annotations

import html
import json
import math
from typing import Mapping, NamedTuple, Sequence

WIDTH, HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 26
_MAX_POINTS = 400
_COLOURS = 8
_SPAN_WIDTH, _SPAN_LEFT, _SPAN_RIGHT, _SPAN_TOP, _SPAN_GAP = 1200, 56, 16, 6, 6


class Series(NamedTuple):
  """A named curve: ys[i] at xs[i], None where there is no value."""

  label: str
  xs: Sequence[float]
  ys: Sequence[float | None]


class Mark(NamedTuple):
  """A point with an interval, drawn over the curves: an evaluation."""

  x: float
  y: float
  low: float | None = None
  high: float | None = None
  label: str = ''


class _Scale(NamedTuple):
  x0: float
  x1: float
  y0: float
  y1: float

  def x(self, value: float) -> float:
    span = (self.x1 - self.x0) or 1.0
    return _LEFT + (value - self.x0) / span * (WIDTH - _LEFT - _RIGHT)

  def y(self, value: float) -> float:
    return HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(title: str,
               series: Sequence[Series],
               marks: Sequence[Mark] = (),
               unit_range: bool = False) -> str:
  """Returns a figure with one curve a series; long ones get a running mean over the raw values.

  Args:
    title: Shown above.
    series: At least one, with at least one value each.
    marks: Points with intervals, drawn on top.
    unit_range: Whether values are fractions, so that the axis goes from 0 to 1.
  """
  series = [_thin(s) for s in series]
  values = [y for s in series for y in s.ys if y is not None]
  values += [v for m in marks for v in (m.y, m.low, m.high) if v is not None]
  xs = [x for s in series for x in s.xs] + [m.x for m in marks]
  low, high = (0.0, 1.0) if unit_range else (min(values, default=0.0), max(values, default=1.0))
  if 0 < low < 0.6 * high:
    low = 0.0  # Unless that hides what changes, an axis from 0 shows how much a change is.
  ticks = nice_ticks(low, high)
  scale = _Scale(min(xs), max(xs), min(ticks[0], low), max(ticks[-1], high))
  parts = [_axes(scale, ticks)]
  for i, one in enumerate(series):
    colour = f'style="--k:var(--c{i % _COLOURS})"'
    smooth = _running_mean(one.ys) if len(one.ys) >= 40 else None
    parts.append(
        f'<path class="curve{" raw" if smooth else ""}" {colour} '
        f'd="{_path(scale, one.xs, one.ys)}"/>'
    )
    if smooth:
      parts.append(f'<path class="curve" {colour} d="{_path(scale, one.xs, smooth)}"/>')
    elif sum(y is not None for y in one.ys) <= 12:
      parts += [
          f'<circle class="dot" {colour} cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="2.2"/>'
          for x, y in zip(one.xs, one.ys)
          if y is not None
      ]
  parts += [_mark(scale, mark) for mark in marks]
  legend = [(s.label, i) for i, s in enumerate(series)] if len(series) > 1 else []
  return _figure(title, scale, parts, series, legend, marks)


def area_chart(title: str, series: Sequence[Series]) -> str:
  """Returns a figure of series stacked on one another, the first at the bottom; None counts as 0.

  Args:
    title: Shown above.
    series: All with the same xs and no negative values.
  """
  series = [_thin(s) for s in series]
  xs = series[0].xs
  below = [0.0] * len(xs)
  layers = []
  for one in series:
    above = [b + (y or 0.0) for b, y in zip(below, one.ys)]
    layers.append((below, above))
    below = above
  ticks = nice_ticks(0.0, max(below))
  scale = _Scale(min(xs), max(xs), 0.0, max(ticks[-1], max(below)))
  parts = [_axes(scale, ticks)]
  for i, (bottom, top) in enumerate(layers):
    corners = [*zip(xs, top), *zip(reversed(xs), reversed(bottom))]
    points = ' '.join(f'{scale.x(x):.1f},{scale.y(y):.1f}' for x, y in corners)
    parts.append(f'<polygon class="area" style="--k:var(--c{i % _COLOURS})" points="{points}"/>')
  return _figure(title, scale, parts, series, [(s.label, i) for i, s in enumerate(series)])


def bar_table(title: str, columns: Sequence[str],
              rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
  """Returns a figure of horizontal bars of fractions, one group a row and one bar a column.

  Args:
    title: Shown above.
    columns: What the bars of a group stand for.
    rows: Name and a value in [0, 1] for each column, None where absent.
  """
  cells = []
  for name, values in rows:
    bars = ''.join(
        f'<div class="bar" style="--k:var(--c{i % _COLOURS});'
        f'--w:{100 * min(max(value, 0.0), 1.0):.1f}%">'
        f'<i></i><b>{100 * value:.0f}%</b></div>'
        for i, value in enumerate(values)
        if value is not None)
    cells.append(f'<div class="barname">{html.escape(name)}</div><div>{bars}</div>')
  return (
      f'<figure><figcaption>{html.escape(title)}</figcaption>'
      f'<div class="bars">{"".join(cells)}</div>'
      f'{_legend([(c, i) for i, c in enumerate(columns)])}</figure>')


def share_bar(title: str, parts: Sequence[tuple[str, float]]) -> str:
  """Returns a figure of one bar divided into parts, with a legend of what each is, in seconds and as a share.

  Args:
    title: Shown above.
    parts: Label and seconds; none negative.
  """
  total = sum(seconds for _, seconds in parts) or 1.0
  spans = ''.join(f'<i style="--k:var(--c{i % _COLOURS});width:{100 * seconds / total:.2f}%"></i>'
                  for i, (_, seconds) in enumerate(parts))
  labels = [(f'{label}: {number(seconds)} s, {100 * seconds / total:.0f} %', i)
            for i, (label, seconds) in enumerate(parts)]
  return (f'<figure><figcaption>{html.escape(title)}</figcaption><div class="share">{spans}</div>'
          f'<div class="list">{_legend(labels)}</div></figure>')


def span_chart(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, int, int]]]], bins: int, seconds: float,
               colours: Mapping[str, int], legend: Sequence[tuple[str, int]]) -> str:
  """Returns a wide figure of what each of some rows did when.

  Args:
    title: Shown above.
    rows: Name and spans, each (kind, first bin, bin after the last); the first row is set off from the others.
    bins: Equal parts of the time.
    seconds: How long it was.
    colours: Of each kind, by number.
    legend: What the colours mean.
  """
  thick = 14
  sizes = ((20, thick, 1), (40, 9, 8), (80, 7, 8), (len(rows), 3, 32))
  height, every = next((height, every) for most, height, every in sizes if len(rows) <= most)
  tops = [_SPAN_TOP] + [_SPAN_TOP + thick + _SPAN_GAP + i * height for i in range(len(rows) - 1)]
  bottom = tops[-1] + height
  x = lambda at: _SPAN_LEFT + at / bins * (_SPAN_WIDTH - _SPAN_LEFT - _SPAN_RIGHT)
  ticks = [t for t in nice_ticks(0.0, seconds, 8) if t <= seconds]
  parts = []
  for tick in ticks:
    at = x(tick / (seconds or 1.0) * bins)
    parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_SPAN_TOP}" y2="{bottom}"/>'
                 f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{number(tick)}{" s" if tick == ticks[-1] else ""}'
                 '</text>')
  # One path a kind keeps a page of many spans small.
  paths: dict[str, list[str]] = {}
  for i, (top, (_, spans)) in enumerate(zip(tops, rows)):
    for kind, first, last in spans:
      paths.setdefault(kind, []).append(
          f'M{x(first):.1f} {top}H{x(last):.1f}v{(height if i else thick) - 1}H{x(first):.1f}z')
  parts += [f'<path class="span" style="--k:var(--c{colours.get(kind, _COLOURS - 1)})" d="{"".join(path)}"/>'
            for kind, path in paths.items()]
  parts += [f'<text x="{_SPAN_LEFT - 6}" y="{top + (height if i else thick) / 2 + 3:.1f}" text-anchor="end">{html.escape(name)}</text>'
            for i, (top, (name, _)) in enumerate(zip(tops, rows)) if not i or (i - 1) % every == 0]
  return (f'<figure class="wide"><figcaption>{html.escape(title)}</figcaption>'
          f'<svg class="spans" viewBox="0 0 {_SPAN_WIDTH} {bottom + 20}" role="img" aria-label="{html.escape(title)}">'
          f'{"".join(parts)}</svg>{_legend(legend)}</figure>')


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Returns about `count` round numbers that span [low, high].

  Example:
    >>> nice_ticks(0.0, 1.0), nice_ticks(3.0, 3.0)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [2.5, 3.0, 3.5])
  """
  if low == high == 0:
    high = 1.0
  if high <= low:
    pad = abs(low) / 6 or 0.5
    low, high, count = low - pad, high + pad, 2
  rough = (high - low) / count
  magnitude = 10.0**math.floor(math.log10(rough))
  step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float | None) -> str:
  """Returns a value in at most about six characters; a dash for None.

  Example:
    >>> [number(v) for v in (0.25, 12345.0, 1e-7, 3, None)]
    ['0.25', '12.3k', '1e-07', '3', '–']
  """
  if value is None:
    return '–'
  size = abs(value)
  if size >= 1e6:
    return f'{value / 1e6:.3g}M'
  if size >= 1e4:
    return f'{value / 1e3:.3g}k'
  if size >= 1000:
    return f'{value:.0f}'
  return f'{value:.3g}'


def _thin(series: Series) -> Series:
  """Averages neighbours, so that a run of any length makes a page of bounded size."""
  group = -(-len(series.xs) // _MAX_POINTS)
  if group <= 1:
    return series
  xs, ys = [], []
  for i in range(0, len(series.xs), group):
    values = [y for y in series.ys[i:i + group] if y is not None]
    xs.append(series.xs[min(i + group // 2, len(series.xs) - 1)])
    ys.append(sum(values) / len(values) if values else None)
  return Series(series.label, xs, ys)


def _running_mean(ys: Sequence[float | None]) -> list[float | None]:
  half = max(2, len(ys) // 40)
  means = []
  for i in range(len(ys)):
    values = [y for y in ys[max(0, i - half):i + half + 1] if y is not None]
    means.append(sum(values) / len(values) if values else None)
  return means


def _path(scale: _Scale, xs: Sequence[float], ys: Sequence[float | None]) -> str:
  commands, pen_down = [], False
  for x, y in zip(xs, ys):
    if y is not None:
      commands.append(f'{"L" if pen_down else "M"}{scale.x(x):.1f} {scale.y(y):.1f}')
    pen_down = y is not None
  return ''.join(commands)


def _axes(scale: _Scale, ticks: Sequence[float]) -> str:
  parts = []
  for tick in ticks:
    y = scale.y(tick)
    parts.append(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
  steps = [t for t in nice_ticks(scale.x0, scale.x1) if scale.x0 <= t <= scale.x1 and t == round(t)]
  for step in steps or [scale.x0]:
    parts.append(
        f'<text x="{scale.x(step):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{number(step)}</text>'
    )
  return ''.join(parts)


def _mark(scale: _Scale, mark: Mark) -> str:
  x = scale.x(mark.x)
  whisker = ''
  if mark.low is not None and mark.high is not None:
    whisker = (f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.y(mark.low):.1f}" '
               f'y2="{scale.y(mark.high):.1f}"/>')
  return f'{whisker}<circle class="markdot" cx="{x:.1f}" cy="{scale.y(mark.y):.1f}" r="3.2"/>'


def _legend(entries: Sequence[tuple[str, int]]) -> str:
  if not entries:
    return ''
  items = ''.join(f'<span style="--k:var(--c{i % _COLOURS})"><i></i>{html.escape(label)}</span>'
                  for label, i in entries)
  return f'<div class="legend">{items}</div>'


def _figure(title: str,
            scale: _Scale,
            parts: Sequence[str],
            series: Sequence[Series],
            legend: Sequence[tuple[str, int]],
            marks: Sequence[Mark] = ()) -> str:
  data = {
      'frame': [_LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM],
      'range': [scale.x0, scale.x1],
      'series': [[s.label,
                  list(s.xs), [None if y is None else float(f'{y:.4g}')
                               for y in s.ys]]
                 for s in series],
      'marks': [[m.label, m.x, float(f'{m.y:.4g}')] for m in marks],
  }
  notes = ''
  if marks:
    label = html.escape(marks[0].label)
    notes = f'<div class="legend"><span class="markkey"><i></i>{label}</span></div>'
  return (
      f'<figure><figcaption>{html.escape(title)}</figcaption>'
      f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
      f'aria-label="{html.escape(title)}" '
      f'data-chart="{html.escape(json.dumps(data))}">{"".join(parts)}'
      f'<line class="cross" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" x1="0" x2="0"/></svg>'
      f'{_legend(legend)}{notes}</figure>')
