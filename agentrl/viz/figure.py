"""The success curve of one or several runs: `python -m agentrl.viz.figure OUT.png RUNDIR...`.

Needs matplotlib (extra `viz`).
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any, Sequence

from agentrl.metrics import writers

_SEED_COLOURS = ('#2563c9', '#d9702b', '#23946a', '#a9459a', '#c23b4e', '#0f8fa6', '#8a6d2f',
                 '#6b7280')


def write_figure(rundirs: str | os.PathLike | Sequence[str | os.PathLike],
                 path: str | os.PathLike,
                 stage: str = 'rl',
                 metric: str = 'success') -> pathlib.Path:
  """Draws each run's training curve and held-out evaluations, and the level after cold start.

  Args:
    rundirs: A run's folder, or those of several seeds.
    path: PNG to write; its folder is made if missing.
    stage: Stage whose curve is drawn, step by step from its own start.
    metric: Name of the metric, a fraction.
  Returns:
    The path.
  Raises:
    ImportError: if matplotlib is not installed.
    ValueError: if a run has no such metric.
  """
  try:
    from matplotlib import figure as figure_lib  # Its objects need no display or global state.
  except ImportError as error:
    raise ImportError('figures need matplotlib: pip install "agentrl[viz]"') from error
  rundirs = [rundirs] if isinstance(rundirs, (str, os.PathLike)) else list(rundirs)
  figure = figure_lib.Figure(figsize=(7.2, 3.8), dpi=160, layout='constrained')
  axes = figure.add_subplot()
  cold_starts = [
      _draw_run(axes, pathlib.Path(rundir), i, stage, metric, len(rundirs))
      for i, rundir in enumerate(rundirs)
  ]
  known = [value for value in cold_starts if value is not None]
  if known:
    axes.axhline(sum(known) / len(known),
                 color='#667080',
                 linestyle='--',
                 linewidth=1.2,
                 zorder=1,
                 label='after the cold start, held-out')
  axes.set(xlabel=f'{stage} step', ylabel=metric, ylim=(0, 1.02), xlim=(0, None))
  axes.grid(axis='y', color='#e3e5e9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, loc='lower right', fontsize=9)
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path


def _draw_run(axes: Any, rundir: pathlib.Path, index: int, stage: str, metric: str,
              runs: int) -> float | None:
  """Draws one run; returns its held-out value before the stage, None where it was not measured."""
  lines = [line for line in writers.read_metrics(rundir) if line.get(metric) is not None]
  curve = [line for line in lines if line['stage'] == stage]
  if not curve:
    raise ValueError(f'{rundir} has no {metric!r} in stage {stage!r}; it has stages '
                     f'{sorted({line["stage"] for line in lines})} with it')
  start = curve[0]['step']
  values = [line[metric] for line in curve]
  colour = _SEED_COLOURS[index % len(_SEED_COLOURS)]
  steps = [line['step'] - start for line in curve]
  label = 'training, mean of 5 steps' + (f', {rundir.name}' if runs > 1 else '')
  axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
  axes.plot(steps, [_mean_around(values, i) for i in range(len(values))],
            color=colour,
            linewidth=2,
            label=label)
  evaluations = [line for line in lines if line['stage'] == 'eval']
  after = [line for line in evaluations if line['step'] > start]
  if after:
    low = [line[metric] - (line.get(f'{metric}_ci95_low') or line[metric]) for line in after]
    high = [(line.get(f'{metric}_ci95_high') or line[metric]) - line[metric] for line in after]
    axes.errorbar([line['step'] - start for line in after], [line[metric] for line in after],
                  [low, high],
                  fmt='o',
                  color=colour,
                  markeredgecolor='white',
                  markersize=7,
                  capsize=3,
                  zorder=4,
                  clip_on=False,
                  label='held-out, 95 % interval' if index == 0 else None)
  before = [line[metric] for line in evaluations if line['step'] <= start]
  return before[-1] if before else None


def _mean_around(values: Sequence[float], i: int, half: int = 2) -> float:
  window = values[max(0, i - half):i + half + 1]
  return sum(window) / len(window)


def main(argv: Sequence[str]) -> int:
  """Writes the figure that the command line asks for."""
  if len(argv) < 3:
    sys.stderr.write('usage: python -m agentrl.viz.figure OUT.png RUNDIR...\n')
    return 2
  sys.stdout.write(f'{write_figure(argv[2:], argv[1])}\n')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
