"""The evaluate command: what it writes, and what it refuses to."""

import csv
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import small_runs
from ml_collections import ConfigDict
from test_benchmarks import RECORDS, WHY, write
from test_diagnostics import compiled_quickly  # noqa: F401, a fixture
from tolerances import LOSS, close, make_coprocessor

from cacheaug import build, evaluate
from cacheaug import config as configs
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, page, perplexity, run_report
from cacheaug.weights import coprocessor_files, trained

N, A = 2, 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """(directory of an untrained coprocessor of the shipped nano, its lm)."""
  path = tmp_path_factory.mktemp("pair") / "coprocessor"
  found = build.load("shipped:nano")
  spec = Layout(N, A, "replace", "harmless")
  coprocessor_files.save_coprocessor(
    path,
    model_config=found.model.config,
    spec=spec,
    params=make_coprocessor(found.model, spec),
    decoder_fingerprint=found.fingerprint,
    source="shipped:nano",
  )
  return str(path), found.with_coprocessor(path)


def config_of(directory) -> ConfigDict:
  config = small_runs.get_config(str(directory))
  config.decoder.path = "shipped:nano"
  config.decoder.shape = configs.base().decoder.shape
  config.data.tokenizer = "decoder"
  config.data.validation_fraction = 0.5
  config.eval.sequences = 7
  return config


def run(pair, directory, out="out", config=None, **kw):
  options = dict(latents=[], text="", field="text", diagnostics=False) | kw
  config = config or config_of(directory)
  return evaluate.run(
    config, pair[0], page.check_out(str(directory / out)), **options
  )


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory, compiled_quickly):  # noqa: F811
  directory = tmp_path_factory.mktemp("whole")
  written = run(pair, directory, latents=["2", "1"], diagnostics=True)
  return directory, written


def test_report_is_whole(whole):
  directory, written = whole
  names = sorted(p.name for p in written.parent.iterdir())
  assert names == sorted(
    [
      "report.md",
      "figures.json",
      "perplexity.csv",
      "documents.csv",
      "documents_n1.csv",
      "perplexity_text.png",
      "interventions_text.png",
      "attention_text.png",
    ]
  )
  # Neither a temporary directory nor anything else stays behind.
  beside = {p.name for p in directory.iterdir()}
  assert beside == {"out", "cache", "text.txt"}
  text = written.read_text()
  for part in ("shipped:nano", "swapped", "N=1 | N=2", "zeroed: at most"):
    assert part in text, part
  for png in written.parent.glob("*.png"):
    assert f"({png.name})" in text
    assert png.read_bytes()[:4] == b"\x89PNG"
  figures = json.loads((written.parent / "figures.json").read_text())
  found = figures["sources"]["text"]
  assert set(found["table"]) == {"1", "2"}
  with (written.parent / "perplexity.csv").open() as file:
    lines = list(csv.DictReader(file))
  change = {
    (line["latents"], line["position"]): float(line["change_percent"])
    for line in lines
    if line["table"] == "interventions"
  }
  for row in found["table"]["2"]:
    right = change["right", str(row["position"])]
    assert right == pytest.approx(row["change_percent"], abs=1e-3)
    assert change["zeroed", str(row["position"])] == pytest.approx(0, abs=1e-2)
    assert abs(right) > 0.1


def test_columns_are_of_the_same_tokens(whole):
  _, written = whole
  rows = bootstrap.compare(
    written.parent / "documents.csv", written.parent / "documents_n1.csv"
  )
  assert [r.position for r in rows] == [1, 2, 4]
  assert all(abs(r.change_percent) > 1e-3 for r in rows)


def test_streamed_equals_all_at_once(whole, pair):
  directory, written = whole
  config = config_of(directory)
  config.eval.batch = config.eval.sequences
  found = pair[1]
  spec = evaluate.adapt(config, found)
  (batch,) = run_report.held_out(config, found.tokenizer, "text")
  assert len(batch["tokens"]) > 4  # more than a batch of the run
  sums = perplexity.coprocessor_sums(
    found.model, found.decoder, found.coprocessor.params, [batch], spec
  )
  there = bootstrap.read_csv(written.parent)
  assert len(there) == (sums.tokens > 0).sum()
  for t, document in enumerate(sums.documents):
    for j, position in enumerate(sums.positions):
      if sums.tokens[t, j]:
        line = there["text", int(document), position]
        assert line.tokens == sums.tokens[t, j]
        assert line.checksum == sums.checksum[t, j]
        close(line.augmented, sums.nll["augmented"][t, j], 30 * LOSS)


