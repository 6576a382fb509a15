"""Writes docs/methods.md from the configs: what each method is made of, how faithful it is, what it did in the toy world.

    python -m experiments.methods.document

What it did is read from results/, where `run.py` writes; see README.md.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
from typing import Any, Iterator, Mapping

from ml_collections import ConfigDict

from agentrl.core import config as config_lib
from experiments.methods import table

_ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = _ROOT / 'configs' / 'methods'
PAGE = _ROOT / 'docs' / 'methods.md'
RESULTS = pathlib.Path(__file__).resolve().parent / 'results'

# Sections that a method opens as a whole, and settings that say how much is done rather than what.
_SECTIONS = ('preference', 'rl.side')
_SCALE = ('preference.trajectories_every', 'preference.prompts', 'preference.steps')

_INTRODUCTION = """# Methods

{count} methods, each a config of at most 60 lines over `configs/toy.py`: what differs from it is what the method is. A choice
that a row does not name is GRPO's: independent samples, the outcome as the reward, all of them trained on, a z-score within the
group on every token, ratios of tokens, clip 0.2 on both sides, a mean over tokens, no memory.

    python -m agentrl.main --config=configs/methods/grpo.py --workdir=runs/grpo

Where a paper and its released code differ the paper is followed. What no source fixes is under "ours". Settings of scale, such as
learning rates and batch sizes, are the toy world's; those of the papers are in the configs' docstrings.
`python -m experiments.methods.document` writes this page; [experiments/methods](../experiments/methods) says how the results came about.

