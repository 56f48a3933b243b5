"""benchmarks/window.py: where nothing is lost the whole context comes back."""

import runpy

import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from fenced import ROOT

from cacheaug.augment import objective
from cacheaug.augment.traces import Layout

W, GONE = 6, 5
POINTS = jnp.array([[W + GONE - 1]])  # five slots are before the window


@pytest.fixture(scope="module")
def window():
  return runpy.run_path(str(ROOT / "benchmarks" / "window.py"))


@pytest.fixture(scope="module")
def text(window):
  model = tolerances.make_model(family="llama", attention_softcap=0.0)
  decoder = tolerances.make_params(model)
  tokens = jnp.asarray(tolerances.tokens_of(model, 1, 14))
  documents = jnp.zeros_like(tokens)
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, Layout(latents=1, ahead=1)
  )
  found = window["Text"](tokens, documents, hidden, cache)
  return model, decoder, found


@pytest.mark.parametrize("row", ["pooled", "all rows", "last rows"])
def test_as_many_entries_as_are_gone_are_the_whole_context(window, text, row):
  model, decoder, found = text
  expected = window["whole"](found, POINTS, ahead=3)

  def of(latents):
    layout = Layout(latents=latents, ahead=3, window=W)
    options = {} if row == "pooled" else {"recent": row == "last rows"}
    make = window["pooled" if row == "pooled" else "heaviest"]
    states = make(model, decoder, layout, **options)
    return tolerances.jit(states)(found, POINTS)

  tolerances.close(of(GONE), expected, tolerances.HIDDEN)
  tolerances.far(of(2), expected)


def test_a_window_of_everything_is_the_whole_context(window, text):
  model, decoder, found = text
  expected = window["whole"](found, POINTS, ahead=3)
  for make in (window["alone"], window["anew"]):
    layout = Layout(latents=2, ahead=3, window=W + GONE)
    out = tolerances.jit(make(model, decoder, layout))(found, POINTS)
    tolerances.close(out, expected, tolerances.HIDDEN)
    layout = Layout(latents=2, ahead=3, window=W)
    less = tolerances.jit(make(model, decoder, layout))(found, POINTS)
    tolerances.far(less, expected)


def test_latents_are_swapped_with_another_rows(window):
  points = jnp.array([[3, -1, 7], [-1, 4, 5]])
  others = np.asarray(window["half_way_round"](points)).reshape(2, 3)
  # Four bear a trace: 0 and 2 of the first row, 4 and 5 of the second.
  assert others[0, [0, 2]].tolist() == [4, 5]
  assert others[1, [1, 2]].tolist() == [0, 2]


def test_share_that_is_closed(window):
  sums = window["DocumentSums"](
    positions=(1, 2),
    documents=np.arange(3),
    tokens=np.ones((3, 2), int),
    checksum=np.zeros((3, 2), int),
    nll={
      window["FULL"]: np.full((3, 2), 1.0),
      window["WINDOW"]: np.full((3, 2), 3.0),
      "a-seed0": np.array([[2.0, 3.0]] * 3),
      "a-seed1": np.array([[1.0, 3.0]] * 3),
    },
  )
  sums = window["with_means"](sums)
  share, low, high = window["closed"](
    sums, "a (2 seeds)", slice(0, 1), kl=False
  )
  assert share == pytest.approx(0.75) == low == high
  share, *_ = window["closed"](sums, "a-seed0", slice(None), kl=False)
  assert share == pytest.approx(0.25)
