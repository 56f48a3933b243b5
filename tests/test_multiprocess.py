"""Two processes equal one, and one resumes what two have saved."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import small_runs


def _metrics(workdir: Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _pair(tmp_path: Path, *arguments: str):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  return [
    small_runs.start(
      tmp_path,
      f"--workdir={tmp_path / 'run'}",
      "--multihost",
      *arguments,
      devices=2,
      JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_equal_one_which_resumes_them(tmp_path):
  """Tolerance: float32 sums in another order."""
  config = small_runs.get_config(str(tmp_path))
  config.mesh.fsdp = 2
  both = ("--config.mesh.fsdp=2", "--config.log_every=1")
  for process in _pair(tmp_path, *both):
    status, _, err = small_runs.finish(process)
    assert status == 0, err
  two = _metrics(tmp_path / "run")
  assert [m["step"] for m in two] == [1, 2, 3, 4, 5, 6]

  one = small_runs.Steps(config, devices=4).take(6)
  np.testing.assert_allclose([m["loss"] for m in two], one, rtol=2e-5)
  assert len(set(one)) == 6

  resumed = Path(shutil.copytree(tmp_path / "run", tmp_path / "resumed"))
  shutil.rmtree(resumed / "checkpoints" / "6")
  process = small_runs.start(tmp_path, f"--workdir={resumed}", *both, devices=2)
  status, out, err = small_runs.finish(process)
  assert status == 0 and "resumed from step 3" in err, err
  again = _metrics(resumed)
  assert again[:3] == two[:3]
  for name in ("loss", "baseline_loss", "gradient_norm"):
    found, expected = ([m[name] for m in run] for run in (again, two))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert "perplexity" in out
