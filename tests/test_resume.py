"""A run killed, stopped, damaged and resumed equals one left alone."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import small_runs

from cacheaug.errors import UserError
from cacheaug.run import workdir as workdirs

STEPS = 120
EVERY = 10


def _start(tmp_path: Path, name: str, *arguments: str):
  return small_runs.start(
    tmp_path,
    f"--workdir={tmp_path / name}",
    f"--config.optimizer.steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    # Not in step with the checkpoints: they hold a part of a line's sums.
    "--config.log_every=7",
    "--config.optimizer.average=0.9",
    *arguments,
    JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
  )


def _checkpoints(workdir: Path) -> list[int]:
  names = (p.name for p in (workdir / "checkpoints").glob("*"))
  return sorted(int(n) for n in names if n.isdigit())


def _wait_past(workdir: Path, step: int, process) -> None:
  while not any(s > step for s in _checkpoints(workdir)):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)


def _cut_newest(workdir: Path) -> int:
  """Halves the largest file of the newest checkpoint."""
  step = _checkpoints(workdir)[-1]
  files = (workdir / "checkpoints" / str(step)).rglob("*")
  largest = max(
    (p for p in files if p.is_file()), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  return step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_stopped_and_damaged_run_is_bit_identical(tmp_path):
  status, _, err = small_runs.finish(_start(tmp_path, "whole"))
  assert status == 0, err
  whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
  assert json.loads(whole.splitlines()[-1])["step"] == STEPS

  workdir = tmp_path / "broken"
  process = _start(tmp_path, "broken")
  _wait_past(workdir, 0, process)
  time.sleep(random.uniform(0, 0.3))
  process.send_signal(signal.SIGKILL)
  assert small_runs.finish(process)[0] == -signal.SIGKILL
  killed_at = _checkpoints(workdir)[-1]

  process = _start(tmp_path, "broken")
  _wait_past(workdir, killed_at, process)
  process.send_signal(signal.SIGTERM)
  status, _, err = small_runs.finish(process)
  assert status == 0, err
  saved = _checkpoints(workdir)[-1]
  assert f"resumed from step {killed_at}" in err
  assert f"step {saved} is saved" in err
  assert saved < STEPS

  before, damaged = _checkpoints(workdir)[-2], _cut_newest(workdir)
  status, out, err = small_runs.finish(_start(tmp_path, "broken"))
  assert status == 0, err
  assert f"{damaged} cannot be read" in err
  assert f"resumed from step {before}" in err
  assert (workdir / "metrics.jsonl").read_bytes() == whole
  assert "perplexity" in out

  tables = [
    (tmp_path / name / "report" / "perplexity_by_position.csv").read_bytes()
    for name in ("whole", "broken")
  ]
  assert tables[0] == tables[1]
  # Plain logs: nothing of other packages below a warning.
  assert "Closing" not in err and "orbax" not in err

  # A loss that is not finite stops the run and overwrites nothing.
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  path = workdir / "config.json"
  held = json.loads(path.read_text())
  held["optimizer"]["learning_rate"] = 1e30
  path.write_text(json.dumps(held))
  kept = small_runs.contents(workdir / "checkpoints")
  flag = "--config.optimizer.learning_rate=1e30"
  status, _, err = small_runs.finish(_start(tmp_path, "broken", flag))
  last = _checkpoints(workdir)[-1]
  line = err.strip().splitlines()[-1]
  assert status == 1 and "Traceback" not in err
  assert line.startswith("error: ") and "optimizer.learning_rate" in line
  assert f"at step {last + 1} (batch {last} of the data)" in line
  assert small_runs.contents(workdir / "checkpoints") == kept


def _held(tmp_path):
  """A workdir that a run has begun in, and its config."""
  config = small_runs.get_config(str(tmp_path))
  workdir = tmp_path / "run"
  workdirs.claim(config, str(workdir))
  (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
  return config, workdir


@pytest.mark.parametrize(
  "key, value",
  [
    ("optimizer.steps", 7),
    ("seed", 1),
    ("traces.ahead", 3),
    ("objective", "language_model"),
  ],
)
def test_another_experiment_is_refused_by_key(tmp_path, key, value):
  config, workdir = _held(tmp_path)
  workdirs.check(config, str(workdir))
  before = small_runs.contents(workdir)
  old = config.to_dict()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as caught:
    workdirs.check(config, str(workdir))
  line = str(caught.value)
  for part in key.split("."):
    old = old[part]
  assert f"{key} ({old!r} there, {value!r} here)" in line
  assert "another --workdir" in line and "\n" not in line
  assert small_runs.contents(workdir) == before


def test_keys_that_do_not_change_the_numbers_may_differ(tmp_path):
  config, workdir = _held(tmp_path)
  config.checkpoint.every = 5
  config.mesh.fsdp = 2
  config.eval.sequences = 9
  config.optimizer.accumulation = 2
  workdirs.check(config, str(workdir))


def test_workdir_where_nothing_began_is_free(tmp_path):
  config, workdir = _held(tmp_path)
  (workdir / "metrics.jsonl").write_text("")
  config.seed = 1
  workdirs.check(config, str(workdir))


def test_broken_config_json_is_one_line(tmp_path):
  config, workdir = _held(tmp_path)
  (workdir / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json cannot be read"):
    workdirs.check(config, str(workdir))
