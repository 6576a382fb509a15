"""What one chip does in a compiled program: read off its optimised HLO, loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and knows nothing of Pallas kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
          'u64': 8, 'f64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1}
_SHAPE = re.compile(r'\b(' + '|'.join(_BYTES) + r')\[([\d,]*)\](\{[^}]*\})?')
# Neither move nor compute anything.
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'iota', 'partition-id', 'replica-id',
                   'after-all', 'optimization-barrier', 'while', 'call', 'conditional', 'domain', 'broadcast'))
_SLICES = ('dynamic-slice', 'gather', 'slice')
# Write into their first operand what is in that of this number.
_WRITES = {'dynamic-update-slice': 1, 'scatter': 2}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of HLO: its name, operation, type, operands by name, the text they stand in, and what follows them."""

  name: str
  op: str
  type: str
  operands: tuple[str, ...]
  inside: str
  rest: str
  root: bool

  def called(self, key: str) -> list[str]:
    """Returns the computations that an attribute names."""
    found = re.search(rf'\b{key}=\{{?(%[\w.\-]+(?:, *%[\w.\-]+)*)', self.rest)
    return re.findall(r'%[\w.\-]+', found.group(1)) if found else []


@dataclasses.dataclass
class Cost:
  """What one chip does in one run of a program.

  Attributes:
    flops: Of matrix products; a multiply-add is two.
    hbm_bytes: Read and written, an estimate: operands and results of each fusion that do not lie in on-chip memory.
    collective_bytes: By kind, sent by a chip, as a ring would.
    kernels: Custom kernels by name, how often they run.
  """

  flops: float = 0.0
  hbm_bytes: float = 0.0
  collective_bytes: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
  kernels: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))


KernelCost = Callable[[Instruction, Mapping[str, str]], float]


def shapes_of(text: str) -> list[tuple[str, tuple[int, ...], str]]:
  """Returns the (dtype, dimensions, layout) of every array in a type."""
  return [(dtype, tuple(int(d) for d in dims.split(',') if d), layout) for dtype, dims, layout in _SHAPE.findall(text)]


def num_bytes(text: str, hbm_only: bool = False) -> int:
  """Returns the size of a type; of its parts in the main memory alone, if asked for."""
  return sum(_BYTES[dtype] * math.prod(dims) for dtype, dims, layout in shapes_of(text)
             if not (hbm_only and 'S(' in layout))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns the computations by name, and the name of the entry."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if line.startswith(('%', 'ENTRY')):
      name = re.search(r'%[\w.\-]+', line).group()
      current = computations.setdefault(name, [])
      entry = name if line.startswith('ENTRY') else entry
    elif current is not None and ' = ' in line:
      current.append(_instruction(line.strip()))
  return computations, entry


def _instruction(line: str) -> Instruction:
  root = line.startswith('ROOT ')
  name, _, rest = line.removeprefix('ROOT ').partition(' = ')
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  kind, after = rest[:end], rest[end:].strip()
  op, _, _ = after.partition('(')
  close = _closing(after, len(op))
  inside = after[len(op) + 1:close]
  return Instruction(name, op, kind, tuple(re.findall(r'%[\w.\-]+', inside)), inside, after[close + 1:], root)


def _closing(text: str, start: int, pair: str = '()') -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == pair[0]) - (text[i] == pair[1])
    if depth == 0:
      return i
  raise ValueError(f'no closing parenthesis in {text[:200]!r}')


