"""Nothing of benchmarks/on_gpu.sh runs for the first time on a GPU."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import compiling
import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = "kernels", "mosaic", "step", "deterministic", "cross_entropy"
PARTS += "decode", "run"


@pytest.fixture
def module(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  yield importlib.import_module
  for name in ("on_gpu", "on_gpu_report", "cross_entropy"):
    sys.modules.pop(name, None)


def test_a_part_goes_on_where_it_stopped(module, tmp_path):
  on_gpu = module("on_gpu")

  def fails():
    raise MemoryError("too\nlarge")

  first = on_gpu.Figures(tmp_path, "step", seconds=60)
  assert first.measure("a", lambda: {"ms": 1.0})
  assert not first.measure("b", fails)
  with (tmp_path / "step.jsonl").open("a") as f:
    f.write('{"case": "c", "m')  # killed while it wrote
  again = on_gpu.Figures(tmp_path, "step", seconds=60)
  assert again.measure("a", fails)  # known: not measured again
  assert again.measure("c", lambda: {"ms": 3.0})
  read = module("on_gpu_report").read(tmp_path / "step.jsonl")
  lines = {x["case"]: x for x in read}
  assert lines["a"]["ms"] == 1.0 and lines["c"]["ms"] == 3.0
  assert lines["b"]["failed"] == "MemoryError: too large"
  late = on_gpu.Figures(tmp_path, "step", seconds=-1)
  assert not late.measure("d", fails)


def test_report_of_nothing_claims_nothing(module, tmp_path):
  report = module("on_gpu_report")
  template = (ROOT / "benchmarks/RESULTS-gpu.template.md").read_text()
  text = report.report(tmp_path, template)
  assert "# One GPU: nothing was measured" in text
  assert text.count("not measured |") == 4 and "Not measured." in text


def test_report_sets_goals_beside_what_was_measured(module, tmp_path):
  report = module("on_gpu_report")

  def write(part, **line):
    line = {"case": "gemma2_2b N=16 batch 1", "device": "H0", **line}
    with (tmp_path / f"{part}.jsonl").open("a") as f:
      f.write(json.dumps(line) + "\n")

  def variant(name, seconds, mfu):
    return {
      "variant": name,
      "seconds": seconds,
      "mfu": mfu,
      "temporary_bytes": 2e9,
      "compile_seconds": 9.0,
    }

  write(
    "step",
    variants=[variant("structured", 0.1, 0.55), variant("naive", 0.45, 0.1)],
    peak_bytes=4e10,
  )
  write("flex", ms=150.0, loss=1.0, torch="2")
  (tmp_path / "decoder").mkdir()
  (tmp_path / "decoder/metrics.jsonl").touch()  # stopped before its first line
  (tmp_path / "N4-seed0").mkdir()
  (tmp_path / "N4-seed0/metrics.jsonl").write_text('{"step": 7, "loss": 2}')
  (tmp_path / "N4-seed0/speed.jsonl").write_text(
    '{"tokens_per_second": 5000, "mfu": 0.25}'
  )
  text = report.report(
    tmp_path, (ROOT / "benchmarks/RESULTS-gpu.template.md").read_text()
  )
  assert "# One GPU: H0" in text
  assert "at least 50 % | 55.0 % |" in text
  assert "4 times naive | 4.50 |" in text
  assert "FlexAttention | 1.50 times |" in text
  assert "| N4-seed0 | 7 | 2.0000 | 5,000 | 25.0 % |" in text
  assert "400 TFLOP/s | not measured |" in text


def test_losses_against_float64(module):
  vocabulary = module("cross_entropy")
  found = vocabulary.measure(
    300, "float32", rows=20, width=16, ways=("frozen", "chunked"), repeats=1
  )
  for row in found:  # float32's rounding, of nats of order 10
    assert row.nll_error < 1e-5 and row.gradient_error < 1e-5, row


def test_the_float64_reference_is_the_definition(module):
  vocabulary = module("cross_entropy")
  random = np.random.default_rng(0)
  hidden, embedding = random.normal(size=(3, 4)), random.normal(size=(9, 4))
  targets = np.array([0, 8, 3])
  cap = 1.5

  def nll(h):
    logits = cap * np.tanh(h @ embedding.T / cap)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(3), targets]

  found, gradient = vocabulary.reference(
    hidden, embedding, targets, softcap=cap
  )
  np.testing.assert_allclose(found, nll(hidden), atol=1e-12)
  step = 1e-5 * random.normal(size=hidden.shape)
  np.testing.assert_allclose(
    (gradient * step).sum(1) * 2,
    nll(hidden + step) - nll(hidden - step),
    rtol=1e-5,
  )


@pytest.mark.slow
def test_dry_run(tmp_path):
  parts = list(PARTS)
  if importlib.util.find_spec("torch"):
    parts.append("flex")
  # One device, as there.
  environment = os.environ | {"XLA_FLAGS": compiling.FLAGS}
  done = subprocess.run(
    ["benchmarks/on_gpu.sh", str(tmp_path), "--dry-run", *parts],
    cwd=ROOT,
    env=environment | {"PYTHON": sys.executable},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  ends = [x.split() for x in (tmp_path / "status.txt").read_text().splitlines()]
  logs = {p.stem: p.read_text()[-1500:] for p in tmp_path.glob("*.log")}
  assert {name for name, *_ in ends} == set(parts)
  for name, status, _ in ends:
    assert status == "0", logs[name]
  text = (tmp_path / "RESULTS-gpu.md").read_text()
  assert f"# One GPU: {jax.devices()[0].device_kind}" in text
  assert "failed" not in text, text
  measured = text.split("## Kernels")[1]
  assert "Not measured." not in measured, text
