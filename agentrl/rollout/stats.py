"""What an engine did: counts and seconds to be added up, and a timeline of its seats."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from typing import Any, NamedTuple

# Stretches kept at most, the first: a timeline is to be looked at, not to fill the memory.
_MOST = 50_000
# What the wall time is made up of beside 'host', which is the rest.
_PHASES = ('prefill', 'decode', 'idle', 'linger')
# Fields that are parts of the wall time, or all of it; other seconds are added up over sessions.
WALL_SECONDS = ('total_seconds', *(f'{phase}_seconds' for phase in _PHASES))


@dataclasses.dataclass
class EngineStats:
  """What the engine did since its `stats` were last replaced: seconds, tokens and counts, all to be added up.

  Attributes:
    total_seconds: Wall time in all: the four that follow and `host_seconds`.
    prefill_seconds: The device wrote known tokens.
    decode_seconds: The device drew.
    idle_seconds: Nobody wanted a turn: all waited for tools.
    linger_seconds: Some wanted a turn, and were kept waiting for others who might come soon.
    decoded_tokens: Drawn, those thrown away later included.
    extended_tokens: Known tokens that were computed: prompts, observations, what was computed again.
    shared_tokens: Known tokens that were found in the cache.
    steps: Passes through the network that drew the decoded tokens.
    slot_steps: Slots that the engine has, added up over these passes.
    chunks: Calls that drew.
    evictions: Slots taken from sessions that waited.
    parked: Of these, whose part of the cache was kept in host memory.
    unparked: Of these, those that came back to it.
    tool_seconds: Sessions waited for something else than a turn, added up over sessions, each wait when it ends.
    queue_seconds: Sessions wanted a turn and did not draw yet, added up over sessions, each wait when it ends.
    stored_tokens: Tokens in the cache that contexts hold, added up over chunks; what several hold is counted once.
    cache_tokens: Tokens that the cache had room for, added up over chunks.
  """

  total_seconds: float = 0.0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  idle_seconds: float = 0.0
  linger_seconds: float = 0.0
  decoded_tokens: int = 0
  extended_tokens: int = 0
  shared_tokens: int = 0
  steps: int = 0
  slot_steps: int = 0
  chunks: int = 0
  evictions: int = 0
  parked: int = 0
  unparked: int = 0
  tool_seconds: float = 0.0
  queue_seconds: float = 0.0
  stored_tokens: int = 0
  cache_tokens: int = 0

  @property
  def host_seconds(self) -> float:
    """Wall time that is neither the device's nor waiting: programs, books, conversions."""
    return self.total_seconds - sum(getattr(self, f'{phase}_seconds') for phase in _PHASES)

  def metrics(self) -> dict[str, float]:
    """Returns what a step's line of metrics says of its rollout."""
    rate = lambda tokens, seconds: tokens / seconds if seconds else 0.0
    seconds = {name: getattr(self, f'{name}_seconds') for name in (*_PHASES, 'host')}
    wanted = self.total_seconds - self.idle_seconds
    return {
        'tokens_per_second/decode': rate(self.decoded_tokens, self.total_seconds),
        'tokens_per_second/decode_alone': rate(self.decoded_tokens, self.decode_seconds),
        'tokens_per_second/prefill_alone': rate(self.extended_tokens, self.prefill_seconds),
        'decoded_tokens': self.decoded_tokens,
        **{f'engine_seconds/{name}': value for name, value in seconds.items()},
        'engine/occupancy': rate(self.decoded_tokens, self.slot_steps),
        'engine/device_idle_while_ready': rate(self.linger_seconds + self.host_seconds, wanted),
        'engine/prefilled_tokens': self.extended_tokens,
        'engine/shared_tokens': self.shared_tokens,
        'engine/parked': self.parked,
        'engine/cache_fill': rate(self.stored_tokens, self.cache_tokens),
        'engine/tool_seconds': self.tool_seconds,
        'engine/queue_seconds': self.queue_seconds,
    }


class Stretch(NamedTuple):
  """What a row of the timeline did: seconds since its start.

  Attributes:
    row: A seat's number, or 'device'.
    kind: Of a seat 'draw', 'wait' for a tool, 'ready', that is, waiting for a slot; of the device 'prefill', 'decode', 'idle',
      'linger'.
    label: Whose, '' for the device.
    start: When it began.
    end: When it ended.
  """

  row: int | str
  kind: str
  label: str
  start: float
  end: float


