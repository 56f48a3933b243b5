"""Tables that agree with their sums, reports that are whole."""

import csv
import math
import os

import numpy as np
import pytest
from test_bootstrap import sums_of, tokens

from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, report


def _sums():
  # One document reaches no further than the first token.
  texts = {1: tokens(1, 21, 4, -0.04, 0.02)}
  texts |= {p: tokens(p, 20, 4, -0.04 / p, 0.02) for p in (2, 4, 8)}
  return sums_of(texts)


def _rows():
  return report.make_rows(_sums(), seed=3)


def _write(directory, **meta):
  documents = {"text": _sums()}
  return report.write_report(
    directory, rows=_rows(), meta=meta, documents=documents
  )


def test_row_agrees_with_itself():
  row = _rows()[0]
  expected = 100 * math.expm1(row.augmented_nll - row.frozen_nll)
  assert row.change_percent == pytest.approx(expected)
  assert row.low < row.change_percent < row.high
  assert [r.tokens for r in _rows()] == [84, 80, 80, 80]
  assert [r.documents for r in _rows()] == [21, 20, 20, 20]


def test_rows_are_of_any_two_columns():
  sums = _sums()
  row = report.make_rows(sums, seed=3, column="frozen", base="augmented")[0]
  assert row.change_percent > 0 > _rows()[0].change_percent
  assert row.frozen_nll == _rows()[0].augmented_nll


def test_positions_without_tokens_are_left_out_but_not_all():
  texts = {1: tokens(1, 5, 4, 0.0, 0.1), 2: (np.zeros(0),) * 3}
  assert [r.position for r in report.make_rows(sums_of(texts), seed=0)] == [1]
  none = sums_of({1: (np.zeros(0),) * 3})
  with pytest.raises(UserError, match="no token"):
    report.make_rows(none, seed=0)


def test_one_document_has_no_interval_and_says_so():
  (row,) = report.make_rows(sums_of({1: tokens(1, 1, 9, -0.1, 0.0)}), seed=0)
  table = report.format_table([row])
  assert "of 1 document" in table and "nan" not in table
  assert "of 1 document" not in report.format_table(_rows())


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
    documents={"text": _sums()},
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
  assert len(bootstrap.read_csv(tmp_path)) == sum(r.documents for r in rows)
  assert sorted(p.name for p in directory.iterdir()) == [
    "documents.csv",
    "perplexity_by_position.csv",
    "perplexity_by_position.png",
    "report.md",
  ]


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
  page = _write(tmp_path, steps=1)
  before = page.read_bytes()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(UserError, match="No space left"):
    _write(tmp_path, steps=2)
  assert page.read_bytes() == before