def trip_count(condition: Iterable[Instruction], body: Iterable[Instruction]) -> int | None:
  """Returns how often a loop that counts from 0 up to a constant runs; None where no constant is compared with.

  XLA may count by more than 1: loops that pass parts of a product around a ring do two rounds in one.
  """
  found = {i.name: i for i in condition}
  compare = next((i for i in found.values() if i.root and i.op == 'compare' and 'direction=LT' in i.rest), None)
  limit = next((n for o in (compare.operands if compare else ()) for n in [_constant(found.get(o))] if n is not None), None)
  if limit is None:
    return None
  counter = next((found[o] for o in compare.operands if o in found and found[o].op == 'get-tuple-element'), None)
  place = re.search(r'index=(\d+)', counter.rest) if counter else None
  inside = {i.name: i for i in body}
  root = next((i for i in inside.values() if i.root), None)
  following = inside.get(root.operands[int(place.group(1))]) if place and root and root.op == 'tuple' else None
  steps = [_constant(inside.get(o)) for o in following.operands] if following and following.op == 'add' else []
  return -(-limit // next((n for n in steps if n), 1))


def _constant(i: Instruction | None) -> int | None:
  return int(i.inside) if i and i.op == 'constant' and i.inside.lstrip('-').isdigit() else None


def analyse(text: str, *, loops: Sequence[int] = (1,), kernel_flops: Mapping[str, KernelCost] | None = None,
            kernel_bytes: Mapping[str, KernelCost] | None = None) -> Cost:
  """Returns what one chip does.

  Args:
    text: `compiled.as_text()`.
    loops: How often loops run whose end is not known before, such as that over micro-batches: the outermost of them,
      those within it, and so on.
    kernel_flops: Floating-point operations of one run of a custom kernel, by how its name begins: a function of its
      instruction and of the types of its operands by name.
    kernel_bytes: Bytes of main memory that it reads and writes, likewise; of one that is not here its operands and results,
      each once.
  Raises:
    ValueError: if a custom kernel is of a name that `kernel_flops` does not have.
  """
  computations, entry = parse(text)
  walk = _Walk(computations, loops, kernel_flops or {}, kernel_bytes or {}, Cost())
  walk.visit(entry, 1.0, True, 0)
  return dataclasses.replace(walk.cost, collective_bytes=dict(walk.cost.collective_bytes), kernels=dict(walk.cost.kernels))


class _Walk:
  """Adds up what the instructions of computations do, each as often as it runs."""

  def __init__(self, computations: dict[str, list[Instruction]], loops: Sequence[int], kernel_flops: Mapping[str, KernelCost],
               kernel_bytes: Mapping[str, KernelCost], cost: Cost):
    self._computations, self._loops, self.cost = computations, loops, cost
    self._kernel_flops, self._kernel_bytes = kernel_flops, kernel_bytes
    self._chains: set[str] = set()

  def visit(self, name: str, times: float, moves: bool, depth: int):
    """Adds one computation.

    Args:
      name: Of it.
      times: How often it runs.
      moves: Whether what its instructions read and write passes through main memory.
      depth: Loops of unknown end that it is in.
    """
    types = {i.name: i.type for i in self._computations[name]}
    for i in self._computations[name]:
      kind = i.op.removesuffix('-start')
      if kind in COLLECTIVES and (moves or self._is_new(i)):
        self.cost.collective_bytes[kind] += times * ring_bytes(i, kind, types)
      elif i.op in ('convolution', 'dot'):
        self.cost.flops += times * (convolution_flops if i.op == 'convolution' else dot_flops)(i, types)
      elif i.op == 'custom-call' and 'tpu_custom_call' in i.rest:
        self._kernel(i, types, times)
      if i.op == 'while':
        condition, body = i.called('condition')[0], i.called('body')[0]
        count = trip_count(self._computations[condition], self._computations[body])
        known = count if count is not None else self._loops[min(depth, len(self._loops) - 1)]
        self.visit(body, times * known, moves, depth + (count is None))
      elif i.op == 'conditional':
        branches = i.called('branch_computations') or i.called('true_computation') + i.called('false_computation')
        for branch in branches:
          self.visit(branch, times / len(branches), moves, depth)
      elif i.op in ('fusion', 'call', 'async-start'):
        for callee in i.called('calls') + i.called('to_apply'):
          self.visit(callee, times, moves and i.op != 'fusion', depth)
      if moves and i.op not in _FREE and not i.op.endswith('-done'):
        self.cost.hbm_bytes += times * self._moved(i, types)

  def _is_new(self, i: Instruction) -> bool:
    """An asynchronous collective stands in the fusions that start it, go on with it and end it; it runs once."""
    chain = re.search(r'chain_id="(\d+)"', i.rest)
    if not chain:
      return True
    known = chain.group(1) in self._chains
    self._chains.add(chain.group(1))
    return not known

  def _kernel(self, i: Instruction, types: Mapping[str, str], times: float):
    name = i.name.lstrip('%')
    known = next((k for k in self._kernel_flops if name.startswith(k)), None)
    if known is None:
      raise ValueError(f'nothing is known of the kernel {name!r}; known: {", ".join(self._kernel_flops) or "none"}')
    self.cost.flops += times * self._kernel_flops[known](i, types)
    self.cost.kernels[known] += times

  def _moved(self, i: Instruction, types: Mapping[str, str]) -> float:
    """Returns the bytes of main memory that an instruction reads and writes; of slices, what is cut out or put in."""
    if i.op == 'custom-call' and 'tpu_custom_call' in i.rest:
      known = next((k for k in self._kernel_bytes if i.name.lstrip('%').startswith(k)), None)
      if known is not None:
        return self._kernel_bytes[known](i, types)
    if i.op in _SLICES:
      return 2 * num_bytes(i.type, True)
    if i.op in ('slice-start', 'copy-start'):
      # ((whole), part, context) and (copy, original, context); either side may lie in on-chip memory.
      ends = shapes_of(i.type)[:2]
      dtype, dims, _ = ends[i.op == 'slice-start']
      return _BYTES[dtype] * math.prod(dims) * sum('S(' not in layout for _, _, layout in ends)
    if i.op == 'dynamic-update-slice':
      return 2 * num_bytes(types.get(i.operands[1], ''), True)
    inner = self._computations[i.called('calls')[0]] if i.op == 'fusion' else []
    parameters = {int(p.inside): p for p in inner if p.op == 'parameter'}
    total, written = 0, num_bytes(i.type, True)
    for number, operand in enumerate(i.operands):
      full = num_bytes(types.get(operand, ''), True)
      parameter = parameters.get(number)
      read, replaced = _touched(inner, parameter.name, full) if parameter else (full, 0)
      total += min(read, full)
      written -= min(replaced, written)
    return total + written


def _touched(inner: list[Instruction], name: str, full: int) -> tuple[int, int]:
  """Returns the bytes read of a fusion's parameter, and those of the result that are it, left as they are."""
  users = [i for i in inner if name in i.operands]
  while len(users) == 1 and users[0].op == 'bitcast':
    name = users[0].name
    users = [i for i in inner if name in i.operands]
  if users and all(i.op in _SLICES and i.operands[0] == name for i in users):
    return sum(num_bytes(i.type) for i in users), 0
  if len(users) == 1 and users[0].op in _WRITES and users[0].operands[0] == name:
    types = {i.name: i.type for i in inner}
    new = num_bytes(types.get(users[0].operands[_WRITES[users[0].op]], ''))
    return new, max(0, full - new)
  return full, 0


# ---- what a program must not do -----------------------------------------------------------------


def stored(computations: dict[str, list[Instruction]], entry: str) -> Iterator[Instruction]:
  """Yields the instructions whose results lie in memory: those outside of fusions."""
  seen, todo = set(), [entry]
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    for i in computations[name]:
      yield i
      if i.op in ('while', 'conditional', 'call'):
        for key in ('condition', 'body', 'branch_computations', 'true_computation', 'false_computation', 'to_apply'):
          todo.extend(i.called(key))


def donated(text: str) -> dict[int, str]:
  """Returns the types of the parameters whose memory results take over, by number."""
  computations, entry = parse(text)
  header = text[:text.index('\n')]
  start = header.find('input_output_alias={')
  listed = header[start:_closing(header, header.index('{', start), '{}')] if start >= 0 else ''
  numbers = {int(n) for n in re.findall(r': \((\d+),', listed)}
  return {int(i.inside): i.type for i in computations[entry] if i.op == 'parameter' and int(i.inside) in numbers}


def copies_of(text: str, types: Iterable[str], at_least: int = 1 << 20) -> dict[str, int]:
  """Returns the bytes of copies, by dtype and dimensions, of arrays like those of `types` that have `at_least` bytes.

  Copies within the main memory: what is fetched into on-chip memory and brought back has no second place there.
  """
  wanted = {shape[:2] for t in types for shape in shapes_of(t) if num_bytes(t) >= at_least}
  found: dict[str, int] = collections.defaultdict(int)
  instructions = list(stored(*parse(text)))
  kinds = {i.name: i.type for i in instructions}
  for i in instructions:
    if i.op in ('copy', 'copy-start'):
      dtype, dims, _ = shapes_of(i.type)[0]
      on_chip = any('S(' in layout for _, of, layout in shapes_of(i.type) if of == dims)
      if i.op == 'copy':
        on_chip |= any('S(' in layout for _, _, layout in shapes_of(kinds.get(i.operands[0], '')))
      if (dtype, dims) in wanted and not on_chip:
        found[f'{dtype}[{",".join(map(str, dims))}]'] += _BYTES[dtype] * math.prod(dims)
  return dict(found)


def largest(text: str, divisor: int, without: Iterable[int] = ()) -> tuple[int, str]:
  """Returns elements and type of the largest array in memory with a dimension that is a multiple of `divisor`.

  Args:
    text: `compiled.as_text()`.
    divisor: Of a dimension.
    without: Arrays with a dimension of one of these sizes do not count.
  """
  arrays = ((math.prod(dims), f'{dtype}[{",".join(map(str, dims))}]') for i in stored(*parse(text))
            for dtype, dims, _ in shapes_of(i.type)
            if any(d and d % divisor == 0 for d in dims) and not set(dims) & set(without))
  return max(arrays, default=(0, ''))


def largest_collective(text: str) -> tuple[int, str]:
  """Returns bytes and description of the largest array that a collective gives a chip, fused ones included."""
  computations, _ = parse(text)
  found = ((_BYTES[dtype] * math.prod(dims), f'{i.op.removesuffix("-start")} {dtype}[{",".join(map(str, dims))}]')
           for inside in computations.values() for i in inside if i.op.removesuffix('-start') in COLLECTIVES
           for dtype, dims, _ in shapes_of(i.type))
  return max(found, default=(0, ''))


# ---- sizes --------------------------------------------------------------------------------------


def ring_bytes(i: Instruction, kind: str, types: Mapping[str, str]) -> float:
  """Returns the bytes that a chip sends for a collective, as a ring does it."""
  operands = sum(num_bytes(types.get(o, '')) for o in i.operands) or num_bytes(i.type)
  if kind == 'collective-permute':
    return operands
  n = group_size(i.rest)
  whole = {'all-gather': operands * n, 'all-reduce': 2 * operands}.get(kind, operands)
  return whole * (n - 1) / n


def group_size(rest: str) -> int:
  """Returns the number of chips that a collective is among.

  >>> group_size('replica_groups={{0,4},{1,5}}'), group_size('replica_groups=[4,16]<=[16,4]T(1,0)')
  (2, 16)
  >>> group_size("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}, channel_id=1")
  16
  """
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', rest)
  if listed:
    return listed.group(1).count(',') + 1
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', rest)
  if iota:
    return int(iota.group(2))
  named = re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', rest)
  if not named:
    raise ValueError(f'no replica groups in {rest[:200]!r}')
  sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
  return math.prod(sizes[a] for a in re.findall(r"'(\w+)'", named.group(2)))


def dot_flops(i: Instruction, types: Mapping[str, str]) -> float:
  """Returns the floating-point operations of a `dot`."""
  (_, left, _), = shapes_of(types[i.operands[0]])
  summed = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest).group(1)
  out = math.prod(shapes_of(i.type)[0][1])
  return 2.0 * out * math.prod(left[int(d)] for d in summed.split(',') if d)


