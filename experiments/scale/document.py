"""docs/scale.md from the results, and from what notes.md says about them."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Sequence

from experiments.scale.cases import CASES, Case
from experiments.scale.chips import CHIPS

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'scale.md'
NOTES = pathlib.Path(__file__).with_name('notes.md')
GB = 1e9

Found = dict[str, dict[str, Any]]


def write(results: pathlib.Path):
  """Writes the page from the JSON files of a folder."""
  found = {path.name.removesuffix('.json'): json.loads(path.read_text(encoding='utf-8'))
           for path in sorted(results.glob('*.json'))}
  PAGE.write_text(page(found), encoding='utf-8')


def page(found: Found) -> str:
  """Returns the page for results by 'case.program'; what is missing is said to be."""
  parts = [
      '# What runs at size need', '',
      'Written by `python -m experiments.scale.compile`. Nothing here has run on a TPU: programs are compiled for the '
      'chips and what the compiler made of them is read. Times are what the chips could do at best.', '',
      '## Cases', '', *_layouts(), '',
      'v5p slices are named by cores, of which a chip has two. An update is of all rollouts of a step at their longest; '
      'decode is a chunk of steps with all slots at their longest; extend writes known tokens at the end of contexts '
      'that are nearly as long.', '',
      '## Memory of a chip, GB', '', *_memory(found), '',
      '## What a chip does', '', *_work(found), '',
      '## Checked in the compiled programs', '', *_checks(found), '',
      '## What the numbers are', '', *_meaning(), '', NOTES.read_text(encoding='utf-8').rstrip(), '']
  return '\n'.join(parts)


def free_bytes(case: Case, result: dict[str, Any]) -> float:
  """Returns what of a chip's memory is left while the program runs; below 0 if it does not fit."""
  return CHIPS[case.generation].hbm_bytes - result['bytes']['peak'] - result['bytes']['beside']


def _each(found: Found):
  for case in CASES.values():
    for program in ('update', 'decode', 'extend'):
      if f'{case.name}.{program}' in found:
        yield case, program, found[f'{case.name}.{program}']


def _layouts() -> list[str]:
  rows = [('case', 'chips', "learner's mesh", 'rows a pass', "a sampler's chips and mesh", 'its slots',
           'rollouts a step', 'decode', 'extend')]
  for case in CASES.values():
    rows.append((case.name, f'{case.chips} {case.generation}', _mesh(case.mesh), str(case.micro_rows),
                 f'{case.sampler_topology.partition(":")[2]}, {_mesh(case.sampler_mesh)}', str(case.slots),
                 f'{case.prompts} x {case.group_size} of {case.context // 1_024}k', f'{case.chunk} steps',
                 f'{case.extend_rows} x {case.extend_tokens:,}'))
  return _table(rows)


def _mesh(shape) -> str:
  return ' x '.join(f'{axis} {n}' for axis, n in shape.items())


def _memory(found: Found) -> list[str]:
  rows = [('case', 'program', 'arguments', 'temporaries', 'beside', 'together', 'of', 'free')]
  for case, program, result in _each(found):
    b, capacity, free = result['bytes'], CHIPS[case.generation].hbm_bytes, free_bytes(case, result)
    gb = lambda x: f'{x / GB:.1f}'
    rows.append((case.name, program, gb(b['arguments']), gb(b['peak'] - b['arguments']), gb(b['beside']),
                 gb(capacity - free), gb(capacity), gb(free) if free >= 0 else '**does not fit**'))
  return _table(rows)


def _work(found: Found) -> list[str]:
  rows = [('case', 'program', 'TFLOP', 'GB of HBM', 'GB sent', 'of it, by kind', 'products, s', 'HBM, s', 'network, s',
           'bound by', 'compiled in')]
  for case, program, result in _each(found):
    kinds = ', '.join(f'{kind} {size / GB:.3g}' for kind, size in sorted(result['collective_bytes'].items())
                      if size >= 1e6)
    rows.append((case.name, program, f"{result['flops'] / 1e12:,.4g}", f"{result['hbm_bytes'] / GB:,.4g}",
                 f"{sum(result['collective_bytes'].values()) / GB:,.4g}", kinds,
                 *(f"{result['seconds'][key]:.3g}" for key in ('products', 'memory', 'network')),
                 {'memory': 'HBM'}.get(result['bound_by'], result['bound_by']),
                 f"{result['compile_cpu_seconds']:.0f} s"))
  return _table(rows)


def _checks(found: Found) -> list[str]:
  rows = [('case', 'program', 'largest array of logits', 'whole would be, elements', 'donated, GB',
           'of it copied, MB', 'largest collective', 'is the cache')]
  for case, program, result in _each(found):
    checks = result['checks']
    logits, copies = checks['logits'], sum(checks['donated']['copies'].values())
    rows.append((case.name, program, f"{logits['largest'] or 'none'}{' **whole**' if logits['is_whole'] else ''}",
                 f"{logits['whole']:,}", f"{checks['donated']['bytes'] / GB:.2f}", f'{copies / 1e6:.0f}',
                 f"{checks['collective']['largest']}", '**yes**' if checks['collective']['is_cache'] else 'no'))
  return _table(rows)


def _meaning() -> list[str]:
  chips = [f'{name}: {c.flops / 1e12:.0f} TFLOP/s in bfloat16, {c.hbm_bandwidth / GB:,.0f} GB/s of HBM, '
           f'{c.ring_bandwidth / GB:.0f} GB/s around a ring ({c.source})' for name, c in CHIPS.items()]
  return [
      "- Memory: together is the compiler's own peak for the program, arguments included, and what lies beside: during "
      "an update the sampler's weights, its cache being given back; during decode and extend the learner's weights and "
      'moments. The capacity is what the compiler says is available on such a chip; it refuses a program whose peak is larger.',
      '- TFLOP, GB of HBM and GB sent: of one chip in one call, from the optimised HLO, loops counted as often as they '
      "run (XLA's own cost analysis counts a loop's body once and knows nothing of Pallas kernels). Computing again in "
      'the backward pass counts.',
      '- GB of HBM is an estimate: what each fusion reads and writes that does not lie in on-chip memory. Kernels count with '
      "operands and results, each once; but extend's attention with the blocks that contexts have, once for each tile of "
      'queries, taken to lie evenly on the chips that split them.',
      '- GB sent: as a ring does it. A ring uses one dimension of the torus, both ways round: half of the stated '
      'bidirectional bandwidth, divided by the dimensions.',
      '- A step takes at least the longest of the three times, if they overlap wholly; the sum, if not at all.',
      '- Compile times are seconds of one processor core.',
      '- Checked: no array in memory of a vocabulary dimension (weights apart) has as many elements as the logits of all '
      'tokens of a pass (of a step, where decode draws); no copy of a donated buffer within HBM; no collective as large '
      "as a layer's keys or values.",
      *(f'- {line}' for line in chips)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  head, *body = [f'| {" | ".join(row)} |' for row in rows]
  return [head, '|' + '---|' * len(rows[0]), *body]
