"""Metric files survive kills byte for byte; progress shows rate and rest."""

import io
import json

import numpy as np
import pytest

from cacheaug.errors import UserError
from cacheaug.run import metrics


def _figures(step):
  return {
    "loss": np.float32(1.0) / np.float32(step + 3),
    "nll": np.arange(2, dtype=np.float32) / 3 + step,
  }


def _run(workdir, steps, restored=-1):
  with metrics.MetricWriter(workdir) as writer:
    writer.truncate_after(restored)
    for step in steps:
      writer.write(step, _figures(step), {"step_time": 0.1 * step})


def test_floats_read_back_to_the_same_bits(tmp_path):
  _run(tmp_path, [7])
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  record = json.loads(line)
  assert record["step"] == 7
  assert np.float32(record["loss"]) == _figures(7)["loss"]
  np.testing.assert_array_equal(np.float32(record["nll"]), _figures(7)["nll"])
  assert "step_time" not in record
  speed = json.loads((tmp_path / "speed.jsonl").read_text())
  assert speed == {"step": 7, "step_time": 0.1 * 7}


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 2}'])
def test_killed_and_resumed_file_is_the_uninterrupted_one(tmp_path, torn):
  _run(tmp_path / "whole", range(8))
  _run(tmp_path / "killed", range(6))
  path = tmp_path / "killed" / "metrics.jsonl"
  with path.open("a") as f:
    f.write(torn)
  before = path.read_bytes()
  _run(tmp_path / "killed", range(4, 8), restored=3)
  whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  assert path.read_bytes() == whole
  assert before != whole
  for name in ("metrics.tmp", "speed.tmp"):
    assert not (tmp_path / "killed" / name).exists()


def test_whole_last_line_without_its_newline_is_kept(tmp_path):
  _run(tmp_path, range(3))
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  metrics.MetricWriter(tmp_path).truncate_after(2)
  assert path.read_bytes() == whole


def test_fresh_start_drops_everything(tmp_path):
  _run(tmp_path, range(3))
  metrics.MetricWriter(tmp_path).truncate_after(-1)
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""
  assert (tmp_path / "speed.jsonl").read_bytes() == b""


def test_each_line_is_on_disk_at_once(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == (
      '{"step": 1, "loss": 1.0}\n'
    )
    assert list((tmp_path / "tensorboard").iterdir())


def test_unwritable_workdir_is_one_clear_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="--workdir") as caught:
    metrics.MetricWriter(tmp_path / "file" / "run")
  assert "\n" not in str(caught.value)


def test_only_process_zero_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  _run(tmp_path, range(2))
  assert not list(tmp_path.iterdir())


def test_plain_progress_has_rate_and_time_left(monkeypatch):
  clock = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
  out = io.StringIO()
  progress = metrics.Progress(50, 10, "train", stream=out)
  clock[0] += 5
  progress.update(15, loss=1.0)
  assert out.getvalue() == ""  # Not every step: at most every ten seconds.
  clock[0] += 5
  progress.update(30, loss=2.34567)
  assert out.getvalue() == (
    "train 30/50, 2 steps/s, 0:00:10 left, loss 2.346\n"
  )
  progress.update(50, loss="done")
  assert out.getvalue().splitlines()[-1].startswith("train 50/50")


def test_terminal_gets_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  with metrics.Progress(4, 2, "train", stream=out) as progress:
    progress.update(4, loss=1.5)
  text = out.getvalue()
  assert "4/4" in text and "train" in text and "loss=1.5" in text


def test_memory_peak_is_plausible():
  # jax alone takes tens of MB; a mistaken unit is off by 1024.
  assert 20e6 < metrics.memory_peak() < 200e9
