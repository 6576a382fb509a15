"""Trajectories as HTML: tokens coloured by their writer, advantage, log-probability or entropy."""

from __future__ import annotations

import html
import json
import math
import pathlib
import re
from typing import Any, Mapping, Sequence

import numpy as np

from agentrl.core import types
from agentrl.rollout import store

_PER_KIND = 2  # Best and worst trajectories shown of each step.
_MAX_TOKENS = 2000  # Of one segment; what comes after is left out, and said so.
_MAX_OUTPUT = 1500  # Characters of one tool result.
_MARKER = re.compile(r'<[^<>\s]{1,40}>')
_BYTE = re.compile(r'<0x([0-9A-F]{2})>')
# Upper edges of the shades 0, 1, 2, 3; above the last one it is shade 4. In nats.
_SURPRISE_EDGES = (0.1, 0.7, 1.6, 3.0)
_ENTROPY_EDGES = (0.05, 0.3, 0.8, 1.5)


def render_samples(folder: str | pathlib.Path) -> str:
  """Returns the section with sample trajectories of the first, middle and last step stored.

  Args:
    folder: The run's trajectories folder.
  Returns:
    HTML; '' where no trajectories are stored. A damaged file is named in the page instead of shown.
  """
  paths = store.list_paths(folder)
  if not paths:
    return ''
  chosen = [paths[i] for i in sorted({0, len(paths) // 2, len(paths) - 1})]
  sections = []
  for path in chosen:
    try:
      sections.append(_render_step(store.read(path)))
    except ValueError as error:
      sections.append(f'<p class="note">{html.escape(str(error))}</p>')
  return (f'<section id="samples" class="by-writer"><h2>Sample trajectories</h2>{_modes()}'
          f'{"".join(sections)}</section>')


def piece_text(piece: str) -> str:
  """Returns what a piece shows as: sentencepiece's space as a space, its bytes as characters.

  Example:
    >>> piece_text('▁the'), piece_text('<0x0A>'), piece_text('<0xC3>'), piece_text('<call>')
    (' the', '\\n', '<0xC3>', '<call>')
  """
  byte = _BYTE.fullmatch(piece)
  if byte:
    value = int(byte.group(1), 16)
    return chr(value) if value < 128 else piece
  return piece.replace('▁', ' ')


def _modes() -> str:
  names = [('writer', 'who wrote it'), ('advantage', 'advantage'), ('logprob', 'log-prob'),
           ('entropy', 'entropy')]
  radios = ''.join(
      f'<label><input type="radio" name="mode" value="{mode}"{" checked" if not i else ""}> '
      f'{text}</label>'
      for i, (mode, text) in enumerate(names))

  def shade(hue, opacity, text):
    return f'<span style="background:rgba(var(--{hue}),{opacity})">{text}</span> '

  keys = (
      '<span class="key kw"><span style="background:var(--prompt)">prompt</span> '
      '<span style="background:var(--policy)">policy</span> '
      '<span style="background:var(--tool)">tool</span></span>'
      f'<span class="key ka">{shade("neg", .68, "− less likely")}{shade("neg", .3, "−")}0 '
      f'{shade("pos", .3, "+")}'
      f'{shade("pos", .68, "+ more likely")}</span>'
      f'<span class="key kl">probability {shade("heat", .0, "&gt; 90%")}'
      f'{shade("heat", .36, "20–50%")}'
      f'{shade("heat", .72, "&lt; 5%")}</span>'
      f'<span class="key ke">nats {shade("heat", .0, "&lt; 0.05")}{shade("heat", .36, "0.3–0.8")}'
      f'{shade("heat", .72, "&gt; 1.5")}</span>')
  return f'<div class="modes"><b>Colour by</b> {radios} {keys}</div>'


def _render_step(stored: store.StoredStep) -> str:
  advantages = stored.extra.get('advantages')
  if not isinstance(advantages, Sequence) or len(advantages) != len(stored.trajectories):
    advantages = [None] * len(stored.trajectories)
  columns = [_advantage_columns(t, a) for t, a in zip(stored.trajectories, advantages)]
  sizes = [
      float(np.nanmax(np.abs(c)))
      for per_segment in columns
      for c in per_segment
      if c.size and np.isfinite(c).any()
  ]
  largest = max(sizes, default=0.0) or 1.0
  shown = [
      _render_trajectory(stored.trajectories[i], columns[i], largest, stored.pieces)
      for i in _choose(stored.trajectories)
  ]
  return (
      f'<h3>Step {stored.step} <span class="dim">– {len(shown)} of '
      f'{len(stored.trajectories)} trajectories: '
      f'highest and lowest rewards</span></h3>{"".join(shown)}')


def _choose(trajectories: Sequence[types.Trajectory]) -> list[int]:
  """Indices of the best and the worst: of different tasks if possible, with more calls first."""

  def order(i, sign):
    reward = trajectories[i].rewards.get('total', 0.0)
    return (-sign * (0.0 if math.isnan(reward) else reward), -len(trajectories[i].results), i)

  chosen: list[int] = []
  for sign in (1, -1):
    ranked = sorted((i for i in range(len(trajectories)) if i not in chosen),
                    key=lambda i: order(i, sign))
    tasks = {trajectories[i].task.id for i in chosen}
    ranked.sort(key=lambda i: trajectories[i].task.id in tasks)
    first_of_task = list({trajectories[i].task.id: i for i in reversed(ranked)}.values())[::-1]
    picked = sorted(first_of_task, key=ranked.index)[:_PER_KIND]
    chosen += picked + [i for i in ranked if i not in picked][:_PER_KIND - len(picked)]
  return chosen


def _advantage_columns(trajectory: types.Trajectory, advantages: Any) -> list[np.ndarray]:
  """[T] float for each segment, NaN where the token was not sampled or has no advantage."""
  columns = []
  for i, segment in enumerate(trajectory.segments):
    column = np.full(len(segment), np.nan)
    value = advantages
    if isinstance(advantages, (list, tuple)):
      value = advantages[i] if i < len(advantages) else None
    if value is not None and np.ndim(value) == 0 or np.shape(value) == column.shape:
      column[:] = value
    columns.append(np.where(segment.sampled, column, np.nan))
  return columns


def _render_trajectory(trajectory: types.Trajectory, advantages: Sequence[np.ndarray],
                       largest: float, pieces: Mapping[int, str]) -> str:
  segments = []
  for i, segment in enumerate(trajectory.segments):
    turns = [turn for turn in trajectory.turns if turn.segment == i]
    head = f'<div class="dim">context {i + 1}</div>' if len(trajectory.segments) > 1 else ''
    segments.append(
        f'{head}<div class="tokens">'
        f'{_render_segment(segment, turns, advantages[i], largest, pieces)}</div>'
    )
  shown = _header(trajectory) + ''.join(segments) + _calls(trajectory)
  return f'<article class="traj">{shown}</article>'


def _header(trajectory: types.Trajectory) -> str:
  finished = trajectory.status is types.Status.FINISHED
  rewards = '  '.join(f'{name} {value:.3g}' for name, value in trajectory.rewards.items())
  family = trajectory.task.metadata.get('family', trajectory.task.environment)
  facts = [
      f'<b>{html.escape(trajectory.task.id)}</b>',
      f'<span class="dim">{html.escape(str(family))}</span>',
      f'<span class="badge {"good" if finished else "bad"}">'
      f'{html.escape(trajectory.status.value)}</span>',
      f'<span>reward: {html.escape(rewards) or "–"}</span>',
      f'<span class="dim">{trajectory.num_sampled} tokens sampled, {len(trajectory.turns)} turns, '
      f'{trajectory.seconds:.2f} s</span>'
  ]
  if trajectory.answer is not None:
    facts.append(f'<span>answer: <code>{html.escape(_cut(trajectory.answer, 120))}</code></span>')
  if trajectory.detail:
    facts.append(f'<span class="bad">{html.escape(_cut(trajectory.detail, 300))}</span>')
  return f'<header>{"".join(facts)}</header>'


def _render_segment(segment: types.Segment, turns: Sequence[types.Turn], advantages: np.ndarray,
                    largest: float, pieces: Mapping[int, str]) -> str:
  # Each property builds its array anew: take them once.
  tokens, sampled, log_probs = segment.tokens, segment.sampled, segment.log_probs
  entropies, turn_ids = segment.entropies, segment.turns
  first_sampled = int(np.argmax(sampled)) if sampled.any() else len(tokens)
  ends = {turn.end: turn for turn in turns}
  parts = []
  for i in range(min(len(tokens), _MAX_TOKENS)):
    writer = 's' if sampled[i] else 'p' if i < first_sampled else 'o'
    text = piece_text(pieces[int(tokens[i])]) if int(tokens[i]) in pieces else f'⟨{tokens[i]}⟩'
    classes = ['t', writer, *(['m'] if _MARKER.fullmatch(text) else [])]
    info = f'{json.dumps(text, ensure_ascii=False)}  id {tokens[i]}  turn {turn_ids[i]}'
    if sampled[i]:
      classes += [
          f'l{np.searchsorted(_SURPRISE_EDGES, -log_probs[i])}',
          f'e{np.searchsorted(_ENTROPY_EDGES, entropies[i])}'
      ]
      info += f'\nlog-prob {log_probs[i]:.3f}  entropy {entropies[i]:.3f}'
      if np.isfinite(advantages[i]):
        classes.append(f'a{_advantage_shade(advantages[i] / largest)}')
        info += f'  advantage {advantages[i]:+.3f}'
    parts.append(
        f'<span class="{" ".join(classes)}" data-i="{html.escape(info)}">{_visible(text)}</span>')
    if i + 1 in ends:
      parts.append(_turn_end(ends[i + 1]))
  if len(tokens) > _MAX_TOKENS:
    parts.append(f'<p class="dim">… {len(tokens) - _MAX_TOKENS} more tokens</p>')
  return ''.join(parts)


def _advantage_shade(fraction: float) -> int:
  """-4 to 4; 0 only for an advantage of exactly 0."""
  return int(math.copysign(math.ceil(min(abs(fraction), 1.0) * 4), fraction)) if fraction else 0


def _visible(text: str) -> str:
  return html.escape(text).replace('\n', '<span class="nl">⏎</span>\n')


def _turn_end(turn: types.Turn) -> str:
  text = f'turn {turn.index}: {turn.stop_reason}'
  if turn.results:
    text += f', tool {sum(r.seconds for r in turn.results):.2f} s'
    failed = sum(not r.ok for r in turn.results)
    text += f', {failed} failed' if failed else ''
  return f'<span class="turn">{html.escape(text)}</span>'


def _calls(trajectory: types.Trajectory) -> str:
  rows = []
  for turn in trajectory.turns:
    for i in range(max(len(turn.calls), len(turn.results))):
      call = turn.calls[i] if i < len(turn.calls) else None
      result = turn.results[i] if i < len(turn.results) else None
      rows.append(
          f'<tr><td class="n">{turn.index}</td>{_call_cell(call)}{_result_cells(result)}</tr>')
  if not rows:
    return ''
  return (
      f'<details><summary>{len(rows)} tool call{"s" if len(rows) > 1 else ""}</summary>'
      '<div class="scroll"><table><tr><th class="n">turn</th><th>call</th><th>result</th>'
      f'<th class="n">seconds</th><th>output</th></tr>{"".join(rows)}</table></div>'
      '</details>')


def _call_cell(call: types.ToolCall | None) -> str:
  if call is None:
    return '<td class="dim">–</td>'
  text = f'{call.name or "?"}({json.dumps(dict(call.arguments), ensure_ascii=False, default=str)})'
  error = f'<div class="bad">{html.escape(_cut(call.error, 300))}</div>' if call.error else ''
  return f'<td><code>{html.escape(_cut(text, 600))}</code>{error}</td>'


def _result_cells(result: types.ToolResult | None) -> str:
  if result is None:
    return '<td class="dim">none</td><td></td><td></td>'
  verdict = '<span class="good">ok</span>'
  if not result.ok:
    verdict = f'<span class="bad">{html.escape(result.error or "failed")}</span>'
  return (f'<td>{verdict}</td><td class="n">{result.seconds:.3f}</td>'
          f'<td><code>{_visible(_cut(result.text, _MAX_OUTPUT))}</code></td>')


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else f'{text[:length]}… ({len(text)} characters)'
