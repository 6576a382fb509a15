"""reasoning-gym questions, generated once and kept as a TFDS data set of array records.

Neither writing nor reading needs TensorFlow.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sys
from typing import Any, Iterator, Mapping, Sequence

from absl import logging
from reasoning_gym import factory
import tensorflow_datasets as tfds

from agentrl.core import types
from agentrl.data import base

# Short prompts whose answer is one expression away; settings are reasoning-gym's own. (Without
# parentheses its basic_arithmetic ignores precedence: '57 - 3 * 53' is 2862 there.)
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    'basic_arithmetic': dict(min_terms=2, max_terms=3, min_digits=1, max_digits=2,
                             operators=['+', '-', '*'], allow_negation=False),
    'chain_sum': dict(min_terms=2, max_terms=4, min_digits=2, max_digits=3),
    'count_bits': dict(max_n=1_000_000),
    'count_primes': dict(max_n=2_000),
    'fraction_simplification': dict(styles=['plain']),
    'gcd': dict(min_value=2),
    'lcm': dict(min_value=2, max_value=300),
    'letter_counting': dict(min_words=3, max_words=4),
    'products': dict(min_digits=2, max_digits=4),
    'spell_backward': dict(min_word_len=3, max_word_len=8),
}


class ReasoningGym(tfds.core.GeneratorBasedBuilder):
  """Questions with everything that reasoning-gym needs to score an answer."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}
  # Builders of this package are made by `ReasoningGymSource`, never looked up by name.
  SKIP_REGISTERING = True

  def __init__(self, *, families: Mapping[str, Mapping[str, Any]], per_family: Mapping[str, int],
               seed: int, data_dir: str):
    """Prepares a builder; nothing is generated yet.

    Args:
      families: reasoning-gym's settings by family.
      per_family: Questions of each family, by split.
      seed: Of the questions.
      data_dir: Root of the data sets; the settings have a folder of their own below it.
    """
    self._families = {name: dict(settings) for name, settings in sorted(families.items())}
    self._per_family = dict(per_family)
    self._seed = seed
    recipe = json.dumps([self._families, sorted(self._per_family.items()), seed])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    folder = os.path.join(os.path.abspath(os.path.expanduser(data_dir)),
                          f'families{len(families)}_{digest}')
    super().__init__(data_dir=folder, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(
            {'id': text, 'family': text, 'question': text, 'answer': text, 'metadata': text}),
        homepage='https://github.com/open-thought/reasoning-gym')

  def _split_generators(self, dl_manager: Any):
    del dl_manager
    taken: set[str] = set()
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in self._per_family}
    for family, settings in self._families.items():
      stream = _distinct_entries(family, settings, _stream_seed(family, self._seed), taken)
      # The smallest split comes first, so that a family poor in questions is poor in training only.
      for split, count in sorted(self._per_family.items(), key=lambda item: item[1]):
        new = list(itertools.islice(stream, count))
        if not new and count:
          raise base.DataError(
              f'{family} with {settings} has no questions left for split {split!r}')
        if len(new) < count:
          logging.warning('%s has %d questions for split %s, not %d', family, len(new), split,
                          count)
        rows[split] += new
    # Before anything is written: what is on disk has passed.
    check_disjoint(*([row['question'] for row in examples] for examples in rows.values()))
    for split, examples in rows.items():
      logging.info('reasoning-gym, split %s: %d questions', split, len(examples))
    return {split: self._generate_examples(examples) for split, examples in rows.items()}

  def _generate_examples(self, rows: Sequence[dict[str, str]]):
    for row in rows:
      yield row['id'], row


def _stream_seed(family: str, seed: int) -> int:
  # reasoning-gym makes question i of a stream from seed + i: near seeds would share all but a few
  # questions.
  return int.from_bytes(hashlib.sha256(f'{seed}/{family}'.encode()).digest()[:4], 'big') >> 1


def _distinct_entries(family: str, settings: Mapping[str, Any], seed: int,
                      taken: set[str]) -> Iterator[dict[str, str]]:
  """Yields rows whose questions are not in `taken`, adds them, and ends when new ones are rare."""
  dataset = factory.create_dataset(family, seed=seed, size=sys.maxsize, **settings)
  failures, index = 0, 0
  while failures < 1_000:
    entry = dataset[index]
    question = entry['question'].strip()
    index += 1
    failures += 1
    if question in taken:
      continue
    taken.add(question)
    failures = 0
    yield {
        'id': f'{family}/{seed + index - 1}',
        'family': family,
        'question': question,
        'answer': entry['answer'],
        'metadata': json.dumps(entry['metadata'], default=list),
    }


@base.SOURCES.register('reasoning_gym')
class ReasoningGymSource:
  """Tasks of one split, read at random from the files; the first use of some settings writes them.

  A ground truth is {'family', 'question', 'answer', 'metadata'}: an entry of reasoning-gym.
  """

  def __init__(self, split: str, data_dir: str, *,
               families: Mapping[str, Mapping[str, Any]] | None = None,
               train_per_family: int = 2_000, test_per_family: int = 100, seed: int = 0,
               environment: str = 'tools'):
    """Opens the split; blocks while the questions are generated if they are not on disk.

    Generation is atomic: a folder without its final name is never read.

    Args:
      split: 'train' or 'test'.
      data_dir: Where data sets are kept; made if missing.
      families: reasoning-gym's settings by family; None means `FAMILIES`.
      train_per_family: Training questions of each family; fewer if a family does not have so many.
      test_per_family: Held-out questions of each family.
      seed: Of the questions.
      environment: Environment that the tasks name.
    Raises:
      ValueError: if the split or a family is unknown, or a family has no question for the split.
      DataError: if a question is in both splits.
    """
    per_family = {'train': train_per_family, 'test': test_per_family}
    families = FAMILIES if families is None else families
    if split not in per_family:
      raise ValueError(f'unknown split {split!r}; known: {sorted(per_family)}')
    unknown = sorted(set(families) - set(factory.DATASETS))
    if unknown:
      raise ValueError(
          f'reasoning-gym has no family {unknown[0]!r}; known: {sorted(factory.DATASETS)}')
    make_builder = functools.partial(
        ReasoningGym, families=families, per_family=per_family, seed=seed, data_dir=data_dir)
    _prepare(make_builder())
    self._rows = make_builder().as_data_source(split=split)
    self._environment = environment

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> types.Task:
    if not -len(self) <= index < len(self):
      raise IndexError(f'task {index} of {len(self)}')
    row = {key: _text(value) for key, value in self._rows[index % len(self)].items()}
    entry = {'family': row['family'], 'question': row['question'], 'answer': row['answer'],
             'metadata': json.loads(row['metadata'])}
    return types.Task(
        id=row['id'],
        environment=self._environment,
        messages=(types.Message('user', row['question']),),
        ground_truth=entry,
        metadata={'family': row['family']})


def _prepare(builder: ReasoningGym):
  if builder.data_path.exists():
    return
  logging.info('writing questions to %s', builder.data_path)
  tfds.disable_progress_bar()
  try:
    builder.download_and_prepare()
  except OSError:
    # Another process may have been first to move its finished folder there: the same questions.
    if not builder.data_path.exists():
      raise


def _text(value: Any) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def check_disjoint(*splits: Sequence[str]):
  """Raises DataError if a question comes twice, within a split or in two of them.

  Example:
    >>> check_disjoint(['a', 'b'], ['c'])
  """
  seen: dict[str, int] = {}
  for number, questions in enumerate(splits):
    for question in questions:
      if question in seen:
        raise base.DataError(
            f'question {question!r} is in split {seen[question]} and in split {number}')
      seen[question] = number
