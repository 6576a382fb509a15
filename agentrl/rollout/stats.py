"""What an engine did: counts and seconds to be added up, and a timeline of its slots."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

# Stretches kept at most, the latest: a timeline is to be looked at, not to fill the memory.
_MOST = 50_000


@dataclasses.dataclass
class EngineStats:
  """What the engine did since its `stats` were last replaced: seconds, tokens and counts, all to be added up.

  Attributes:
    total_seconds: Wall time in all; it is made up of the five that follow.
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
    tool_seconds: Sessions waited for something else than a turn, added up over sessions.
    queue_seconds: Sessions wanted a turn and had no slot, added up over sessions.
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
    return max(0.0, self.total_seconds - self.prefill_seconds - self.decode_seconds - self.idle_seconds -
               self.linger_seconds)

  def metrics(self) -> dict[str, float]:
    """Returns what a step's line of metrics says of its rollout."""
    rate = lambda tokens, seconds: tokens / seconds if seconds else 0.0
    seconds = {name: getattr(self, f'{name}_seconds') for name in ('prefill', 'decode', 'idle', 'linger', 'host')}
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
    row: A slot's number, or 'device'.
    kind: 'draw', 'wait' of a slot; 'prefill', 'decode', 'idle', 'linger' of the device.
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
  """What each slot did when, since `clear`."""

  def __init__(self):
    self._open: dict[int, tuple[str, str, float]] = {}
    self.clear()

  def clear(self):
    """Starts again from now; slots that are busy are so from now on."""
    self._zero = time.perf_counter()
    self._open = {slot: (kind, label, self._zero) for slot, (kind, label, _) in self._open.items()}
    self.stretches: list[Stretch] = []

  def begin(self, slot: int, label: str, kind: str):
    """Ends what a slot did and begins another stretch."""
    self.end(slot)
    self._open[slot] = kind, label, time.perf_counter()

  def end(self, slot: int):
    """Ends what a slot did."""
    if slot in self._open:
      kind, label, start = self._open.pop(slot)
      self.add(slot, kind, start, label=label)

  def add(self, row: int | str, kind: str, start: float, end: float | None = None, label: str = ''):
    """Adds a stretch; times are of `time.perf_counter`, the end is now if None."""
    end = time.perf_counter() if end is None else end
    if len(self.stretches) < _MOST and end > start:
      self.stretches.append(Stretch(row, kind, label, start - self._zero, end - self._zero))

  def trace(self) -> dict[str, Any]:
    """Returns the timeline as a trace of JSON types that Perfetto and chrome://tracing show."""
    for slot in list(self._open):
      kind, label, _ = self._open[slot]
      self.begin(slot, label, kind)
    names = {'device': 0}
    events: list[dict[str, Any]] = []
    for s in self.stretches:
      thread = names.setdefault(s.row, len(names))
      events.append({'ph': 'X', 'pid': 0, 'tid': thread, 'ts': round(s.start * 1e6), 'dur': round((s.end - s.start) * 1e6),
                     'name': s.kind, 'args': {'session': s.label} if s.label else {}})
    meta = [{'ph': 'M', 'pid': 0, 'tid': thread, 'name': 'thread_name',
             'args': {'name': row if isinstance(row, str) else f'slot {row}'}} for row, thread in names.items()]
    return {'displayTimeUnit': 'ms', 'traceEvents': meta + events}
