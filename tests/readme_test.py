"""The README's programs run, and print what they say they print."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re


def test_library_section_runs_as_it_stands():
  text = (pathlib.Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert len(blocks) == 2
  program = ''.join(blocks)
  expected = [line.split('  # ')[1] for line in program.splitlines() if line.startswith('print(')]
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(program, 'README.md', 'exec'), {})  # pylint: disable=exec-used
  assert out.getvalue().splitlines() == expected
