"""Compiles a run's programs for TPU slices that are not there, and says what they need.

    python -m experiments.scale.compile                          # whatever has no result yet, then docs/scale.md
    python -m experiments.scale.compile --case=qwen3_8b_v5e_64 --program=update
    python -m experiments.scale.compile --again                  # all of them anew

Needs libtpu, as of `pip install 'agentrl[scale]'`, and no TPU. Each program is compiled in a process of its own, one after
the other; what is done is kept, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any, Sequence

from experiments.scale.cases import CASES, Case
from experiments.scale.chips import CHIPS

PROGRAMS = ('update', 'decode', 'extend')
RESULTS = pathlib.Path(__file__).with_name('results')


def main(arguments: Sequence[str] | None = None):
  """Compiles what is asked for and writes the document."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--case', action='append', choices=sorted(CASES), help='one of the cases; may be repeated')
  parser.add_argument('--program', action='append', choices=PROGRAMS, help='one of their programs; may be repeated')
  parser.add_argument('--again', action='store_true', help='also where there is a result')
  parser.add_argument('--layers', type=int, default=0, help='compile so many layers, and only print what comes out')
  parser.add_argument('--keep', default='', help='folder for compiled programs; one that lies there is not compiled '
                      'again, only read anew')
  parser.add_argument('--here', action='store_true', help='compile in this process')
  options = parser.parse_args(arguments)
  for name in options.case or CASES:
    for program in options.program or PROGRAMS:
      path = RESULTS / f'{name}.{program}.json'
      if options.layers:
        print(json.dumps(compiled(CASES[name], program, options.layers, options.keep), indent=2))
      elif options.here:
        _write(path, result_of(CASES[name], program, options.keep))
      elif options.again or not path.exists():
        print(f'{name}: {program}', flush=True)
        subprocess.run([sys.executable, '-m', 'experiments.scale.compile', '--here', f'--case={name}',
                        f'--program={program}', f'--keep={options.keep}'], check=True)
  if not (options.here or options.layers):
    from experiments.scale import document  # pylint: disable=g-import-not-at-top
    document.write(RESULTS)


def result_of(case: Case, program: str, keep: str = '') -> dict[str, Any]:
  """Returns what a program needs, and the seconds that its chip cannot do without."""
  found = compiled(case, program, keep=keep)
  chip = CHIPS[case.generation]
  found['seconds'] = {
      'products': found['flops'] / chip.flops,
      'memory': found['hbm_bytes'] / chip.hbm_bandwidth,
      'network': sum(found['collective_bytes'].values()) / chip.ring_bandwidth,
  }
  found['bound_by'] = max(found['seconds'], key=found['seconds'].get)
  return found


def compiled(case: Case, program: str, layers: int = 0, keep: str = '') -> dict[str, Any]:
  """Compiles a program and returns what one chip holds and does.

  Args:
    case: See there.
    program: One of `PROGRAMS`.
    layers: Of the policy; 0 for all.
    keep: Folder where compiled programs are left and looked for; '' for none.
  """
  from experiments.scale import hlo, programs  # pylint: disable=g-import-not-at-top
  layers = layers or case.model.num_layers
  case = programs.with_layers(case, layers)
  kept = pathlib.Path(keep) / f'{case.name}.{program}.{layers}.json.gz' if keep else None
  if kept and kept.exists():
    made = json.loads(gzip.decompress(kept.read_bytes()))
  else:
    made = _compile(case, program)
    if kept:
      kept.parent.mkdir(parents=True, exist_ok=True)
      kept.write_bytes(gzip.compress(json.dumps(made).encode()))
  text = made.pop('hlo')
  made['checks'] = programs.checks(case, program, text)
  cost = hlo.analyse(text, loops=programs.loops(case, program), kernel_flops=programs.kernel_flops(case),
                     kernel_bytes=programs.kernel_bytes(case))
  made['bytes']['beside'] = programs.bytes_beside(case, program)
  return {'case': case.name, 'program': program, 'layers': layers, **made, 'flops': cost.flops,
          'hbm_bytes': cost.hbm_bytes, 'collective_bytes': cost.collective_bytes, 'kernels': cost.kernels}


def _compile(case: Case, program: str) -> dict[str, Any]:
  """Returns the compiled program's text, what it holds by the compiler's account, and what compiling took."""
  from experiments.scale import programs  # pylint: disable=g-import-not-at-top
  started = time.time()
  lowered = programs.PROGRAMS[program](case)
  traced, cpu = time.time(), time.process_time()
  made = lowered.compile()
  seconds = dict(trace_seconds=traced - started, compile_seconds=time.time() - traced,
                 compile_cpu_seconds=time.process_time() - cpu)
  memory = made.memory_analysis()
  return {**seconds, 'compiler_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024, 'bytes': {
      'arguments': memory.argument_size_in_bytes, 'results': memory.output_size_in_bytes,
      'aliased': memory.alias_size_in_bytes, 'temporary': memory.temp_size_in_bytes,
      'peak': memory.peak_memory_in_bytes}, 'hlo': made.as_text()}


def _write(path: pathlib.Path, value: dict[str, Any]):
  path.parent.mkdir(exist_ok=True)
  temporary = path.with_name(f'{path.name}.tmp{os.getpid()}')
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')
  os.replace(temporary, path)


if __name__ == '__main__':
  main()
