"""Intervals that cover, tables that agree, reports that are whole."""

import csv
import math
import os

import numpy as np
import pytest

from cacheaug.errors import UserError
from cacheaug.evals import report


def _tokens(seed, documents, each, effect, spread):
  """Per-document shared differences around `effect`, plus token noise."""
  rng = np.random.default_rng(seed)
  owner = np.repeat(np.arange(documents), each)
  frozen = rng.normal(3.0, 1.0, documents * each)
  shift = rng.normal(effect, spread, documents)[owner]
  augmented = frozen + shift + rng.normal(0.0, 0.05, documents * each)
  return frozen, augmented, owner


def test_change_is_of_the_perplexity():
  frozen = np.array([1.0, 2.0, 3.0])
  change, low, high = report.paired_interval(
    frozen, frozen + math.log(0.97), np.array([5, 9, 9]), seed=0
  )
  assert change == pytest.approx(-3.0)
  assert low == pytest.approx(-3.0) and high == pytest.approx(-3.0)


def test_documents_weigh_by_their_tokens():
  frozen = np.zeros(4)
  augmented = np.array([0.1, 0.1, 0.1, -0.1])
  change, _, _ = report.paired_interval(
    frozen, augmented, np.array([0, 0, 0, 1]), seed=0
  )
  assert change == pytest.approx(100 * math.expm1(0.05))


def test_interval_covers_the_truth_about_95_times_in_100():
  true = 100 * math.expm1(-0.02)
  inside = 0
  for seed in range(200):
    _, low, high = report.paired_interval(
      *_tokens(seed, 60, 5, -0.02, 0.1), seed=seed, resamples=400
    )
    inside += low <= true <= high
  # 200 draws of 0.95 have a standard deviation of 3; percentile intervals of
  # 60 documents cover a little less.
  assert 178 <= inside <= 199


def test_interval_is_over_documents_not_tokens():
  frozen, augmented, owner = _tokens(0, 30, 50, 0.0, 0.1)
  _, low, high = report.paired_interval(frozen, augmented, owner, seed=1)
  alone = np.arange(len(owner))
  _, low_token, high_token = report.paired_interval(
    frozen, augmented, alone, seed=1
  )
  assert high - low > 3 * (high_token - low_token)


def test_interval_is_a_function_of_the_seed():
  data = _tokens(0, 30, 5, 0.0, 0.1)
  again = [report.paired_interval(*data, seed=s) for s in (1, 1, 2)]
  assert again[0] == again[1] != again[2]


def test_single_document_has_no_interval_and_no_tokens_are_refused():
  _, low, high = report.paired_interval(
    np.ones(3), np.ones(3), np.zeros(3), seed=0
  )
  assert math.isnan(low) and math.isnan(high)
  with pytest.raises(UserError, match="no token"):
    report.paired_interval(np.ones(0), np.ones(0), np.ones(0), seed=0)
  with pytest.raises(ValueError, match="same"):
    report.paired_interval(np.ones(2), np.ones(3), np.ones(3), seed=0)


def _rows():
  return [
    report.make_row(p, *_tokens(p, 20, 4, -0.04 / p, 0.02), seed=p)
    for p in (1, 2, 4, 8)
  ]


def test_row_agrees_with_itself():
  row = _rows()[0]
  expected = 100 * math.expm1(row.augmented_nll - row.frozen_nll)
  assert row.change_percent == pytest.approx(expected)
  assert row.low < row.change_percent < row.high
  assert (row.tokens, row.documents) == (80, 20)


def test_table_is_aligned_and_holds_every_row():
  rows = _rows()
  lines = report.format_table(rows).splitlines()
  assert len(lines) == 5 and len({len(line) for line in lines}) == 1
  assert f"{rows[0].change_percent:+.2f}%" in lines[1]


def test_report_files_hold_the_rows(tmp_path):
  rows = _rows()
  page = report.write_report(
    tmp_path,
    rows=rows,
    meta={"config": "quickstart", "steps": 300},
    extras={"Exact match": {"frozen": 0.5, "with latents": 0.625}},
  )
  text = page.read_text()
  for piece in (
    "quickstart",
    "Exact match",
    "0.625",
    "(perplexity_by_position.png)",
    f"{rows[3].change_percent:+.2f}%",
  ):
    assert piece in text
  directory = tmp_path / "report"
  with (directory / "perplexity_by_position.csv").open() as f:
    table = list(csv.DictReader(f))
  assert [float(r["high"]) for r in table] == [r.high for r in rows]
  png = (directory / "perplexity_by_position.png").read_bytes()
  assert png[:8] == b"\x89PNG\r\n\x1a\n"
  assert sorted(p.name for p in directory.iterdir()) == [
    "perplexity_by_position.csv",
    "perplexity_by_position.png",
    "report.md",
  ]


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
  page = report.write_report(tmp_path, rows=_rows(), meta={"steps": 1})
  before = page.read_bytes()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(UserError, match="No space left"):
    report.write_report(tmp_path, rows=_rows(), meta={"steps": 2})
  assert page.read_bytes() == before
