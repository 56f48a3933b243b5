"""Cases of one claim: `pytest -n 2` runs some of them, `-m slow` the rest."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def slow_but(cases: Sequence[Any], quick: Collection[int]) -> list[Any]:
  """Parameters for pytest.mark.parametrize; `quick` are indices of cases."""

  def slow(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)

  return [x if i in quick else slow(x) for i, x in enumerate(cases)]
