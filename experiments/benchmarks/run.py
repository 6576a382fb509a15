"""Measures agentrl and its rivals one after the other and compares them with what is aimed at.

    bash experiments/benchmarks/setup_rivals.sh         # once
    python experiments/benchmarks/run.py                # all of it, on an idle machine
    python experiments/benchmarks/run.py --quick --only decode,update

Each measurement is a process of its own, pinned by taskset to as many cores as it may use, never
two at once; a phase of ours runs directly before and after the rivals' so that both meet the same
machine. Writes `results/<date>.json` beside this file. Exit code 1 if a measurement failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

import rich.console
import rich.table

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_RIVAL_PYTHON = _ROOT / '.venv-rivals' / 'bin' / 'python'
_SCRIPTS = {
    'agentrl': (sys.executable, _HERE / 'ours.py'),
    'tunix': (_RIVAL_PYTHON, _HERE / 'rivals' / 'tunix_rival.py'),
    'trl': (_RIVAL_PYTHON, _HERE / 'rivals' / 'trl_rival.py'),
}
_TIME_LIMIT = 1800  # seconds of one process
# A repetition takes half a minute and varies little.
_FEW_REPS = {('tunix', 'three_turns_agentic'): 2}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A rival's phase against ours.

  Attributes:
    phase: Of ours.
    threads: Cores both may use.
    rival: Library.
    rival_phase: Of the rival's.
    at_least: Times as fast as the rival that we aim to be; None where nothing was set.
  """

  phase: str
  threads: int
  rival: str
  rival_phase: str
  at_least: float | None = None


COMPARISONS = (
    Comparison('decode', 1, 'tunix', 'decode', 1.5),
    Comparison('update', 1, 'tunix', 'update', 1.25),
    Comparison('update_whole', 1, 'tunix', 'update'),
    Comparison('three_turns', 1, 'tunix', 'three_turns', 4.0),
    Comparison('three_turns', 1, 'tunix', 'three_turns_agentic', 15.0),
    Comparison('iteration', 1, 'tunix', 'iteration'),
    Comparison('decode', 2, 'trl', 'decode', 1.6),
    Comparison('update', 2, 'trl', 'update', 1.2),
    Comparison('update', 2, 'trl', 'update_by_hand'),
    Comparison('update_whole', 2, 'trl', 'update'),
    Comparison('three_turns', 2, 'trl', 'three_turns'),
    Comparison('three_turns_tool', 2, 'trl', 'three_turns_tool'),
    Comparison('iteration', 2, 'trl', 'iteration'),
)
# Of ours alone: tokens per second in the last turn against the first, seconds that a tool adds.
TURN_RATIO_AT_LEAST = 0.8
TOOL_ADDS_AT_MOST = 0.25


@dataclasses.dataclass(frozen=True)
class Line:
  """A figure of the report; `met` is None where nothing was aimed at."""

  name: str
  ours: str
  theirs: str
  figure: float
  aim: str
  met: bool | None


def plan(comparisons: tuple[Comparison, ...], rounds: int) -> list[tuple[str, str, int]]:
  """Returns what to run in order: (library, phase, threads).

  Measurements of one phase stand together, ours first; every second round goes backwards through
  each group, so that a machine that slows down slows neither side alone.
  """
  groups: dict[tuple[str, int], list[tuple[str, str, int]]] = {}
  for c in comparisons:
    group = groups.setdefault((c.phase, c.threads), [('agentrl', c.phase, c.threads)])
    group.append((c.rival, c.rival_phase, c.threads))
  steps = []
  for group in groups.values():
    for index in range(rounds):
      steps += group if index % 2 == 0 else group[::-1]
  return steps


