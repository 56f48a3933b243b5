"""configs/mixture.py: its sources, and its step beside PyTorch's."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cacheaug.errors import UserError

_ROOT = Path(__file__).resolve().parent.parent
_CONFIG = _ROOT / "configs" / "mixture.py"


def _config(directory: Path):
  return runpy.run_path(str(_CONFIG))["get_config"](str(directory))


def test_a_source_for_each_file_but_for_held_out_ones(tmp_path):
  for name in ("web.jsonl", "books.jsonl.gz", "web.heldout.jsonl", "README.md"):
    (tmp_path / name).write_text("")
  sources = _config(tmp_path).data.sources
  assert list(sources) == ["books", "web"]
  assert sources.web.path == str(tmp_path / "web.jsonl")
  assert sources.web.kind == "jsonl" and sources.web.weight == 1.0


def test_a_directory_without_text_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"mixture\.py:.* has no NAME\.jsonl"):
    _config(tmp_path)


@pytest.mark.parametrize(
  "names", [("web.v1.jsonl",), ("web.jsonl", "web.jsonl.gz")]
)
def test_no_file_is_left_out_without_a_word(tmp_path, names):
  for name in names:
    (tmp_path / name).write_text("")
  with pytest.raises(UserError, match=r"web.*: rename the file"):
    _config(tmp_path)


def test_a_directory_with_a_files_name_is_no_source(tmp_path):
  (tmp_path / "old.jsonl").mkdir()
  (tmp_path / "web.jsonl").write_text("")
  assert list(_config(tmp_path).data.sources) == ["web"]


@pytest.mark.slow
def test_the_peer_has_the_same_loss_on_real_rows():
  pytest.importorskip("transformers")
  sizes = "data.batch=1 traces.count=4 data.sequence=64".split()
  done = subprocess.run(
    [
      *(sys.executable, "benchmarks/torch_peer.py", "--repeats=1"),
      f"--config={_CONFIG}",
      "--config.decoder.path=shipped:tiny",
      *(f"--config.{size}" for size in sizes),
    ],
    cwd=_ROOT,
    env=os.environ | {"XLA_FLAGS": ""},  # one device
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  said = [x for x in done.stdout.splitlines() if x.startswith("loss: ")]
  for line in said:  # the script asserts it too; here, that it says so
    ours, theirs = line.split("cacheaug ")[1].split(", torch ")
    assert float(theirs.split()[1]) == pytest.approx(float(ours), abs=2e-4)
  assert len(said) == 2
  assert "% of the products'" in done.stdout
