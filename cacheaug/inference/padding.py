"""How prompts, batches and caches are padded, so that few shapes are compiled.

  round_up(n, PROMPT)   prompts of one user's batch: little waste
  round_up(n, CACHE)    slots of a static cache
  bucket(n)             many prompts of all lengths (evaluation): two lengths a
                        doubling
  doubled(n)            a server, which lives long: one length a doubling
  power(n)              rows of a batch, continuations of a context

Which one a caller takes is part of its rounding: a sum over more slots adds the
same numbers in another order.
"""

import numpy as np

from cacheaug.errors import UserError

PROMPT = 32
# Reductions over slots that end on whole vectors: empty slots at the end then
# change no rounding.
CACHE = 64


def round_up(length: int, multiple: int) -> int:
  """The least multiple that is at least `length`."""
  return length + -length % multiple


def power(count: int) -> int:
  """The least power of two that is at least `count`."""
  return 1 << (count - 1).bit_length()


def doubled(length: int) -> int:
  """The least of 32, 64, 128, ... that is at least `length`."""
  return max(PROMPT, power(length))


def bucket(length: int) -> int:
  """The least of 32, 48, 64, 96, 128, ... that is at least `length`."""
  whole = doubled(length)
  return whole * 3 // 4 if 32 < whole and length <= whole * 3 // 4 else whole


def pad_left(
  prompts: list[list[int]], pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Ragged prompts -> tokens [B, S] and documents [B, S] (-1 = padding).

  On the left, so that a batch's last tokens and its free slots line up.

  Raises:
    UserError: an empty prompt, or one longer than `length`.
  """
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise UserError(f"prompt {i} is empty: give at least one token")
  longest = max(map(len, prompts))
  length = longest if length is None else length
  if longest > length:
    raise UserError(f"a prompt has {longest} tokens, room for {length}")
  tokens = np.full((len(prompts), length), pad_id, np.int32)
  documents = np.full((len(prompts), length), -1, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    documents[row, length - len(prompt) :] = 0
  return tokens, documents