def test_own_text_is_read_whole(pair, tmp_path):
  texts = ["one two three four " * 3, "five six seven eight nine " * 4]
  path = tmp_path / "mine.jsonl.gz"
  with gzip.open(path, "wt") as file:
    file.writelines(json.dumps({"body": t}) + "\n" for t in texts)
  written = run(pair, tmp_path, text=str(path), field="body")
  lines = bootstrap.read_csv(written.parent)
  assert {document for _, document, _ in lines} == {0, 1}
  sizes = [len(pair[1].tokenizer.encode(t)) for t in texts]
  tokens = sum(x.tokens for (_, _, j), x in lines.items() if j == 1)
  # All but N + 1 or so of a document, and of its part of each row of 32.
  assert sum(sizes) - 8 * (N + 2) <= tokens <= sum(sizes)
  assert "interventions_text.png" not in os.listdir(written.parent)


# --- refusals ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("a.csv", b"x", "neither .txt nor .jsonl"),
    ("missing.txt", None, "no such file"),
    ("a.txt", b"", "no text in"),
    ("a.txt", b"good " * 30 + b"\xff bad", "not UTF-8 at byte 150"),
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "object 2: not JSON"),
    ("a.jsonl", b'{"body": "x"}\n', "text"),
    ("a.txt", b"short", "fewer than one row of data.sequence=32"),
  ],
)
def test_text_of_another_form_is_refused(pair, tmp_path, name, content, says):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  _refused(pair, tmp_path, says, text=str(path), named=f"--text={path}")


def _refused(pair, tmp_path, says, named="", **kw):
  with pytest.raises(UserError) as caught:
    run(pair, tmp_path, **kw)
  line = str(caught.value)
  assert says in line and named in line and "\n" not in line, line
  left = {p.name for p in tmp_path.iterdir()}
  assert not any("out" in name for name in left), left


@pytest.mark.parametrize(
  ("latents", "says"),
  [
    (["1", "3"], "--latents=3: this coprocessor was trained for 2"),
    (["0"], "--latents=0"),
    (["two"], "--latents=two: give numbers"),
  ],
)
def test_latents_beyond_the_trained_are_refused(pair, tmp_path, latents, says):
  _refused(pair, tmp_path, says, latents=latents)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"decoder.path": ""}, "decoder.path is empty"),
    ({"eval.sequences": 0}, "eval.sequences=0 must be at least 1"),
    ({"eval.context": 1}, "eval.context=1 is less than the 2 tokens"),
    ({"eval.ahead": 31}, "needs sequences of 33 tokens, data.sequence=32"),
    ({"data.sequence": 4096}, "data.sequence=4096 exceeds the decoder's"),
  ],
)
def test_layouts_without_room_are_refused(pair, tmp_path, changes, says):
  config = config_of(tmp_path)
  config.update_from_flattened_dict(changes)
  _refused(pair, tmp_path, says, config=config)


def test_another_evaluation_is_not_overwritten(pair, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "report.md").write_text("mine")
  with pytest.raises(UserError, match="--out=.*out exists"):
    run(pair, tmp_path)
  assert small_runs.contents(tmp_path / "out") == {"report.md": b"mine"}


def test_a_full_disk_leaves_no_half_written_report(tmp_path, monkeypatch):
  written = []

  def full(path, data):
    if written:
      raise OSError(28, "No space left on device")
    written.append(path)
    path.write_bytes(data)

  monkeypatch.setattr(page.storage, "write_whole", full)
  out = page.check_out(str(tmp_path / "run" / "out"))
  with pytest.raises(UserError, match="No space left"):
    page.write(out, {"a": b"1", "b": b"2"})
  assert written and list((tmp_path / "run").iterdir()) == []