| method | choices | exact | ours | test | toy result |
|---|---|---|---|---|---|
"""

_GUIDE = '''
## How to add one in ten minutes

1. Say what differs from GRPO, axis by axis. Most methods are a new sentence of known words: run
   `python -c "from agentrl.algorithms import choices; print(choices.ADVANTAGES.names())"` for the advantages, and see the table for the rest.

   | axis | config | where a new choice goes | it is |
   |---|---|---|---|
   | who samples | `c.agent` | `agentrl/agents/NAME.py`, `@AGENTS.register` | programs over a session |
   | reward | `c.reward.shapings` | `agentrl/rewards/shaping/NAME.py`, `@SHAPINGS.register` | parts of trajectories or turns, from a whole batch |
   | which are trained on | `c.rl.select` | `agentrl/algorithms/NAME.py`, `@SELECTORS.register` | weights and baseline mask, numpy |
   | advantage | a channel's `advantage` | `agentrl/algorithms/NAME.py`, `@choices.ADVANTAGES.register` | one number a trajectory or a token |
   | credit | `maps` | the same, `@choices.MAPS.register` | advantages of tokens to advantages of tokens |
   | ratio, clip, aggregation | `ratio`, `clip`, `aggregation` | the same, `RATIOS`, `CLIPS`, `AGGREGATIONS` | loss of a token, and its weight |
   | rows of a channel | `rows`, `filters` | the same, `ROWS`, `FILTERS` | a factor a trajectory |
   | regulariser | `c.rl.options.regularisers` | the same, `@choices.REGULARISERS.register` | a term of each token |
   | memory | `c.rl.memory` | `agentrl/experience/NAME.py`, `@MEMORIES.register` | what comes back, and what is asked |
   | time | any number: `{'schedule': 'linear', ...}` | the same, `@SCHEDULES.register` | a function of the step |

2. If a word is missing, write it: one file with the pure function, its registration, and a docstring with the equation. Nothing else
   changes; the name is found. This is a whole one, `agentrl/algorithms/signs.py`:

   ```python
   """Advantages without their size."""

   import jax.numpy as jnp

   from agentrl.algorithms import choices


   @choices.MAPS.register('sign')
   def sign(batch, advantages, loss_mask, *, scale: float = 1.0):
     """Keeps the sign of each advantage, times a scale."""
     del batch, loss_mask
     return scale * jnp.sign(advantages)
   ```

   An option called `part`, or ending in `_part`, names a reward part to read: `batch.parts[name]` [N], or `batch.token_parts[name]` [B, T].
   What depends on other rows belongs here, where the batch is whole, and never in a clip or a ratio, which see a micro-batch.

3. Write the config: copy `configs/methods/grpo.py`, change the docstring and `METHOD`, and name the choice:
   `c.rl.algorithm = 'compose'` and `c.rl.options = ConfigDict({'channels': {'policy': {'maps': {'name': 'sign', 'scale': 0.5}}}})`.

4. Test the function against a slow one written from the definition, on `agentrl.algorithms.examples.example_batch()`.

5. Run what already tests you: `bash launch/test.sh tests/methods_test.py tests/contracts -k NAME` trains it two steps, compares sampler and
   learner, and holds it to what every objective must do. Then `python -m experiments.methods.document`.
'''


def write() -> str:
  """Returns the page."""
  results = table.read_results(RESULTS)
  paths = sorted(p for p in FOLDER.glob('*.py') if p.name != '__init__.py')
  rows = sorted((_row(path, results) for path in paths), key=lambda row: row[0].lower())
  lines = ''.join('| ' + ' | '.join(row) + ' |\n' for row in rows)
  return _INTRODUCTION.format(count=len(rows)) + lines + _GUIDE


def _row(path: pathlib.Path, results: table.Results) -> list[str]:
  method = _module(path).METHOD
  test = pathlib.Path(method['test'])
  cells = [f"[{method['title']}](../configs/methods/{path.name})", '; '.join(differences(path)) or 'the defaults',
           method['exact'], method['ours'], f'[{test.stem}](../{test})', _result(path.stem, method, results)]
  return [cell.replace('|', r'\|') for cell in cells]


def _result(name: str, method: Mapping[str, Any], results: table.Results) -> str:
  """Words what a method did beside its baseline; '' before it was run."""
  found = table.compare(name, method, results)
  if found is None:
    return ''
  if not found.verdict:
    return f'success {found.success[0]:.3f}'
  ours, theirs = (math.fsum(x) / len(x) for x in (found.ours, found.theirs))
  seeds = f'{len(found.ours)} seed' + 's' * (len(found.ours) > 1)
  return f'{table.METRICS[found.metric]} {ours:.3g}, {found.than} {theirs:.3g}, {seeds}: {found.verdict}'


def _module(path: pathlib.Path) -> Any:
  spec = importlib.util.spec_from_file_location(f'method_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def differences(path: pathlib.Path) -> Iterator[str]:
  """Yields what a config changes of configs/toy.py, in words."""
  config, toy = (config_lib.load(p, None, _ROOT / 'configs' / 'base.py') for p in (path, _ROOT / 'configs' / 'toy.py'))
  own, base = _flat(config), _flat(toy)
  named = ('agent', 'reward.shapings', 'rl.select', 'rl.algorithm', 'rl.options', 'rl.memory', *_SCALE)
  if config.agent.name != toy.agent.name:
    yield f'agent {_choice({"name": config.agent.name, **config.agent.options.to_dict()})}'
  if config.reward.shapings:
    yield 'reward ' + ', '.join(map(_choice, config.reward.shapings))
  if config.rl.select:
    yield 'select ' + ', '.join(map(_choice, config.rl.select))
  if (config.rl.algorithm, config.rl.options.to_dict()) != (toy.rl.algorithm, toy.rl.options.to_dict()):
    yield from _objective(config.rl.algorithm, config.rl.options.to_dict())
  if len(config.rl.memory):
    yield f'memory {_choice(config.rl.memory.to_dict())}'
  changed = {k: v for k, v in own.items() if base.get(k) != v and not k.startswith(named)}
  for section in _SECTIONS:
    inside = {k.removeprefix(f'{section}.'): changed.pop(k) for k in list(changed) if k.startswith(f'{section}.')}
    if inside:
      yield f'{section.rpartition(".")[2]} {_choice({"name": "", **_nested(inside)})}'
  if changed:
    yield ', '.join(f'`{k}` {_value(v)}' for k, v in changed.items())


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Undoes `flatten`."""
  nested: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, last = key.split('.')
    inner = nested
    for section in sections:
      inner = inner.setdefault(section, {})
    inner[last] = value
  return nested


def _objective(algorithm: str, options: Mapping[str, Any]) -> Iterator[str]:
  if algorithm != 'compose':
    yield _choice({'name': algorithm, **options})
    return
  options = dict(options)
  channels = options.pop('channels', {})
  for label, parts in channels.items():
    words = ', '.join(f'{axis} {_value(choice)}' for axis, choice in parts.items()) or 'as GRPO'
    yield words if len(channels) == 1 else f'channel {label}: {words}'
  for label, value in options.pop('regularisers', {}).items():
    yield f'{label} {_value(value)}'
  yield from (f'{key} {_value(value)}' for key, value in options.items())


def _choice(choice: Any) -> str:
  """Words a choice: its name, and its options in brackets."""
  if not isinstance(choice, Mapping):
    return str(choice)
  options = dict(choice)
  name = options.pop('name', options.pop('schedule', ''))
  inside = ', '.join(f'{k} {_value(v)}' for k, v in options.items())
  return f'{name} ({inside})'.strip() if inside else name


def _value(value: Any) -> str:
  if isinstance(value, Mapping):
    return _choice(value)
  if isinstance(value, (list, tuple)):
    return ' + '.join(_value(v) for v in value)
  return f'{value:g}' if isinstance(value, float) else str(value)


def _flat(config: ConfigDict) -> dict[str, Any]:
  return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in config_lib.flatten(config).items()}


if __name__ == '__main__':
  PAGE.write_text(write())