class Timeline:
  """What was done in each seat when.

  Attributes:
    stretches: In the order of their ends.
  """

  def __init__(self, seats: int = 0):
    """Starts now, with so many seats in which nothing is done."""
    self._seats = seats
    self._open: dict[int, tuple[str, str, float]] = {}
    self._zero = time.perf_counter()
    self.stretches: list[Stretch] = []

  def cut(self) -> Timeline:
    """Returns what was done up to now and starts again; what is done in seats goes on in both."""
    now = time.perf_counter()
    for seat, (kind, label, start) in self._open.items():
      self.add(seat, kind, start, now, label)
      self._open[seat] = kind, label, now
    done = Timeline(self._seats)
    done.stretches, self.stretches, self._zero = self.stretches, [], now
    return done

  @property
  def seconds(self) -> float:
    """How long it lasted."""
    return max((s.end for s in self.stretches), default=0.0)

  def begin(self, seat: int, label: str, kind: str):
    """Ends what a seat did and begins another stretch."""
    self.end(seat)
    self._open[seat] = kind, label, time.perf_counter()

  def end(self, seat: int):
    """Ends what a seat did."""
    if seat in self._open:
      kind, label, start = self._open.pop(seat)
      self.add(seat, kind, start, label=label)

  def add(self, row: int | str, kind: str, start: float, end: float | None = None, label: str = ''):
    """Adds a stretch; times are of `time.perf_counter`, the end is now if None."""
    end = time.perf_counter() if end is None else end
    if len(self.stretches) < _MOST and end > start:
      self.stretches.append(Stretch(row, kind, label, start - self._zero, end - self._zero))

  def trace(self) -> dict[str, Any]:
    """Returns the timeline as a trace of JSON types that Perfetto and chrome://tracing show."""
    events: list[dict[str, Any]] = []
    for s in self.stretches:
      events.append({'ph': 'X', 'pid': 0, 'tid': _number(s.row), 'ts': round(s.start * 1e6),
                     'dur': round((s.end - s.start) * 1e6), 'name': s.kind, 'args': {'session': s.label} if s.label else {}})
    meta = []
    for row in self._rows():
      of_row = {'ph': 'M', 'pid': 0, 'tid': _number(row)}
      meta += [{**of_row, 'name': 'thread_name', 'args': {'name': _name(row)}},
               {**of_row, 'name': 'thread_sort_index', 'args': {'sort_index': _number(row)}}]
    return {'displayTimeUnit': 'ms', 'traceEvents': meta + events}

  def picture(self, bins: int = 600) -> dict[str, Any]:
    """Returns the timeline as coarse as it can be drawn, of JSON types.

    Args:
      bins: Equal parts of its time. In each a row does what it did longest there, or nothing.
    Returns:
      'seconds', how long it lasted; 'bins'; 'rows', a list of names with their runs, each (kind, first bin, bin after
      the last).
    """
    seconds = self.seconds
    kinds: dict[int | str, list[str | None]] = {row: [None] * bins for row in self._rows()}
    # Bins of several stretches: by row and bin, shares of it by kind.
    shared: dict[tuple[int | str, int], dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for s in self.stretches:
      start, end = (t / seconds * bins for t in (s.start, s.end))
      first, last = min(int(start), bins - 1), min(int(end), bins - 1)
      kinds[s.row][first + 1:last] = [s.kind] * max(0, last - first - 1)
      for i in {first, last}:
        shared[s.row, i][s.kind] += min(end, i + 1) - max(start, i)
    for (row, i), shares in shared.items():
      kind = max(shares, key=shares.get)
      kinds[row][i] = kind if shares[kind] >= 1 - sum(shares.values()) else None
    return {'seconds': seconds, 'bins': bins, 'rows': [(_name(row), _runs(of_row)) for row, of_row in kinds.items()]}

  def _rows(self) -> list[int | str]:
    return ['device', *range(self._seats)]


def _number(row: int | str) -> int:
  """The device stands first, then seat by seat."""
  return 0 if isinstance(row, str) else row + 1


def _name(row: int | str) -> str:
  return row if isinstance(row, str) else f'seat {row}'


def _runs(kinds: list[str | None]) -> list[tuple[str, int, int]]:
  """Returns (kind, first, after the last) of each run of the same kind; those of None are left out."""
  at, runs = 0, []
  for kind, run in itertools.groupby(kinds):
    first, at = at, at + len(list(run))
    if kind is not None:
      runs.append((kind, first, at))
  return runs