def convolution_flops(i: Instruction, types: Mapping[str, str]) -> float:
  """Returns the floating-point operations of a `convolution`, as which TPUs run matrix products.

  Batch dimensions of products become spatial ones, with strides or dilation such that most taps meet nothing; only
  those that meet something count.
  """
  left, right, out = (shapes_of(t)[0][1] for t in (types[i.operands[0]], types[i.operands[1]], i.type))
  of_left, of_right, of_out = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest).groups()
  flops = 2.0 * out[of_out.index('b')] * out[of_out.index('f')] * right[of_right.index('i')]
  window = re.search(r'window=\{([^}]*)\}', i.rest)
  settings = dict(re.findall(r'(\w+)=(\S+)', window.group(1))) if window else {}
  of = lambda key, d, default: settings[key].split('x')[d] if key in settings else default
  for d in range(sum(c.isdigit() for c in of_out)):
    low = int(of('pad', d, '0_0').split('_')[0])
    stride, holes = int(of('stride', d, 1)), int(of('lhs_dilate', d, 1))
    spread = int(of('rhs_dilate', d, 1))
    size = left[of_left.index(str(d))]
    at = (np.arange(out[of_out.index(str(d))])[:, None] * stride - low
          + np.arange(right[of_right.index(str(d))])[None] * spread)
    flops *= int(((at >= 0) & (at % holes == 0) & (at // holes < size)).sum())
  return flops
