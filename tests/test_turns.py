"""The estimator of the benchmarks whose differences are small."""

import runpy
from pathlib import Path

import numpy as np

turns = runpy.run_path(
  str(Path(__file__).resolve().parent.parent / "benchmarks" / "turns.py")
)


def test_every_way_once_a_block_in_changing_order():
  order = []
  ways = {name: lambda name=name: order.append(name) or name for name in "abc"}
  found = turns["take"](ways, 20)
  assert found == {name: [name] * 20 for name in "abc"}
  blocks = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
  assert len(blocks) == 21  # the first is not kept
  assert all(sorted(block) == list("abc") for block in blocks)
  assert len(set(blocks)) > 3


def test_ratio_is_taken_within_blocks():
  rng = np.random.default_rng(0)
  drift = np.linspace(1.0, 3.0, 101)  # of the machine, far above the difference
  over = 1.02 * drift * rng.normal(1.0, 0.01, 101)
  under = drift * rng.normal(1.0, 0.01, 101)
  middle, low, high = turns["ratio"](over, under)
  assert low < 1.02 < high and high - low < 0.015
  assert low > 1.0 and low <= middle <= high
  # Control: what is paired wrongly shows the drift.
  _, low, high = turns["ratio"](over, rng.permutation(under))
  assert high - low > 0.1
