"""Every shipped sweep: each of its rows builds, and means what it says."""

import json
import runpy
from pathlib import Path

import pytest

from cacheaug import config as configs
from cacheaug.projects.sweep import rows
from cacheaug.weights import config_json

_SWEEPS = Path(__file__).resolve().parent.parent / "configs" / "sweeps"
_LETTERS = ("latents", "ahead", "traces", "steps", "decoders", "decoder")
_FILES = (
  "tiny",
  "tinystories",
  "gpu",
  "gemma2b",
  "hops",
  "window",
  "before_question",
)
_NAMES = (*_FILES, *(f"scaling:{k}" for k in _LETTERS))


def _shape(directory: Path, config) -> None:
  """A decoder's directory without its weights, which nothing here reads."""
  directory.mkdir(parents=True)
  entries = config_json.config_entries(configs.model_of(config))
  (directory / "config.json").write_text(json.dumps(entries))


def _built(name, tmp_path, monkeypatch) -> list[rows.Built]:
  stem, colon, letter = name.partition(":")
  file = f"{_SWEEPS / stem}.py{colon}{letter}"
  monkeypatch.chdir(tmp_path)  # where sweep files' relative paths begin
  config = runpy.run_path(f"{_SWEEPS / stem}.py")["get_config"](
    *([letter] if letter else [])
  )
  given = {}
  if config.decoder.how_to_get:
    _shape(tmp_path / "weights", config)
    given["decoder.path"] = str(tmp_path / "weights")
  if letter == "decoder":
    for built in _built("scaling:decoders", tmp_path, monkeypatch):
      _shape(tmp_path / built.config.export, built.config)
  return rows.build(rows.load(file), file, given)


def test_no_sweep_file_is_left_out():
  stems = {name.partition(":")[0] for name in _NAMES}
  assert {path.stem for path in _SWEEPS.glob("*.py")} == stems


@pytest.mark.parametrize("name", _NAMES)
def test_every_row_of_a_shipped_sweep_is_valid(name, tmp_path, monkeypatch):
  built = _built(name, tmp_path, monkeypatch)
  first = built[0].config
  for b in built:
    assert b.trained > 0 and b.flop > 0
    if b.row.flop_of:
      other = next(x for x in built if x.row.name == b.row.flop_of)
      assert b.flop == pytest.approx(other.flop, rel=0.01)
    elif "optimizer.steps" not in b.row.overrides:
      # Equal steps, whatever a row is.
      assert b.config.optimizer.steps == first.optimizer.steps
    if b.config.objective == "coprocessor":
      assert b.config.eval.context >= b.config.coprocessor.latents
  # Rows are different experiments.
  plain = {json.dumps(rows.keys(b.config), default=str) for b in built}
  assert len(plain) == len(built)


def test_scaling_decoders_are_of_three_sizes(tmp_path, monkeypatch):
  built = _built("scaling:decoder", tmp_path, monkeypatch)
  assert len({b.frozen for b in built}) == 3
  assert [b.frozen for b in built] == sorted(b.frozen for b in built)
