"""Timing things that differ by less than the machine does from run to run.

Each repeat is a block in which every way runs once, in an order drawn anew:
what drifts over minutes meets all alike, and none always follows the same. A
ratio is taken within a block; the median over blocks stands with an interval.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_SEED = 0
_RESAMPLES = 10_000


def take(
  ways: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[Any]]:
  """What each way returned, a value a block; a first block is not kept."""
  rng, found = random.Random(_SEED), {name: [] for name in ways}
  for repeat in range(repeats + 1):
    for name in rng.sample(list(ways), len(ways)):
      value = ways[name]()
      if repeat:
        found[name].append(value)
  return found


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
  """Median of the blocks' ratios and its 95 % interval, resampling blocks."""
  ratios = np.array(over) / np.array(under)
  rng = np.random.default_rng(_SEED)
  drawn = rng.choice(ratios, (_RESAMPLES, len(ratios)))
  low, high = np.quantile(np.median(drawn, 1), (0.025, 0.975))
  return float(np.median(ratios)), float(low), float(high)


def shown(found: tuple[float, float, float]) -> str:
  """'0.991 (0.985 to 0.998)'."""
  return "{:.3f} ({:.3f} to {:.3f})".format(*found)
