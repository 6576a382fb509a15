"""What a person watching the run sees: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from typing import IO, Callable, Mapping, Sequence

from absl import logging
import rich.console
import rich.progress

HEADLINE = ('success', 'reward', 'loss', 'token_accuracy', 'tokens_per_second',
            'tokens_per_second/decode')
_SHORT = {
    'tokens_per_second': 'tokens/s',
    'tokens_per_second/decode': 'tokens/s',
    'token_accuracy': 'accuracy'
}
_WINDOW = 30  # Steps that the estimate of the time left looks back on.


class Progress(contextlib.AbstractContextManager):
  """Shows stage, step, a bar, time elapsed and left, and a few metrics, while its block runs.

  On a terminal it is a live display, taken down when the block ends, exceptions included. Elsewhere
  it is one plain line every `interval` seconds, at the first and at the last step of a stage.

  Args:
    headline: Names of the metrics shown, in order; those missing are skipped.
    interval: Seconds between plain lines.
    stream: Where to write; standard output where None.
    clock: Seconds, monotonic.
  Example:
    >>> with Progress(stream=sys.stdout) as progress:
    ...   progress.stage('rl', total=2)
    ...   progress.update(2, {'success': 0.5})
    rl  2/2  100%  elapsed 0:00:00  left 0:00:00  success 0.500
  """

  def __init__(self,
               headline: Sequence[str] = HEADLINE,
               interval: float = 10.0,
               stream: IO[str] | None = None,
               clock: Callable[[], float] = time.monotonic):
    self._headline = tuple(headline)
    self._interval = interval
    self._stream = stream or sys.stdout
    self._clock = clock
    self._live: rich.progress.Progress | None = None
    self._task: rich.progress.TaskID | None = None
    self._log_stream: IO[str] | None = None
    self._name, self._total, self._step = '', 0, 0
    self._started = clock()
    self._last_line = float('-inf')
    self._history: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW + 1)

  def __enter__(self) -> Progress:
    console = rich.console.Console(file=self._stream)
    if console.is_terminal:
      self._live = rich.progress.Progress('[bold]{task.description}',
                                          rich.progress.BarColumn(),
                                          rich.progress.MofNCompleteColumn(),
                                          '{task.fields[text]}',
                                          console=console)
      self._live.start()
      # absl holds on to the stream it first saw; through rich its lines go above the bar, not
      # across it.
      handler = logging.get_absl_handler().python_handler
      self._log_stream = handler.stream
      if self._log_stream is sys.__stderr__:
        handler.stream = sys.stderr
    return self

  def __exit__(self, *unused_exception) -> None:
    if self._live is not None:
      logging.get_absl_handler().python_handler.stream = self._log_stream
      self._live.stop()
      self._live = None

  def stage(self, name: str, total: int, start: int = 0):
    """Begins a stage.

    Args:
      name: Shown in front.
      total: Steps of the whole stage.
      start: Steps done already, by a run that was resumed.
    """
    self._name, self._total, self._step = name, total, start
    self._started = self._clock()
    self._last_line = float('-inf')
    self._history.clear()
    self._history.append((self._started, start))
    if self._live is not None:
      self._task = self._live.add_task(name, total=total, completed=start, text='')

  def update(self, step: int, metrics: Mapping[str, float] | None = None):
    """Shows that `step` steps of the stage are done.

    Args:
      step: Steps done, counted from the start of the stage.
      metrics: Values by name; the headline ones are shown.
    """
    now = self._clock()
    self._step = step
    self._history.append((now, step))
    text = self._text(now, metrics or {})
    if self._live is not None:
      self._live.update(self._task, completed=step, text=text)
    elif now - self._last_line >= self._interval or step >= self._total:
      self._last_line = now
      percent = 100 * step // max(self._total, 1)
      self._stream.write(f'{self._name}  {step}/{self._total}  {percent}%  {text}\n')
      self._stream.flush()

  def seconds_left(self) -> float | None:
    """Returns the time left in the stage at the pace of the last steps; None before the first."""
    (first_time, first_step), (last_time, last_step) = self._history[0], self._history[-1]
    if last_step <= first_step:
      return None
    return (self._total - last_step) * (last_time - first_time) / (last_step - first_step)

  def _text(self, now: float, metrics: Mapping[str, float]) -> str:
    left = self.seconds_left()
    parts = [
        f'elapsed {_clock_text(now - self._started)}',
        f'left {"-:--:--" if left is None else _clock_text(left)}'
    ]
    parts += [
        f'{_SHORT.get(name, name)} {_short_number(metrics[name])}' for name in self._headline
        if metrics.get(name) is not None
    ]
    return '  '.join(parts)


def _clock_text(seconds: float) -> str:
  minutes, seconds = divmod(int(round(seconds)), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def _short_number(value: float) -> str:
  value = float(value)
  if abs(value) >= 1000:
    return f'{value / 1000:.1f}k'
  return f'{value:.0f}' if abs(value) >= 100 else f'{value:.3f}'
