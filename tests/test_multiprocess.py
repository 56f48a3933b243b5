"""Processes equal one, resume each other, and stop, end and go on together."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import small_runs


def _metrics(workdir: Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _batches(workdir: Path) -> list[str]:
  """The checksum of each step's rows."""
  lines = (workdir / "speed.jsonl").read_text().splitlines()
  return [json.loads(line)["batch"] for line in lines]


def _several(
  tmp_path: Path, workdir: Path, *arguments: str, processes: int = 2
) -> list:
  """A run on four devices by as many processes as asked for."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  return [
    small_runs.start(
      tmp_path,
      f"--workdir={workdir}",
      "--multihost",
      "--config.mesh.fsdp=2",
      "--config.log_every=1",
      *arguments,
      devices=4 // processes,
      JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
      JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
      JAX_NUM_PROCESSES=str(processes),
      JAX_PROCESS_ID=str(i),
    )
    for i in range(processes)
  ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["text", "workdir"])
def test_hosts_that_do_not_share_end_in_one_line(tmp_path, what):
  """Before the first step, each of them with the same line."""
  places = [tmp_path / "host0", tmp_path / "host1"]
  for place in places:
    small_runs.get_config(str(place))
  pair = []
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  if what == "text":
    text = (places[1] / "text.txt").read_text()
    (places[1] / "text.txt").write_text(text[: len(text) // 2])
  for i, place in enumerate(places):
    workdir = place if what == "workdir" else tmp_path
    pair.append(
      small_runs.start(
        place,
        f"--workdir={workdir}/run",
        "--multihost",
        "--config.mesh.fsdp=2",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(i),
      )
    )
  wanted = {
    "text": "data.sources.text differs between processes: 60 documents",
    "workdir": "process 1 does not see what process 0 writes there",
  }
  for process in pair:
    status, _, err = small_runs.finish(process)
    lines = [k for k in err.splitlines() if k.startswith("error:")]
    assert status == 1 and len(lines) == 1 and wanted[what] in lines[0], err
    assert "Traceback" not in err
  assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_equal_one_and_one_and_four_resume_them(tmp_path):
  """Tolerance: float32 sums in another order."""
  config = small_runs.get_config(str(tmp_path))
  config.mesh.fsdp = 2
  for process in _several(tmp_path, tmp_path / "run"):
    status, _, err = small_runs.finish(process)
    assert status == 0, err
  two = _metrics(tmp_path / "run")
  assert [m["step"] for m in two] == [1, 2, 3, 4, 5, 6]

  one = small_runs.Steps(config, devices=4).take(6)
  np.testing.assert_allclose([m["loss"] for m in two], one, rtol=2e-5)
  assert len(set(one)) == 6

  for processes in (1, 4):
    resumed = tmp_path / f"resumed_{processes}"
    shutil.copytree(tmp_path / "run", resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    # The one has two devices, half of what saved.
    several = (
      [
        small_runs.start(
          tmp_path,
          f"--workdir={resumed}",
          "--config.mesh.fsdp=2",
          "--config.log_every=1",
          devices=2,
        )
      ]
      if processes == 1
      else _several(tmp_path, resumed, processes=4)
    )
    for process, (status, out, err) in zip(
      several, [small_runs.finish(p) for p in several], strict=True
    ):
      assert status == 0 and "resumed from step 3" in err, err
      assert ("perplexity" in out) == (process is several[0])
    assert _batches(resumed) == _batches(tmp_path / "run")
    again = _metrics(resumed)
    assert again[:3] == two[:3]
    for name in ("loss", "baseline_loss", "gradient_norm"):
      found, expected = ([m[name] for m in run] for run in (again, two))
      np.testing.assert_allclose(found, expected, rtol=1e-4)


def _endless(tmp_path: Path, workdir: Path) -> list:
  return _several(
    tmp_path,
    workdir,
    "--config.optimizer.steps=1000000",
    "--config.checkpoint.every=5",
  )


def _checkpoints(workdir: Path) -> list[int]:
  names = (p.name for p in (workdir / "checkpoints").glob("*"))
  return sorted(int(n) for n in names if n.isdigit())


def _wait_for_checkpoint(workdir: Path, step: int, pair: list) -> None:
  """Until one of `step` or later is there."""
  while not any(s >= step for s in _checkpoints(workdir)):
    for process in pair:
      assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)


def _stop(workdir: Path, pair: list, index: int) -> int:
  """SIGTERM to one of the pair; the step that both saved."""
  pair[index].send_signal(signal.SIGTERM)
  sent = time.monotonic()
  ends = [small_runs.finish(p) for p in pair]
  # Seconds on a free machine. A process that waits in vain for the other
  # would take JAX's 300 s.
  assert time.monotonic() - sent < 200
  step = _checkpoints(workdir)[-1]
  for status, _, err in ends:
    assert status == 0 and f"step {step} is saved, run again" in err, err
  return step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pair_stops_ends_and_goes_on_together(tmp_path):
  """SIGTERM to one stops both; SIGKILL of one ends both; bits stay."""
  workdir = tmp_path / "broken"
  pair = _endless(tmp_path, workdir)
  _wait_for_checkpoint(workdir, 5, pair)
  stopped = _stop(workdir, pair, 1)
  beats = [
    json.loads((workdir / f"heartbeat{i}.json").read_text()) for i in ("", "-1")
  ]
  for i, (beat, process) in enumerate(zip(beats, pair, strict=True)):
    assert (beat["process"], beat["pid"]) == (i, process.pid)
    assert (beat["state"], beat["saved"]) == ("stopped", stopped)

  pair = _endless(tmp_path, workdir)
  _wait_for_checkpoint(workdir, stopped + 1, pair)
  killed_at = time.monotonic()
  pair[1].send_signal(signal.SIGKILL)
  status, _, err = small_runs.finish(pair[0])
  assert status == 1 and time.monotonic() - killed_at < 60
  assert small_runs.finish(pair[1])[0] == -signal.SIGKILL
  (line,) = [k for k in err.splitlines() if k.startswith("error:")]
  assert "another process of this run has ended" in line
  assert "restart all processes" in line and "Traceback" not in err
  assert f"resumed from step {stopped}" in err
  left = _checkpoints(workdir)[-1]

  pair = _endless(tmp_path, workdir)
  _wait_for_checkpoint(workdir, left + 1, pair)
  last = _stop(workdir, pair, 0)

  undisturbed = tmp_path / "whole"
  pair = _endless(tmp_path, undisturbed)
  _wait_for_checkpoint(undisturbed, last, pair)
  _stop(undisturbed, pair, 0)
  whole, broken = (
    (w / "metrics.jsonl").read_bytes() for w in (undisturbed, workdir)
  )
  assert len(broken.splitlines()) == last and whole.startswith(broken)
