"""What the cold start writes for each family: expressions that are right, wrong or failing.

Each script reads a question and quotes its numbers and words as they stand there, so that writing
the call is copying.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Script:
  """Ways to go about one question.

  Attributes:
    right: Python expression that gives the answer.
    wrong: Python expressions that run and mostly give another value.
    failing: Python that fails.
    copied: Strings of the question that the expressions quote; each is a run of its letters.
    calculator: Expression for the calculator; None where it cannot help.
  """

  right: str
  wrong: Sequence[str]
  failing: Sequence[str]
  copied: Sequence[str]
  calculator: str | None = None


def _match(pattern: str, question: str) -> tuple[str, ...]:
  found = re.search(pattern, question)
  if found is None:
    raise ValueError(f'question {question!r} has no {pattern!r}: another version of reasoning-gym?')
  return found.groups()


def _expression(question: str, pattern: str) -> Script:
  (e,) = _match(pattern, question)
  terms = re.split(r' [-+*] ', e)
  swapped = re.sub(r' ([-+*]) ', lambda m: {'+': ' - ', '-': ' + ', '*': ' + '}[m[1]], e)
  first = e[:e.rindex(terms[-1])].rstrip(' +-*')
  return Script(right=e, calculator=e, wrong=[swapped, f'-({e})', f'({e})//2', first],
                failing=[f'total({e})', f'calc({e})', f'({e}'], copied=[e, terms[0], terms[-1]])


def _basic_arithmetic(question: str) -> Script:
  return _expression(question, r'Calculate (.*)\.$')


def _chain_sum(question: str) -> Script:
  return _expression(question, r'problem: (.*) =')


def _products(question: str) -> Script:
  return _expression(question, r'multiplication: (.*)\. Give')


def _count_bits(question: str) -> Script:
  (n,) = _match(r'number (\d+)\?', question)
  return Script(right=f"bin({n}).count('1')",
                wrong=[f"bin({n}).count('0')", f'len(bin({n}))', f"str({n}).count('1')"],
                failing=[f'popcount({n})', f'bits({n})'], copied=[n])


def _count_primes(question: str) -> Script:
  a, b = _match(r'between (\d+) and (\d+) ', question)
  span = f'for n in range({a},{b}+1))'
  return Script(right=f'sum(n>1 and all(n%d for d in range(2,int(n**.5)+1)) {span}',
                wrong=[f'sum(n%2 {span}', f'sum(n%2 and n%3 {span}', f'len(range({a},{b}))'],
                failing=[f'primes({a},{b})', f'sum(is_prime(n) {span}'], copied=[a, b])


def _fraction_simplification(question: str) -> Script:
  a, b = _match(r'fraction (\d+)/(\d+) ', question)
  names = f'a,b={a},{b};'
  return Script(
      right=names + 'f"{a//gcd(a,b)}/{b//gcd(a,b)}"',
      wrong=[names + 'f"{a//2}/{b//2}"', names + 'f"{a//gcd(a,b)}/{b}"', names + 'f"{a}/{b}"'],
      failing=[f'simplify({a}/{b})', f'Fraction({a},{b})'],
      copied=[a, b])


def _gcd(question: str) -> Script:
  (numbers,) = _match(r'numbers: ([\d, ]*\d)', question)
  first, *_ = numbers.split(', ')
  return Script(right=f'gcd({numbers})',
                wrong=[f'max({numbers})', f'min({numbers})', f'lcm({numbers})'],
                failing=[f'hcf({numbers})', f'divisor({numbers})'],
                copied=[numbers, first])


def _lcm(question: str) -> Script:
  (numbers,) = _match(r'numbers: ([\d, ]*\d)', question)
  first, *_ = numbers.split(', ')
  return Script(right=f'lcm({numbers})',
                wrong=[f'max({numbers})', f'min({numbers})', f'gcd({numbers})'],
                failing=[f'lowest({numbers})', f'multiple({numbers})'],
                copied=[numbers, first])


def _letter_counting(question: str) -> Script:
  letter, text = _match(r'letter ("[^"]*") appear in the text: ("[^"]*")', question)
  return Script(right=f'{text}.lower().count({letter})',
                wrong=[f'len({text})', f'{text}.find({letter})', f'{text}.split().count({letter})'],
                failing=[f'count({text}, {letter})', f'letters({text}, {letter})'],
                copied=[text, letter])


def _spell_backward(question: str) -> Script:
  (word,) = _match(r'nus\): (\w+)', question)
  return Script(right=f'"{word}"[::-1]',
                wrong=[f'"{word}".upper()', f'"{word}"[1:]', f'"{word}"[::2]'],
                failing=[f'reverse("{word}")', f'backward("{word}")'],
                copied=[word])


SCRIPTS: Mapping[str, Callable[[str], Script]] = {
    'basic_arithmetic': _basic_arithmetic,
    'chain_sum': _chain_sum,
    'count_bits': _count_bits,
    'count_primes': _count_primes,
    'fraction_simplification': _fraction_simplification,
    'gcd': _gcd,
    'lcm': _lcm,
    'letter_counting': _letter_counting,
    'products': _products,
    'spell_backward': _spell_backward,
}
