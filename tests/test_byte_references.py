"""The comparison of byte_references.py finds what differs, and no more."""

import json

import byte_references
import numpy as np
import pytest
import safetensors.numpy

HLO = """HloModule jit_step, entry={f32[]}

FileNames
1 "{file}"

ENTRY %main {
  %a = f32[] add(%x, %y), metadata={op_name="{file}" source_line=3}
}
"""


@pytest.fixture
def pair(tmp_path):
  """Two directories that differ in nothing that counts."""
  for name, more in (("before", {}), ("after", {"new": 1})):
    directory = tmp_path / name
    (directory / "export").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"loss": 1.5}\n')
    hlo = HLO.replace("{file}", name)
    (directory / "step.txt").write_text(byte_references.without_metadata(hlo))
    config = {"model": {"width": 4} | more} | more
    (directory / "export/config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
      {"x": np.arange(3.0)},
      directory / "export/x.safetensors",
      metadata={k: k for k in ("abc" if more else "cba")},
    )
  (tmp_path / "after/export/README.md").write_text("new")
  return tmp_path / "before", tmp_path / "after"


def test_equal(pair):
  assert byte_references.differences(*pair) == []
  assert "add(%x, %y)\n" in (pair[0] / "step.txt").read_text()


@pytest.mark.parametrize(
  ("name", "old", "new"),
  (
    ("metrics.jsonl", "1.5", "1.6"),
    ("step.txt", "add(%x, %y)", "add(%y, %x)"),
    ("export/config.json", '"width": 4', '"width": 5'),
  ),
)
def test_differences_are_named(pair, name, old, new):
  path = pair[1] / name
  path.write_text(path.read_text().replace(old, new))
  (line,) = byte_references.differences(*pair)
  assert line.startswith(name)


def test_weights_and_missing_files(pair):
  path = pair[1] / "export/x.safetensors"
  safetensors.numpy.save_file({"x": np.arange(1.0, 4.0)}, path)
  (pair[1] / "metrics.jsonl").unlink()
  lines = byte_references.differences(*pair)
  assert [line.split(":")[0] for line in lines] == [
    "export/x.safetensors",
    "metrics.jsonl",
  ]
