"""Arguments as Python callers give them, checked once.

Values of other types (a float for a count, None for a list) are refused in one
line here, not as a TypeError somewhere in JAX.
"""

import numbers
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from cacheaug.errors import UserError

# What a seed may be: jax.random.key takes a C long.
_SEEDS = -(2**63), 2**63 - 1

_WORDS = {str: "string", numbers.Real: "number"}


def whole_number(
  name: str, value: Any, least: int | None = None, most: int | None = None
) -> int:
  """A count or an id as a Python int; numpy's integers are taken, too.

  Raises:
    UserError: not a whole number, or out of range; names it.
  """
  try:
    if isinstance(value, bool | np.bool_):
      raise TypeError
    number = operator.index(value)
  except TypeError:
    raise UserError(f"{name}={value!r} is not a whole number") from None
  if least is not None and number < least:
    raise UserError(f"{name}={number} must be at least {least}")
  if most is not None and number > most:
    raise UserError(f"{name}={number} must be at most {most}")
  return number


def seed(value: Any) -> int:
  """A seed that JAX takes.

  Raises:
    UserError: not a whole number, or of more than 64 bits.
  """
  return whole_number("seed", value, *_SEEDS)


def texts(name: str, value: Any) -> list[str]:
  """A list of strings.

  Raises:
    UserError: one string in its place, or what holds something else.
  """
  if isinstance(value, str | bytes):
    raise UserError(f"{name} is one string: give a list of them")
  found = _listed(name, value, "of strings")
  for i, text in enumerate(found):
    if not isinstance(text, str):
      raise UserError(
        f"{name}: entry {i} is {_short(text)}, not a string: give text"
      )
  return found


def stop_strings(value: Any) -> tuple[str, ...]:
  """Strings that end a text; None is (), as OpenAI-style callers say it.

  Raises:
    UserError: as of `texts`, or an empty string.
  """
  found = () if value is None else tuple(texts("stop", value))
  if "" in found:
    raise UserError("stop holds an empty string, which ends any text at once")
  return found


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
  """Counts, or token ids such as stop_ids.

  Raises:
    UserError: no list of whole numbers.
  """
  found = _listed(name, value, "of whole numbers")
  return tuple(whole_number(f"{name}: an entry", i) for i in found)


def switches(name: str, value: Any, count: int) -> list[bool]:
  """One bool for each of `count` prompts.

  Raises:
    UserError: neither a bool nor `count` of them.
  """
  if isinstance(value, bool | np.bool_):
    return [bool(value)] * count
  if isinstance(value, str | bytes):
    raise UserError(f"{name}={value!r}: give True or False, or one a prompt")
  found = _listed(name, value, "of True and False")
  wrong = [x for x in found if not isinstance(x, bool | np.bool_)]
  if wrong:
    raise UserError(
      f"{name}: {_short(wrong[0])} is neither True nor False: give one a prompt"
    )
  if len(found) != count:
    raise UserError(f"{name} names {len(found)} prompts of {count}")
  return [bool(x) for x in found]


def instance(name: str, value: Any, kind: type) -> None:
  """Refuses a value of another class.

  Raises:
    UserError: names the class that is needed.
  """
  if not isinstance(value, kind):
    wanted = _WORDS.get(kind, kind.__name__)
    raise UserError(f"{name} is {_short(value)}: give a {wanted}")


def _listed(name: str, value: Any, of: str) -> list[Any]:
  if not isinstance(value, Iterable) or isinstance(value, dict):
    raise UserError(f"{name} is {_short(value)}: give a list {of}")
  return list(value)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else f"{text[:37]}..."
