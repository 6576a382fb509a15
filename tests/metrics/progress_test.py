"""The display on a pipe, on a terminal, and when the run raises."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap

import pytest

from agentrl.metrics import progress


class Clock:

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_plain_lines_come_every_interval_and_at_the_end():
  stream, clock = io.StringIO(), Clock()
  with progress.Progress(interval=10, stream=stream, clock=clock) as display:
    display.stage('rl', total=10)
    for step in range(1, 11):
      clock.now += 4
      display.update(step, {'success': 0.5, 'tokens_per_second/decode': 3210.0, 'other': 1.0})
  lines = stream.getvalue().splitlines()
  # Steps end at 4, 8, ... 40 s. A line at once, then at the first step at least 10 s later, and at
  # the last.
  assert [line.split()[1] for line in lines] == ['1/10', '4/10', '7/10', '10/10']
  # 4 s a step, 9 steps to go.
  assert lines[0] == 'rl  1/10  10%  elapsed 0:00:04  left 0:00:36  success 0.500  tokens/s 3.2k'


def test_the_time_left_of_a_resumed_stage_ignores_steps_done_before():
  clock = Clock()
  display = progress.Progress(stream=io.StringIO(), clock=clock)
  display.stage('rl', total=100, start=90)
  assert display.seconds_left() is None
  clock.now += 3
  display.update(91)
  assert display.seconds_left() == 27  # 9 steps at 3 s.


def test_the_time_left_follows_a_change_of_pace():
  clock = Clock()
  display = progress.Progress(stream=io.StringIO(), clock=clock)
  display.stage('rl', total=1000)
  clock.now += 1000  # Compilation in the first step.
  display.update(1)
  for step in range(2, 100):
    clock.now += 1
    display.update(step)
  assert display.seconds_left() == 901  # The window no longer holds the first step.


@pytest.mark.parametrize('ending', ['raise RuntimeError("boom")', 'pass'])
def test_the_terminal_is_restored_and_log_lines_stay_whole(ending):
  script = textwrap.dedent(f"""
      from absl import logging
      from agentrl.metrics import progress
      with progress.Progress() as display:
        display.stage('rl', total=3)
        display.update(1, {{'success': 0.5}})
        logging.warning('a line of the log')
        display.update(2, {{'success': 0.75}})
        {ending}
      """)
  leader, follower = os.openpty()
  process = subprocess.Popen([sys.executable, '-c', script],
                             stdout=follower,
                             stderr=follower,
                             env={
                                 **os.environ, 'TERM': 'xterm',
                                 'COLUMNS': '140'
                             })
  os.close(follower)
  output = b''
  while True:
    try:
      chunk = os.read(leader, 4096)
    except OSError:  # Linux says EIO when the last writer has closed a terminal.
      break
    if not chunk:
      break
    output += chunk
  os.close(leader)
  assert process.wait(timeout=20) == (1 if 'raise' in ending else 0)
  text = output.decode()
  # The terminal's sequences for hiding and showing the cursor.
  hide, show = '\x1b[?25l', '\x1b[?25h'
  assert text.count(hide) >= 1 and text.rindex(show) > text.rindex(hide)
  assert 'a line of the log' in text and '2/3' in text and 'success 0.750' in text
  assert ('boom' in text) == ('raise' in ending)