def measure(library: str, phase: str, threads: int, reps: int) -> dict:
  """Runs one measurement in a process and returns what it printed, or `{'error': ...}`; blocks."""
  python, script = _SCRIPTS[library]
  cores = sorted(os.sched_getaffinity(0))[:threads]
  reps = min(reps, _FEW_REPS.get((library, phase), reps))
  command = ['taskset', '-c', ','.join(map(str, cores)), str(python), str(script), '--phase', phase,
             '--threads', str(threads), '--reps', str(reps)]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': str(threads)}
  environment.pop('XLA_FLAGS', None)
  if threads == 1:
    environment['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
  key = {'library': library, 'phase': phase, 'threads': threads, 'load': os.getloadavg()[0]}
  try:
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True,
                          timeout=_TIME_LIMIT)
  except subprocess.TimeoutExpired:
    return {**key, 'error': f'took longer than {_TIME_LIMIT} s'}
  except OSError as error:
    return {**key, 'error': f'{error}; setup_rivals.sh makes .venv-rivals'}
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    return {**key, 'error': f'exit code {done.returncode}: {done.stderr[-2000:]}'}
  return {**json.loads(lines[-1]), **key}


def pool(measurements: list[dict]) -> dict[tuple[str, str, int], dict]:
  """Returns one record a measurement: the median over all rounds, the largest memory."""
  pooled: dict[tuple[str, str, int], dict] = {}
  for m in measurements:
    if 'error' not in m:
      pooled.setdefault((m['library'], m['phase'], m['threads']), []).append(m)
  return {key: _pool_one(records) for key, records in pooled.items()}


def _pool_one(records: list[dict]) -> dict:
  samples = [s for record in records for s in record['samples']]
  seconds = statistics.median(samples)
  merged = {**records[0], 'samples': samples, 'seconds': seconds,
            'tokens_per_second': records[0]['tokens'] / seconds,
            'peak_rss_bytes': max(record['peak_rss_bytes'] for record in records)}
  if 'turn_seconds' in records[0]:
    turns = zip(*(record['turn_seconds'] for record in records))
    merged['turn_seconds'] = [statistics.median(turn) for turn in turns]
  if 'added' in records[0]:
    merged['added'] = [s for record in records for s in record['added']]
  return merged


def compare(pooled: dict[tuple[str, str, int], dict],
            comparisons: tuple[Comparison, ...] = COMPARISONS) -> list[Line]:
  """Returns the figures that the measurements allow, speeds first, then memory, then ours alone."""
  speed, memory = [], []
  for c in comparisons:
    ours, theirs = (pooled.get(key) for key in (
        ('agentrl', c.phase, c.threads), (c.rival, c.rival_phase, c.threads)))
    if ours is None or theirs is None:
      continue
    name = f'{c.phase}, {c.threads} thread{"s" * (c.threads > 1)}, vs {c.rival} {c.rival_phase}'
    ratio = theirs['seconds'] / ours['seconds']
    speed.append(Line(name, _seconds(ours), _seconds(theirs), ratio,
                      f'>= {c.at_least}' if c.at_least else '',
                      ratio >= c.at_least if c.at_least else None))
    ratio = theirs['peak_rss_bytes'] / ours['peak_rss_bytes']
    memory.append(Line(f'memory: {name}', _gigabytes(ours), _gigabytes(theirs), ratio, '> 1',
                       ratio > 1))
  return speed + memory + _ours_alone(pooled)


def _ours_alone(pooled: dict[tuple[str, str, int], dict]) -> list[Line]:
  lines = []
  one, tool = (pooled.get(('agentrl', *phase)) for phase in (('three_turns', 1), ('three_turns_tool', 2)))
  if one:
    turns = one['turn_seconds']
    ratio = turns[0] / turns[-1]
    lines.append(Line('tokens/s in turn 3 by turn 1', f'{turns[-1]:.3f} s', f'{turns[0]:.3f} s',
                      ratio, f'>= {TURN_RATIO_AT_LEAST}', ratio >= TURN_RATIO_AT_LEAST))
  if tool:
    added = statistics.median(tool['added'])
    lines.append(Line('seconds that a 50 ms tool adds', f"{tool['seconds']:.3f} s", '', added, f'<= {TOOL_ADDS_AT_MOST}',
                      added <= TOOL_ADDS_AT_MOST))
  return lines


def _seconds(record: dict) -> str:
  return f"{record['seconds']:.3f} s, {record['tokens_per_second']:,.0f} tokens/s"


