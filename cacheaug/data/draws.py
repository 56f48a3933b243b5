"""Random integers that cost little to seed, for problems made as read."""

import collections.abc
import hashlib


class Draws:
  """Integers drawn from 256 hashed bits, read as a mixed-radix number.

  A sum needs about 60 bits. Where fewer than 64 would be left, the next 256
  take their place, so the bias of a draw is below 2^-60. Making one costs 2 us;
  seeding a numpy or stdlib generator costs 10 to 20.
  """

  __slots__ = ("_key", "_refills", "bits", "left")

  def __init__(self, key: str):
    self._key, self._refills = key, 0
    self._hash(key)

  def _hash(self, key: str) -> None:
    digest = hashlib.blake2b(key.encode(), digest_size=32).digest()
    self.bits, self.left = int.from_bytes(digest, "little"), 1 << 256

  def below(self, n: int) -> int:
    """An integer in 0 .. n - 1."""
    if self.left < n << 64:
      self._refills += 1
      self._hash(f"{self._key}/more {self._refills}")
    self.left //= n
    self.bits, drawn = divmod(self.bits, n)
    return drawn

  def sample(self, items: collections.abc.Sequence, count: int) -> list:
    """`count` different items, in random order."""
    pool = list(items)
    return [pool.pop(self.below(len(pool))) for _ in range(count)]
