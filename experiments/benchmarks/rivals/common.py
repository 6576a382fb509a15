"""What the rival scripts share: the workload, an offline tokenizer, timing, and the printed result.

Imports neither agentrl nor a rival. Every script runs one phase a process and prints one JSON
object on the last line of stdout, of the shape `ours.py` prints too:

    {"library", "phase", "threads", "versions", "parameters",
     "seconds": median over repetitions,  "samples": [seconds],  "first_seconds": with compilation,
     "tokens": a repetition's,  "tokens_per_second",  "turn_seconds": [by turn] or absent,
     "peak_rss_bytes", ...what a phase has to add}
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sysconfig
import tempfile
import time

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<tool_call>', '</tool_call>']
TOOL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Workload:
  """The policy and the batch; lengths in tokens."""

  layers: int = 8
  width: int = 256
  feed_forward: int = 768
  heads: int = 8
  kv_heads: int = 4
  head_dim: int = 32
  vocabulary: int = 4096
  prompts: int = 8
  group: int = 4
  prompt_length: int = 64
  new_tokens: int = 64
  turns: int = 3
  observation_length: int = 16

  @property
  def batch(self) -> int:
    """Sequences sampled and trained on together."""
    return self.prompts * self.group


WORKLOAD = Workload()


def arguments(doc: str, phases: dict) -> argparse.Namespace:
  """Returns the parsed command line of a rival script."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument('--phase', choices=sorted(phases), required=True)
  parser.add_argument('--threads', type=int, default=1)
  parser.add_argument('--reps', type=int, default=5)
  return parser.parse_args()


def timed(function, reps: int) -> tuple[object, dict]:
  """Returns a function's last result and how long it took: once to compile, then `reps` times."""
  samples = []
  for _ in range(reps + 1):
    start = time.perf_counter()
    result = function()
    samples.append(time.perf_counter() - start)
  return result, summary(samples[1:], first_seconds=samples[0])


def summary(samples: list[float], **more) -> dict:
  """Returns the median of some durations beside the durations themselves."""
  return {'seconds': statistics.median(samples), 'samples': [round(s, 4) for s in samples], **more}


def report(library: str, args: argparse.Namespace, packages: list[str], result: dict):
  """Prints the result of a phase as one line of JSON."""
  record = {
      'library': library, 'phase': args.phase, 'threads': args.threads,
      'versions': {'python': platform.python_version(),
                   **{name: importlib.metadata.version(name) for name in packages}},
      **result,
      'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }
  if 'tokens' in record:
    record['tokens_per_second'] = record['tokens'] / record['seconds']
  print(json.dumps(record), flush=True)


def tokenizer():
  """Returns a byte-level BPE tokenizer of the right vocabulary, trained on Python's library."""
  from tokenizers import decoders, models, pre_tokenizers, Tokenizer, trainers
  from transformers import PreTrainedTokenizerFast

  version = f'{platform.python_version()}-{WORKLOAD.vocabulary}'
  path = os.path.join(tempfile.gettempdir(), f'rival-tokenizer-{os.getuid()}-{version}.json')
  if not os.path.exists(path):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORKLOAD.vocabulary, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train(sorted(glob.glob(os.path.join(sysconfig.get_path('stdlib'), '*.py')))[:60], trainer)
    bpe.save(f'{path}.{os.getpid()}')
    os.replace(f'{path}.{os.getpid()}', path)
  return PreTrainedTokenizerFast(tokenizer_file=path, eos_token='<|im_end|>',
                                 pad_token='<|endoftext|>')


def text_of_length(tok, length: int, index: int, wrap=lambda text: text) -> str:
  """Returns a text that encodes to exactly `length` tokens once `wrap` has put it into a template.

  Args:
    tok: Encodes.
    length: Tokens.
    index: Another index, another text.
    wrap: What surrounds the text in the end.
  """
  with open(os.path.join(sysconfig.get_path('stdlib'), 'argparse.py'), encoding='utf-8') as file:
    ids = tok.encode(file.read())
  for start in range(1000 + 97 * index, len(ids) - length):
    for size in range(length, 0, -1):
      text = tok.decode(ids[start:start + size])
      total = len(tok.encode(wrap(text)))
      # A chat template may strip the message, and rivals' parsers look for brackets.
      if total == length and text == text.strip() and '[' not in text:
        return text
      if total < length:
        break
  raise ValueError(f'no text of exactly {length} tokens')