def test_benchmarks_beside_the_tables_or_alone(pair, tmp_path):
  pytest.importorskip("lm_eval", reason=WHY)
  rows = [dict(RECORDS["piqa"], goal=f"Sit {i}") for i in range(3)]
  write(tmp_path, "piqa", rows)
  tasks = evaluate.Tasks(("piqa",), str(tmp_path), limit=2)
  written = run(pair, tmp_path, tables=False, tasks=tasks)
  names = {path.name for path in written.parent.iterdir()}
  assert names == {
    "report.md",
    "figures.json",
    "benchmarks.json",
    "benchmarks.md",
  }
  assert "| PIQA | 0-shot acc | 2 |" in written.read_text()
  (score,) = json.loads((written.parent / "benchmarks.json").read_text())
  assert score["task"] == "piqa"
  wrong = dataclasses.replace(tasks, names=("pica",))
  with pytest.raises(UserError, match="did you mean piqa"):
    run(pair, tmp_path, "second", tables=False, tasks=wrong)
  assert not (tmp_path / "second").exists()


def test_benchmarks_flags_are_checked(pair, tmp_path):
  with pytest.raises(UserError, match="leaves nothing to do"):
    run(pair, tmp_path, tables=False)
  with pytest.raises(UserError, match="needs --data"):
    run(pair, tmp_path, tasks=evaluate.Tasks(("piqa",)))
  values = dict(tasks=[], data="", limit=0, batch=8, cot="", execute=False)
  assert evaluate.tasks_of(types.SimpleNamespace(**values)) is None
  with pytest.raises(UserError, match="--limit says how"):
    evaluate.tasks_of(types.SimpleNamespace(**values | {"limit": 3}))
  asked = values | dict(tasks=["nq"], data="d", cot="Think.")
  found = evaluate.tasks_of(types.SimpleNamespace(**asked))
  assert (found.names, found.data, found.cot) == (("nq",), "d", "Think.")


def test_flags_that_do_not_go_together_are_refused(tmp_path):
  config = config_of(tmp_path)
  for args, says in (
    (("", "", config), "give either --workdir"),
    (("run", "export", config), "give either --workdir"),
    (("", "export", None), "--config is missing"),
    (("run", "", config), "--workdir and --config"),
    ((str(tmp_path / "none"), "", None), "missing; give the --workdir"),
  ):
    with pytest.raises(UserError, match=says):
      evaluate.open_config(*args)
  (tmp_path / "config.json").write_text(config.to_json())
  with pytest.raises(UserError, match="no checkpoint that can be read"):
    evaluate.open_config(str(tmp_path), "", None)


def test_a_decoders_run_is_refused(tmp_path, monkeypatch):
  decoder = trained.Run(tmp_path, config_of(tmp_path), None, {}, "", 1)
  monkeypatch.setattr(evaluate.trained, "read_run", lambda _: decoder)
  with pytest.raises(UserError, match="holds a decoder"):
    evaluate.open_config(str(tmp_path), "", None)


def test_the_command_ends_in_one_line(tmp_path):
  command = [sys.executable, "-m", "cacheaug.evaluate"]
  done = subprocess.run(
    [*command, "--coprocessor=shipped:tiny_coprocessor"],
    capture_output=True,
    text=True,
    check=False,
    cwd=small_runs._ROOT,
  )
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith("error: --config is missing")
  assert len(done.stderr.splitlines()) == 1


def test_tokens_are_shown_as_text_or_number(pair):
  tokenizer = pair[1].tokenizer
  (letter,) = tokenizer.encode("a")
  assert evaluate.show_token(tokenizer, letter) == "`a`"
  (line,) = tokenizer.encode("\n")
  assert evaluate.show_token(tokenizer, line) == r"`\n`"
  (tick,) = tokenizer.encode("`")
  assert evaluate.show_token(tokenizer, tick) == f"<{tick}>"
  high = int(np.argmax([t for t in tokenizer.encode("\u00e9")]))
  assert (
    evaluate.show_token(tokenizer, tokenizer.encode("\u00e9")[high])[0] == "<"
  )
