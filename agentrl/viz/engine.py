"""What the rollouts' time went into: shares, curves by step, and what was done in each seat when."""

from __future__ import annotations

import html
import os
from typing import Any, Mapping, Sequence

from agentrl.metrics import timelines
from agentrl.viz import charts

# Names of metrics that are shown here, and so nowhere else.
_PREFIXES = ('engine/', 'engine_seconds/')
# Parts of a rollout's wall time, in the order of their colours.
_PARTS = {'decode': 'decode', 'idle': 'idle, all wait for tools', 'prefill': 'prefill',
          'linger': 'linger, for company in a batch', 'host': 'host'}
_SHARES = {'engine/occupancy': 'tokens per step and slot', 'engine/device_idle_while_ready': 'device idle while wanted',
           'engine/cache_fill': 'cache in use'}
_TOKENS = {'decoded_tokens': 'drawn', 'engine/prefilled_tokens': 'prefilled', 'engine/shared_tokens': 'found in the cache'}
_WAITS = {'engine/tool_seconds': 'for tools', 'engine/queue_seconds': 'for a slot'}
_RATES = {'tokens_per_second/decode_alone': 'decode', 'tokens_per_second/prefill_alone': 'prefill'}
# Colours of the timeline, those of the parts: a session draws while the device decodes, and waits while it may be idle.
_COLOURS = {'draw': 0, 'wait': 1, 'ready': 3, 'decode': 0, 'idle': 1, 'prefill': 2, 'linger': 3}
_LEGEND = (('a session draws; device decodes', 0), ('a session waits for its tool; device idle', 1), ('device prefills', 2),
           ('a session waits for a slot; device lingers', 3))
_FEW = 3  # Lines that make curves.

Lines = Sequence[Mapping[str, Any]]


def is_shown(name: str) -> bool:
  """Whether a metric is one of the engine's."""
  return name.startswith(_PREFIXES) or name in _RATES


def render_engine(rundir: str | os.PathLike, lines: Lines) -> str:
  """Returns the section of a run's page; '' where nothing was rolled out.

  Args:
    rundir: The run's folder.
    lines: Of its metrics.
  """
  notes, picture = '', {}
  try:
    picture = timelines.read(rundir)
  except ValueError as error:
    notes = f'<p class="note">{html.escape(str(error))}</p>'
  lines = [line for line in lines if any(name.startswith('engine_seconds/') for name in line)]
  # Of several stages the one that learns from what it draws.
  stages = [line.get('stage') for line in lines]
  stage = 'rl' if 'rl' in stages else max(stages, key=stages.count, default=None)
  lines = [line for line in lines if line.get('stage') == stage]
  if not lines and not picture and not notes:
    return ''
  figures = [_last(lines[-1])] if lines else []
  if len(lines) >= _FEW:
    figures += [charts.area_chart('wall time of a rollout (s)', [_series(lines, f'engine_seconds/{k}', label)
                                                                 for k, label in _PARTS.items()]),
                *(_curves(title, lines, names) for title, names in (
                    ('shares', _SHARES), ('tokens of a step', _TOKENS),
                    ('sessions wait: seconds, added up over sessions', _WAITS),
                    ('tokens per second of the device alone', _RATES)))]
  return (f'<h2>Engine</h2><p class="sub">what the time of rollouts went into</p>{notes}'
          f'<div class="grid2">{"".join(figures)}</div>{_timeline(picture) if picture else ""}')


def _last(line: Mapping[str, Any]) -> str:
  seconds = [(label, max(0.0, line.get(f'engine_seconds/{k}') or 0.0)) for k, label in _PARTS.items()]
  total = sum(value for _, value in seconds)
  return charts.share_bar(f'last rollout: step {line["step"]}, {charts.number(total)} s', seconds)


def _curves(title: str, lines: Lines, names: Mapping[str, str]) -> str:
  series = [_series(lines, name, label) for name, label in names.items() if any(name in line for line in lines)]
  return charts.line_chart(title, series) if series else ''


def _series(lines: Lines, name: str, label: str) -> charts.Series:
  return charts.Series(label, [line['step'] for line in lines], [line.get(name) for line in lines])


def _timeline(picture: Mapping[str, Any]) -> str:
  title = (f'seats over time: the rollout of step {picture["step"]} ({picture["stage"]}); blank where a seat is free and '
           'while the host is at work')
  return charts.span_chart(title, picture['rows'], picture['bins'], picture['seconds'], _COLOURS, _LEGEND)
