"""Sweeps: what a file means, and that no run is lost, doubled or mixed up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import compiling
import pytest
import small_sweep

from cacheaug.errors import UserError
from cacheaug.projects.sweep import plan, rows, runner


def _go(tmp_path, runs, command, *, workers=1):
  directory = tmp_path / "sweep"
  ended = []
  with runner.alone(directory) as lock:
    outcomes = runner.run_all(
      runs,
      directory,
      workers=workers,
      lock=lock,
      ended=ended.append,
      command=command,
    )
  assert ended == outcomes
  return {o.run.name: o.error for o in outcomes}


def _refusal(call, *arguments, **keywords) -> str:
  with pytest.raises(UserError) as caught:
    call(*arguments, **keywords)
  line = str(caught.value)
  assert "\n" not in line
  return line


def _build_refusal(tmp_path, *lines, given=None, **keywords) -> str:
  def build():
    file = small_sweep.write(tmp_path, *lines, **keywords)
    rows.build(rows.load(file), file, given or {})

  return _refusal(build)


# --- what a file means -------------------------------------------------------


def test_a_row_is_the_base_with_its_keys_and_the_command_lines(tmp_path):
  file = small_sweep.write(tmp_path)
  runs = small_sweep.runs(file, tmp_path / "sweep", **{"optimizer.steps": 8})
  # First seeds first, so that a sweep cut short has something of every row.
  assert [run.name for run in runs] == ["N1-seed0", "N2-seed0", "N1-seed1"]
  assert [run.config.coprocessor.latents for run in runs] == [1, 2, 1]
  assert [run.config.seed for run in runs] == [0, 0, 1]
  for run in runs:
    assert run.config.optimizer.steps == 8
    # What is checked here is what the run itself will make of its flags.
    *flags, workdir = run.flags
    assert workdir == f"--workdir={run.workdir}"
    assert rows.parse(flags).to_dict() == run.config.to_dict()


def test_steps_for_the_same_flop(tmp_path):
  file = small_sweep.write(
    tmp_path,
    'Row("N4", {"coprocessor.latents": 4, "optimizer.steps": 50})',
    'Row("model", {"objective": "language_model"}, flop_of="N4")',
  )
  latents, model = rows.build(rows.load(file), file, {})
  assert model.config.optimizer.steps > 50
  assert model.flop == pytest.approx(latents.flop, rel=0.01)
  assert f"--config.optimizer.steps={model.config.optimizer.steps}" in (
    model.flags
  )
  # Alone, it still knows the row that it takes its FLOP from.
  (alone,) = rows.build(rows.load(file), file, {}, pattern="model")
  assert alone.config.optimizer.steps == model.config.optimizer.steps


def test_only_finds_rows_and_seeds(tmp_path):
  sweep = rows.load(small_sweep.write(tmp_path))
  found = rows.only(sweep, "N1-seed1|N2")
  assert [(row.name, row.seeds) for row in found.rows] == [
    ("N1", (1,)),
    ("N2", (0,)),
  ]
  line = _refusal(rows.only, sweep, "N3")
  assert line == "--only='N3' finds none of the rows N1, N2"
  assert "no regular expression" in _refusal(rows.only, sweep, "(")


def test_a_bad_row_is_named_before_anything_runs(tmp_path):
  good = small_sweep.ROWS[0]
  line = _build_refusal(tmp_path, good, 'Row("b", {"coprocessor.latnets": 1})')
  assert "row b: unknown key --config.coprocessor.latnets" in line
  assert "coprocessor.latents" in line.partition("did you mean")[2]
  line = _build_refusal(tmp_path, good, 'Row("b", {"coprocessor.latents": 0})')
  assert "row b: coprocessor.latents=0 must be at least 1" in line
  line = _build_refusal(tmp_path, good, 'Row("b", {"eval.sequences": 3})')
  assert "row b has eval.sequences=3, row N1 4" in line
  line = _build_refusal(tmp_path, given={"coprocessor.latents": 3})
  assert "--config.coprocessor.latents=3 cannot be given" in line
  line = _build_refusal(tmp_path, given={"seed": 3})
  assert "--config.seed=3 cannot be given" in line


def test_names_must_make_different_directories(tmp_path):
  line = _build_refusal(tmp_path, *small_sweep.ROWS[:1] * 2)
  assert "N1 comes twice" in line
  assert "a-seed0 comes twice" in _build_refusal(
    tmp_path, 'Row("a", {}, (0, 0))'
  )
  assert "row 'a/b': a name is" in _build_refusal(tmp_path, 'Row("a/b")')
  assert "has no seeds" in _build_refusal(tmp_path, 'Row("a", {}, ())')
  assert "overrides seed" in _build_refusal(tmp_path, 'Row("a", {"seed": 1})')
  line = _build_refusal(tmp_path, 'Row("a")', 'Row("b", flop_of="c")')
  assert "flop_of='c' is no row" in line
  line = _build_refusal(tmp_path, 'Row("pauses")', reference="pause")
  assert "reference='pause' is no row; did you mean pauses?" in line
  line = _build_refusal(tmp_path, 'Row("a")', axis="coprocessor.latent")
  assert "did you mean coprocessor.latents" in line
  line = _build_refusal(tmp_path, 'Row("a", {"export": "/nowhere"}, (0, 1))')
  assert "its 2 seeds would write to one export" in line


def test_a_plain_config_is_no_sweep():
  line = _refusal(rows.load, "configs/quickstart.py")
  assert "has no get_sweep()" in line


def test_plan_shows_rows_costs_and_commands(tmp_path):
  file = small_sweep.write(tmp_path)
  built = rows.build(rows.load(file), file, {})
  runs = rows.runs_of(built, tmp_path / "sweep")
  table = plan.table(built, runs).splitlines()
  assert [line.split()[0] for line in table] == ["row", "N1", "N2"]
  assert table[1].endswith("coprocessor.latents=1")
  assert f"{built[0].trained:,}" in table[1]
  # One soft token of width 16 is all that N changes.
  assert built[1].trained - built[0].trained == 16
  commands = plan.commands(runs).splitlines()
  assert len(commands) == 3
  assert commands[0].startswith("python -m cacheaug.main --config=")


# --- runs --------------------------------------------------------------------


def test_finished_runs_are_skipped_and_failures_leave_the_others(tmp_path):
  runs = small_sweep.runs(small_sweep.write(tmp_path), tmp_path / "sweep")
  command = small_sweep.stub(tmp_path, runs, N2_seed0="fail")
  assert _go(tmp_path, runs, command) == {
    "N1-seed0": "",
    "N2-seed0": "no room in here",
    "N1-seed1": "",
  }
  log = (tmp_path / "sweep" / "logs" / "N2-seed0.txt").read_text()
  assert log.startswith("$ ") and "loading" in log
  # Again: only what failed, and it may succeed now.
  command = small_sweep.stub(tmp_path, runs, N2_seed0="finish")
  assert _go(tmp_path, runs, command) == {"N2-seed0": ""}
  assert _go(tmp_path, runs, command) == {}
  assert small_sweep.started(tmp_path) == [
    "N1-seed0",
    "N2-seed0",
    "N1-seed1",
    "N2-seed0",
  ]


def test_other_eval_keys_make_a_finished_run_report_again(tmp_path):
  file = small_sweep.write(tmp_path)
  runs = small_sweep.runs(file, tmp_path / "sweep")
  _go(tmp_path, runs, small_sweep.stub(tmp_path, runs))
  assert all(runner.finished(run) for run in runs)
  others = small_sweep.runs(file, tmp_path / "sweep", **{"eval.sequences": 5})
  assert not any(runner.finished(run) for run in others)


def test_a_run_that_ends_early_is_not_finished(tmp_path):
  runs = small_sweep.runs(small_sweep.write(tmp_path), tmp_path / "sweep")[:1]
  command = small_sweep.stub(tmp_path, runs, N1_seed0="wait")

  def end_it():
    _wait_for(tmp_path / "stub" / "waiting")
    text = (tmp_path / "sweep" / runner.LOCK).read_text()
    os.kill(int(text.rpartition(" ")[2]), signal.SIGTERM)

  thread = threading.Thread(target=end_it)
  thread.start()
  outcome = _go(tmp_path, runs, command)
  thread.join()
  assert outcome["N1-seed0"].startswith("ended before its last step")


def _wait_for(path):
  for _ in range(600):
    if path.exists():
      return
    time.sleep(0.05)
  raise AssertionError(f"{path} has not come")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_sweep_goes_on_later(tmp_path, number):
  runs = small_sweep.runs(small_sweep.write(tmp_path), tmp_path / "sweep")
  command = small_sweep.stub(tmp_path, runs, N1_seed0="wait")

  def interrupt():
    _wait_for(tmp_path / "stub" / "waiting")
    os.kill(os.getpid(), number)

  before = signal.getsignal(number)
  thread = threading.Thread(target=interrupt)
  thread.start()
  with pytest.raises(runner.Stopped) as caught:
    _go(tmp_path, runs, command)
  thread.join()
  assert caught.value.number == number
  assert signal.getsignal(number) is before
  assert (tmp_path / "sweep" / "N1-seed0" / "saved").exists()
  assert small_sweep.started(tmp_path) == ["N1-seed0"]  # and nothing after it
  assert set(_go(tmp_path, runs, command).values()) == {""}


def test_two_sweeps_in_a_directory_are_refused(tmp_path):
  with runner.alone(tmp_path):
    with pytest.raises(UserError, match="a sweep is at work there"):
      with runner.alone(tmp_path):
        pass
  with runner.alone(tmp_path):  # Control: freed.
    pass


@pytest.mark.skipif(
  not hasattr(os, "sched_setaffinity"), reason="needs Linux's core affinity"
)
def test_workers_share_the_cores(tmp_path):
  cores = sorted(os.sched_getaffinity(0))
  runs = small_sweep.runs(small_sweep.write(tmp_path), tmp_path / "sweep")[:2]
  command = small_sweep.stub(tmp_path, runs, N1_seed0="cores", N2_seed0="cores")
  _go(tmp_path, runs, command, workers=2)
  found = [json.loads((run.workdir / "cores").read_text()) for run in runs]
  if len(cores) > 1:
    assert sorted(found[0] + found[1]) == cores
  else:
    assert found == [cores, cores]


def test_a_changed_row_is_refused_naming_the_key(tmp_path):
  file = small_sweep.write(tmp_path)
  run = small_sweep.runs(file, tmp_path / "sweep")[0]
  run.workdir.mkdir(parents=True)
  (run.workdir / "config.json").write_text(run.config.to_json())
  (run.workdir / "metrics.jsonl").write_text('{"step": 2}\n')
  small_sweep.runs(file, tmp_path / "sweep")  # Control: the same.
  line = _refusal(
    small_sweep.runs, file, tmp_path / "sweep", **{"traces.ahead": 3}
  )
  assert "N1-seed0 holds another experiment" in line
  assert "traces.ahead (4 there, 3 here)" in line


# --- the command -------------------------------------------------------------


def _command(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", "cacheaug.sweep", *arguments],
    cwd=Path(__file__).resolve().parent.parent,
    env=os.environ | {"XLA_FLAGS": compiling.FLAGS},
    capture_output=True,
    text=True,
    timeout=280,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_trains_reports_and_goes_on(tmp_path):
  file = small_sweep.write(
    tmp_path,
    'Row("good", {"optimizer.steps": 3})',
    f'Row("bad", {{"data.sources.text.path": "{tmp_path}/missing.txt"}})',
  )
  arguments = f"--config={file}", f"--workdir={tmp_path / 'sweep'}"
  status, out, err = _command(*arguments, "--workers=2")
  assert status == 1
  (line,) = err.splitlines()
  assert line.startswith("error: 1 of 2 runs failed: bad-seed0: ")
  assert "missing.txt" in line
  assert "good-seed0 finished after" in out
  page = (tmp_path / "sweep" / "report" / "comparison.md").read_text()
  assert "| good | 1 |" in page
  assert page.endswith("## Not finished\n\nbad-seed0\n")

  status, out, err = _command(*arguments, "--only=good")
  assert (status, err) == (0, "")
  assert "1 of 1 are finished already" in out
