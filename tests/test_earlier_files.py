"""Exports and store entries of earlier versions are read.

`golden/earlier` was written at commit 6856eb1, before the package was ordered
in rings: a decoder, its coprocessor with every field of its layout set, and a
store's entries of one context, plain and augmented. Never write them anew.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import cacheaug
from cacheaug.projects.context_store.lm import with_store
from cacheaug.projects.context_store.store import Store

_EARLIER = Path(__file__).parent / "golden" / "earlier"


@pytest.fixture(scope="module")
def expected():
  return json.loads((_EARLIER / "expected.json").read_text())


@pytest.fixture(scope="module")
def lm():
  lm = cacheaug.load(_EARLIER / "decoder", dtype="float32")
  return lm.with_coprocessor(_EARLIER / "coprocessor")


def test_an_export_is_read(lm, expected):
  plain = lm.prefill([expected["row"]])
  contexts = {"plain": plain, "augmented": lm.augment(plain)}
  for name, context in contexts.items():
    got = lm.decode(context, len(expected[name]), stop_ids=())
    assert got[0].tolist() == expected[name]


@pytest.mark.parametrize("latents", (False, True))
def test_a_store_is_read(lm, expected, latents, tmp_path):
  shutil.copytree(_EARLIER / "store", tmp_path / "store")
  stored = with_store(lm, Store(tmp_path / "store"))
  row = expected["row"]
  assert stored.has(row, latents)
  (entry,), hits = stored.entries([row], [latents])
  assert hits == 1
  # As it would be computed today, but for another processor's rounding.
  context = lm.prefill([row])
  if latents:
    context = lm.augment(context)
  np.testing.assert_array_equal(entry.tokens, row)
  np.testing.assert_allclose(entry.hidden, context.hidden[0], atol=3e-5)
  # Another coprocessor's entry, or another token's, is not taken for it.
  assert not stored.has(row[:-1] + [0], latents)
