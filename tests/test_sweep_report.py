"""The report of a sweep: hand-computed figures, pooled seeds, same tokens."""

import csv
import json
import math

import pytest
import small_sweep

from cacheaug.errors import UserError
from cacheaug.evals import exact_match, run_report
from cacheaug.projects.sweep import comparison, curves, page, rows

_HEADER = "source,document,position,frozen,augmented,tokens,checksum\n"
# Of two documents with 4 tokens and 1: nll of the frozen decoder and of each
# run.
_FROZEN = (8.0, 3.0)
_NLL = {
  "N1-seed0": (7.6, 3.1),
  "N1-seed1": (7.2, 2.9),
  "N2-seed0": (7.8, 2.5),
}


def _percent(difference):
  return pytest.approx(100 * math.expm1(difference))


def _table(nll, frozen=_FROZEN, tokens=(4, 1), checksum=(70, 5)):
  return _HEADER + "".join(
    f"text,{i},1,{frozen[i]},{nll[i]},{tokens[i]},{checksum[i]}\n"
    for i in range(len(nll))
  )


def _finish(run, table):
  """As if the run had finished."""
  directory = run.workdir / "report"
  directory.mkdir(parents=True)
  config = json.loads(run.config.to_json())
  beat = {"state": "finished", "step": config["optimizer"]["steps"]}
  (run.workdir / "heartbeat.json").write_text(json.dumps(beat))
  (run.workdir / "config.json").write_text(json.dumps(config))
  (run.workdir / "speed.jsonl").write_text(
    '{"step": 2, "step_time": 0.5}\n{"step": 6, "step_time": 1.0}\n'
  )
  if table:
    (directory / "documents.csv").write_text(table)


class _Sweep:
  """A sweep whose runs have finished with the tables above."""

  def __init__(self, tmp_path, *lines, nll=None, given=None, **keywords):
    keywords = {"reference": "N2", "axis": "coprocessor.latents"} | keywords
    self.file = small_sweep.write(tmp_path, *lines, **keywords)
    self.sweep = rows.load(self.file)
    self.directory = tmp_path / "sweep"
    self.built = rows.build(self.sweep, self.file, given or {})
    self.runs = rows.runs_of(self.built, self.directory)
    for run in self.runs:
      table = (_NLL if nll is None else nll).get(run.name)
      if table is not None:
        _finish(run, table if isinstance(table, str) else _table(table))

  def compare(self):
    return comparison.compare(self.built, self.runs, self.sweep.reference)

  def write(self):
    return page.write(
      self.directory,
      title="Sweep",
      sweep=self.sweep,
      results=self.compare(),
      runs=self.runs,
    ).read_text()

  def refusal(self):
    with pytest.raises(UserError) as caught:
      self.compare()
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_figures_are_those_computed_by_hand(tmp_path):
  first, second = _Sweep(tmp_path).compare()
  assert (first.name, second.name) == ("N1", "N2")
  cell = first.cells["text", 1]
  # A document's nll is the mean over seeds, 7.4 and 3.0; 5 tokens, not 10.
  assert (cell.tokens, cell.documents) == (5, 2)
  assert cell.against_frozen.change == _percent((7.4 + 3.0 - 11.0) / 5)
  assert cell.seeds == (
    _percent((7.6 + 3.1 - 11.0) / 5),
    _percent((7.2 + 2.9 - 11.0) / 5),
  )
  # Two documents are drawn: both the first (a quarter), one each, or both the
  # second (a quarter), so that the ends are those of a document alone.
  assert cell.against_frozen.low == _percent((7.4 - 8.0) / 4)
  assert cell.against_frozen.high == _percent(0.0)
  assert cell.against_reference.change == _percent((10.4 - 10.3) / 5)
  assert cell.against_reference.low == _percent((7.4 - 7.8) / 4)
  assert cell.against_reference.high == _percent(3.0 - 2.5)
  assert cell.frozen_nll == pytest.approx(11.0 / 5)
  assert cell.nll == pytest.approx(10.4 / 5)
  other = second.cells["text", 1]
  assert other.against_reference is None and len(other.seeds) == 1
  assert other.against_frozen.change == _percent((10.3 - 11.0) / 5)
  # Two steps of half a second, four of one.
  assert first.seconds == (5.0, 5.0)


def test_seeds_with_decoders_of_their_own_are_each_against_its_own(tmp_path):
  # Without decoder.path a seed's frozen decoder is random too.
  nll = {
    "N1-seed0": _table((7.0, 3.0), frozen=(8.0, 3.0)),
    "N1-seed1": _table((5.0, 3.0), frozen=(6.0, 3.0)),
  }
  (row,) = _Sweep(tmp_path, nll=nll).compare()
  cell = row.cells["text", 1]
  assert cell.seeds == (_percent(-0.2), _percent(-0.2))
  assert cell.against_frozen.change == _percent(-0.2)


@pytest.mark.parametrize(
  "other",
  [
    _table((7.8, 2.5), checksum=(70, 6)),
    _table((7.8, 2.5), tokens=(4, 2)),
    _table((7.8,)),
  ],
  ids=["tokens", "count", "document"],
)
@pytest.mark.parametrize("name", ["N2-seed0", "N1-seed1"])
def test_other_tokens_are_refused(tmp_path, name, other):
  line = _Sweep(tmp_path, nll=_NLL | {name: other}).refusal()
  assert "were not evaluated on the same tokens" in line
  assert "eval.context" in line and name.partition("-")[0] in line