def _gigabytes(record: dict) -> str:
  return f"{record['peak_rss_bytes'] / 1e9:.2f} GB"


def machine() -> dict:
  """Returns what the figures depend on: processor, cores, memory, commit."""
  cpuinfo = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  names = [line.partition(':')[2].strip() for line in cpuinfo if line.startswith('model name')]
  git = lambda *words: subprocess.run(  # noqa: E731
      ['git', *words], cwd=_ROOT, capture_output=True, text=True).stdout.strip()
  return {'processor': names[0] if names else platform.machine(),
          'cores': len(os.sched_getaffinity(0)),
          'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
          'python': platform.python_version(), 'commit': git('rev-parse', 'HEAD'),
          'changed': bool(git('status', '--porcelain', '--', 'agentrl', 'experiments/benchmarks'))}


def table(lines: list[Line]) -> rich.table.Table:
  """Returns the figures as a table."""
  out = rich.table.Table('what', 'ours', 'theirs', 'figure', 'aim', 'met')
  for line in lines:
    met = '' if line.met is None else ('yes' if line.met else '[red]no[/red]')
    out.add_row(line.name, line.ours, line.theirs, f'{line.figure:.2f}', line.aim, met)
  return out


def choose(only: str, rivals: str) -> tuple[Comparison, ...]:
  """Returns the comparisons whose phase, ours or the rival's, and rival are named; '' for all.

  Raises:
    SystemExit: if a name is unknown, with the known ones.
  """
  phases, libraries = ([word for word in text.split(',') if word] for text in (only, rivals))
  known = {c.phase for c in COMPARISONS} | {c.rival_phase for c in COMPARISONS}
  unknown = (set(phases) - known) | (set(libraries) - (set(_SCRIPTS) - {'agentrl'}))
  if unknown:
    raise SystemExit(f'unknown: {", ".join(sorted(unknown))}; phases are '
                     f'{", ".join(sorted(known))}; rivals are tunix, trl')
  return tuple(c for c in COMPARISONS if (not phases or {c.phase, c.rival_phase} & set(phases))
               and (not libraries or c.rival in libraries))


def main() -> int:
  """Measures, prints the table, writes the results; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='one round of two repetitions')
  parser.add_argument('--only', default='', help='phases, with commas between them')
  parser.add_argument('--rivals', default='', help='tunix, trl or both')
  parser.add_argument('--reps', type=int, default=5, help='repetitions in a process')
  parser.add_argument('--rounds', type=int, default=2, help='processes a measurement')
  args = parser.parse_args()
  reps, rounds = (2, 1) if args.quick else (args.reps, args.rounds)
  comparisons = choose(args.only, args.rivals)
  console = rich.console.Console()
  about, measurements, steps = machine(), [], plan(comparisons, rounds)
  if len(os.sched_getaffinity(0)) < max(c.threads for c in comparisons):
    console.print('Fewer cores than threads: the figures for two threads mean little here.')
  for i, step in enumerate(steps):
    console.print(f'[{i + 1}/{len(steps)}] {step[0]} {step[1]}, threads {step[2]}', markup=False)
    measurements.append(measure(*step, reps))
    error = measurements[-1].get('error')
    console.print(error or f"  {_seconds(measurements[-1])}, {_gigabytes(measurements[-1])}",
                  markup=False)
  lines = compare(pool(measurements), comparisons)
  console.print(table(lines))
  now = datetime.datetime.now()
  path = _HERE / 'results' / f'{now:%Y-%m-%dT%H%M%S}.json'
  path.parent.mkdir(exist_ok=True)
  record = {'date': now.isoformat(timespec='seconds'), 'quick': args.quick, 'machine': about,
            'lines': [dataclasses.asdict(line) for line in lines], 'measurements': measurements}
  path.write_text(json.dumps(record, indent=1))
  console.print(f'Written to {path.relative_to(_ROOT)}')
  return int(any('error' in m for m in measurements))


if __name__ == '__main__':
  sys.exit(main())