def test_a_finished_run_without_its_table_is_an_error(tmp_path):
  line = _Sweep(tmp_path, nll=_NLL | {"N1-seed1": ""}).refusal()
  assert "N1-seed1" in line and "documents.csv" in line


def test_page_and_files_say_the_same(tmp_path):
  sweep = _Sweep(tmp_path)
  text = sweep.write()
  below = sweep.directory / "report"
  with (below / "comparison.csv").open() as f:
    first, second = csv.DictReader(f)
  change = 100 * math.expm1(-0.12)
  assert float(first["change_percent"]) == pytest.approx(change)
  assert first["seeds"] == "2" and second["against_reference"] == ""
  assert f"{change:+.2f}<br>" in text
  assert "seeds -16.47 to -5.82" in text
  assert "perplexity against N2" in text
  assert "Not finished" not in text and "Exact match" not in text
  with (below / "rows.csv").open() as f:
    costs = list(csv.DictReader(f))
  assert [float(line["training_seconds"]) for line in costs] == [5.0, 5.0]
  assert int(costs[0]["trained"]) == sweep.built[0].trained
  # Of N=2 twice the rows in coprocessor and decoder, and more pairs.
  added = [float(line["augmentation_flop"]) for line in costs]
  assert 2 * added[0] < added[1] < 2.5 * added[0]
  assert float(costs[0]["token_flop"]) < float(costs[1]["token_flop"])
  for name in ("comparison.png", "scaling.png"):
    assert (below / name).read_bytes().startswith(b"\x89PNG")
    assert f"({name})" in text
  # The same figures give the same bytes.
  before = {p.name: p.read_bytes() for p in below.iterdir()}
  sweep.write()
  assert before == {p.name: p.read_bytes() for p in below.iterdir()}


def test_what_is_not_finished_is_named(tmp_path):
  text = _Sweep(tmp_path, nll={"N1-seed1": _NLL["N1-seed1"]}).write()
  assert "| N1 | 1 of 2 |" in text
  assert "| N2 |" not in text and "against N2" not in text
  assert text.endswith("## Not finished\n\nN1-seed0, N2-seed0\n")


def test_a_decoder_from_nothing_has_no_frozen_one(tmp_path):
  lines = (*small_sweep.ROWS, 'Row("model", {"objective": "language_model"})')
  sweep = _Sweep(tmp_path, *lines, nll=_NLL | {"model-seed0": ""})
  path = sweep.directory / "model-seed0" / "report.json"
  assert str(path) in sweep.refusal()
  path.write_text(
    json.dumps(
      {"text held-out bits per token": 1.25, "text held-out tokens": 9}
    )
  )
  text = sweep.write()
  # Against the frozen decoder, and N2; bits; cost.
  assert text.count("| model | 1 | - |") == 2
  assert "| model | 1 | 1.2500 |" in text
  assert sweep.built[2].frozen == 0


def test_answers_of_a_trained_decoder_are_its_reports(tmp_path):
  given = {"eval.problems": 8, "data.sources.text.kind": "problems"}
  lines = ('Row("model", {"objective": "language_model"}, (0, 1))',)
  nll = {"model-seed0": "", "model-seed1": ""}
  sweep = _Sweep(tmp_path, *lines, nll=nll, given=given, reference="", axis="")
  for run, right in zip(sweep.runs, (4, 5), strict=True):
    text = run_report.percent((right, 8))
    figures = {"problems held-out tokens": 9, "problems all": text}
    (run.workdir / "report.json").write_text(json.dumps(figures))
  assert "| model | 2 | 56.2<br>50.0 to 62.5 |" in sweep.write()


def test_exact_match_is_pooled_over_seeds(tmp_path):
  given = {"eval.problems": 8, "data.sources.text.kind": "problems"}
  sweep = _Sweep(tmp_path, given=given)
  for run, right in zip(sweep.runs, (4, 2, 5), strict=True):
    frozen = {"all": (1, 8), "sum 1": (1, 8)}
    exact_match.save(
      run.workdir / "report",
      {"frozen": frozen, "augmented": {"all": (right, 8), "sum 1": (8, 8)}},
    )
  text = sweep.write()
  # Runs are N1-seed0, N2-seed0, N1-seed1: N1 has 4 and 5 of 8 right.
  assert "| frozen random | - | 12.5 | 12.5 |" in text
  assert "| N1 | 2 | 56.2<br>50.0 to 62.5 | 100.0<br>" in text
  assert "| N2 | 1 | 25.0 | 100.0 |" in text
  (sweep.runs[0].workdir / "report" / exact_match.FILE).unlink()
  assert "problems.json: no answers that can be read" in sweep.refusal()


def test_curves_are_of_rows_that_differ_in_the_axis_alone(tmp_path):
  lines = (
    *small_sweep.ROWS,
    'Row("other", {"coprocessor.latents": 3, "traces.ahead": 3})',
  )
  nll = _NLL | {"other-seed0": _NLL["N2-seed0"]}
  sweep = _Sweep(tmp_path, *lines, nll=nll)
  (curve,) = curves.find(sweep.compare(), sweep.sweep.axis)
  assert [x for x, _ in curve.points] == [1, 2]
  with pytest.raises(UserError, match="'byte' is no number"):
    curves.find(sweep.compare(), "data.tokenizer")


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
  sweep = _Sweep(tmp_path)
  (sweep.directory / "report").write_text("a file")
  with pytest.raises(UserError, match="the report cannot be written"):
    sweep.write()
