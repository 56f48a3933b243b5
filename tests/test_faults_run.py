"""Faults of runs that users of neighbouring projects reported, and their kind.

Each test fails without what it is about.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from ml_collections import ConfigDict

from cacheaug import train
from cacheaug.errors import UserError
from cacheaug.run import checkpoint, command, files, heartbeat, lock, metrics
from cacheaug.run import workdir as workdirs

_FULL = Path("/dev/full")  # every write to it fails as on a full disk
_NEEDS_FULL = pytest.mark.skipif(
  not _FULL.exists(), reason="needs /dev/full, which Linux has"
)
_STATE = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3))}}


def _line(caught):
  text = str(caught.value)
  assert "\n" not in text
  return text


def _abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _STATE,
  )


# --- the disk is full -------------------------------------------------------


@_NEEDS_FULL
@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl"])
def test_a_full_disk_ends_the_metrics_in_one_line(tmp_path, name):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.truncate_after(-1)
    writer.write(1, {"loss": 1.0}, {"step_time": 1.0})
    writer.close()
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(_FULL)
    with pytest.raises(UserError) as caught:
      writer.write(2, {"loss": 1.0}, {"step_time": 1.0})
  # And closing does not try again: the line above would be lost.
  assert f"{name}: no space left to write {name}" in _line(caught)


@_NEEDS_FULL
def test_tensorboard_on_a_full_disk_does_not_hold_the_loop(
  tmp_path, monkeypatch, caplog
):
  from tensorboardX import record_writer

  monkeypatch.setattr(record_writer, "open_file", lambda _: _FULL.open("wb"))
  with metrics.MetricWriter(tmp_path) as writer:
    for step in range(200):  # more than any queue holds
      writer.write(step, {"loss": 1.0, "nll": np.ones(4)})
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200
  lines = [r for r in caplog.messages if "left out from here on" in r]
  assert len(lines) == 1 and "No space left" in lines[0]


def test_tensorboard_reads_what_is_drawn(tmp_path):
  """The events are those of tensorboardX's own writer."""
  from tensorboardX.proto import event_pb2

  with metrics.MetricWriter(tmp_path) as writer:
    writer.truncate_after(4)
    writer.write(5, {"loss": 0.5, "nll": np.array([1.0, 2.0])})
  (path,) = (tmp_path / "tensorboard").iterdir()
  data, events = path.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  found = [
    (e.step, v.tag, v.simple_value) for e in events for v in e.summary.value
  ]
  assert found == [(5, "loss", 0.5), (5, "nll/1", 1.0), (5, "nll/2", 2.0)]
  assert events[0].file_version == "brain.Event:2"
  assert [e.session_log.status for e in events if e.step == 5][1] == 1


@pytest.fixture
def small_disk(tmp_path):
  """A function that mounts a disk of so many bytes."""
  place = tmp_path / "disk"
  place.mkdir()

  def mount(size):
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    if subprocess.run(command, capture_output=True).returncode:
      pytest.skip("needs the right to mount a disk")
    return place

  yield mount
  subprocess.run(["umount", place], capture_output=True)


def test_a_run_on_a_full_disk_ends_in_one_line(small_disk, tmp_path):
  """Whichever file is the first that has no room."""
  config = small_runs.get_config(str(tmp_path / "d"))
  config.log_every, config.checkpoint.every = 1, 100_000
  config.optimizer.steps = 1000
  with pytest.raises(UserError) as caught:
    train.train(config, str(small_disk(120_000) / "run"))
  assert "no space left" in _line(caught)


def test_a_full_disk_while_packing_is_one_line(small_disk, tmp_path):
  from cacheaug.data import opening, tokenizers

  config = small_runs.get_config(str(tmp_path / "d"))
  config.data.cache_dir = str(small_disk(8192))
  with pytest.raises(UserError) as caught:
    opening.open_batches(
      config.data, tokenizers.load("byte"), split="train", seed=0
    )
  assert "data.cache_dir" in _line(caught)


def test_what_a_failed_write_leaves(tmp_path, monkeypatch):
  """Nothing but what was there before."""
  path = tmp_path / "config.json"
  files.write_whole(path, b"before")

  def fail(file):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError):
    files.write_whole(path, fail)
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
  assert path.read_bytes() == b"before"


def test_any_command_on_a_full_disk_ends_in_one_line(monkeypatch, capsys):
  def full():
    raise OSError(28, "No space left on device", "out.json")

  monkeypatch.setattr(sys, "argv", ["command"])
  for module in ("parse", "_plain_logs", "_keep_compiled"):
    monkeypatch.setattr(command, module, lambda *_: None)
  with pytest.raises(SystemExit) as caught:
    command.run(full, "")
  assert caught.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: no space left") and "out.json" in line


def test_a_progress_line_that_nobody_takes_ends_no_run():
  class Shut:
    def isatty(self):
      return False

    def write(self, _):
      raise BrokenPipeError

  progress = metrics.Progress(2, 0, "train", stream=Shut(), interval=0.0)
  progress.update(1)
  progress.update(2)


# --- paths ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x[1]", "lr=[1e-4] a", "*", "a?b", "[!a]"])
def test_a_checkpoint_is_read_again_from_any_path(tmp_path, name):
  directory = tmp_path / name / "checkpoints"
  with checkpoint.Checkpoints(directory, 2, 1) as kept:
    kept.save(1, _STATE, {"seed": 3})
  state, meta, step = checkpoint.Checkpoints(directory, 2, 1).restore_latest(
    _abstract()
  )
  assert (meta, step) == ({"seed": 3}, 1)
  np.testing.assert_array_equal(state["a"], _STATE["a"])
  flat, _, _ = checkpoint.read_params(directory) or ({}, 0, 0)
  assert flat == {}  # it holds no 'params/', but could be opened


def test_a_checkpoint_that_nobody_could_read_is_refused(tmp_path, monkeypatch):
  """As when its parts are not merged, for whatever reason."""
  patched = []

  async def nothing(*_, **__):
    pass

  for module in list(sys.modules.values()):
    if hasattr(module, "merge_ocdbt_per_process_files"):
      monkeypatch.setattr(module, "merge_ocdbt_per_process_files", nothing)
      patched.append(module)
  assert patched
  kept = checkpoint.Checkpoints(tmp_path / "c", 2, 1)
  with pytest.raises(UserError, match="were not put together"):
    kept.save(1, _STATE, {})
    kept.wait()


def test_a_damaged_checkpoint_is_one_line(tmp_path, caplog, capfd):
  directory = tmp_path / "checkpoints"
  state = {f"a{i}": jnp.arange(600.0) + i for i in range(12)}
  with checkpoint.Checkpoints(directory, 2, 1) as kept:
    kept.save(1, state, {})
  parts = directory / "1" / "state" / "ocdbt.process_0"
  for path in parts.rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      half = path.stat().st_size // 2
      path.write_bytes(path.read_bytes()[:half] + bytes(half))
  # Damage that the list of files does not see, as in files over a MiB.
  listed = json.loads((directory / "1" / "files.json").read_text())
  for item, names in listed.items():
    for name in names:
      data = (directory / "1" / item / name).read_bytes()
      names[name] = [len(data), zlib.crc32(data)]
  (directory / "1" / "files.json").write_text(json.dumps(listed))
  seen = []
  previous, sys.unraisablehook = sys.unraisablehook, seen.append
  try:
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    kept = checkpoint.Checkpoints(directory, 2, 1)
    assert kept.restore_latest(abstract) is None
    time.sleep(0.3)  # reads that were under way
    shown = list(seen)
    # Later reads end here, not in the test that comes next.
    for _ in range(10):
      gc.collect()
      time.sleep(0.1)
  finally:
    sys.unraisablehook = previous
  assert not shown and "Event loop" not in capfd.readouterr().err
  assert "moved to 1.unreadable-1" in caplog.text


def test_a_tilde_is_the_home_directory_everywhere(tmp_path, monkeypatch):
  from cacheaug.weights import trained

  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for path in (files.absolute("~/a"), files.expanded("~/a")):
    assert str(path) == f"{tmp_path}/a"
  config = small_runs.get_config(str(tmp_path / "d"))
  workdirs.check(config, "~/a")
  workdirs.claim(config, "~/a")
  with metrics.MetricWriter("~/a") as writer:
    writer.write(1, {"loss": 1.0})
  heartbeat.Heartbeat("~/a", limit=0)
  with checkpoint.Checkpoints("~/a/checkpoints", 1, 1) as kept:
    kept.save(1, {"params": _STATE}, {"decoder": ""})
  assert {p.name for p in (tmp_path / "a").iterdir()} == {
    "checkpoints",
    "config.json",
    "heartbeat.json",
    "metrics.jsonl",
    "speed.jsonl",
    "tensorboard",
  }
  assert trained.read_run("~/a").step == 1
  with files.staged("~/export") as local:
    assert local == tmp_path / "export"
  assert not (tmp_path / "~").exists()
  with pytest.raises(UserError, match="no such home directory"):
    files.absolute("~nobody_of_this_name/a")


# --- one trainer at a time --------------------------------------------------

_HOLD = """
import sys
from cacheaug.run.lock import Lock
with Lock(sys.argv[1]) as lock:
  lock.acquire()
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_trainer_is_told_and_changes_nothing(tmp_path):
  workdir = tmp_path / "run"
  config = small_runs.get_config(str(tmp_path / "d"))
  workdirs.claim(config, str(workdir))
  first = subprocess.Popen(
    [sys.executable, "-c", _HOLD, workdir],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert first.stdout.readline() == "held\n"
  beat = {"state": "training", "pid": first.pid, "host": "here", "written": 0}
  (workdir / "heartbeat.json").write_text(json.dumps(beat))
  before = small_runs.contents(workdir)
  with pytest.raises(UserError) as caught:
    train.train(config, str(workdir))
  assert "another trainer is at work there" in _line(caught)
  assert f"pid {first.pid} on here" in _line(caught)
  assert small_runs.contents(workdir) == before
  first.kill()  # whatever way it ends, the directory is free
  first.communicate()
  with lock.Lock(workdir) as free:
    free.acquire()
  with lock.Lock(workdir) as again:
    again.acquire()


@pytest.mark.parametrize("beats", [True, False])
def test_a_trainer_on_another_host_is_known_by_its_heartbeat(
  tmp_path, monkeypatch, beats
):
  """Where no lock reaches: another host, object storage."""
  path = tmp_path / "heartbeat.json"
  beat = {"state": "training", "pid": 7, "host": "far", "written": time.time()}
  path.write_text(json.dumps(beat))
  waits = []

  def sleep(seconds):
    waits.append(seconds)
    if beats and len(waits) == 2:
      path.write_text(json.dumps(beat | {"written": time.time() + 5}))

  clock = iter(range(1000))
  monkeypatch.setattr(lock.time, "sleep", sleep)
  monkeypatch.setattr(lock.time, "monotonic", lambda: next(clock))
  with lock.Lock(tmp_path) as taken:
    if beats:
      with pytest.raises(UserError, match="pid 7 on far"):
        taken.acquire()
    else:
      taken.acquire()
  assert waits
  # One that ended, or is long dead, is not waited for.
  for gone in ({"state": "finished"}, {"written": time.time() - 3600}):
    path.write_text(json.dumps(beat | gone))
    count = len(waits)
    with lock.Lock(tmp_path) as taken:
      taken.acquire()
    assert len(waits) == count


def test_claiming_clears_away_what_a_killed_writer_left(tmp_path):
  (tmp_path / f"{files.TEMPORARY}abc").write_text("half")
  config = small_runs.get_config(str(tmp_path / "d"))
  with lock.Lock(tmp_path) as held:
    workdirs.claim(config, str(tmp_path), held)
  assert {p.name for p in tmp_path.iterdir()} == {"config.json", "d"}


# --- a config of another version, and more steps ----------------------------


def _begun(tmp_path, **changes):
  """A directory that a run has begun in, its config, and where that is."""
  config = small_runs.get_config(str(tmp_path / "d"))
  config.update_from_flattened_dict(changes)
  workdirs.claim(config, str(tmp_path))
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  return config, tmp_path / "config.json"


def _edit(path, change):
  saved = json.loads(path.read_text())
  change(saved)
  path.write_text(json.dumps(saved))


def test_a_key_that_came_later_counts_as_it_was_before(tmp_path):
  config, path = _begun(tmp_path)

  def older(saved):
    del saved["traces"]["stride"], saved["traces"]["rounds"], saved["watchdog"]
    del saved["data"]["sources"]["text"]["answer_field"]

  _edit(path, older)
  workdirs.check(config, str(tmp_path))
  config.traces.rounds = 2
  with pytest.raises(UserError, match="traces.rounds .1 there, 2 here"):
    workdirs.check(config, str(tmp_path))


def test_words_for_a_person_may_change_between_versions(tmp_path):
  config, path = _begun(tmp_path)
  _edit(path, lambda saved: saved["decoder"].update(how_to_get="by post"))
  workdirs.check(config, str(tmp_path))


def test_a_key_that_was_renamed_or_dropped_is_understood(tmp_path, monkeypatch):
  config, path = _begun(tmp_path)
  monkeypatch.setattr(workdirs, "RENAMED", {"traces.law": "traces.min_ahead"})
  monkeypatch.setattr(workdirs, "DROPPED", {"traces.old": 3})

  def older(saved):
    saved["traces"]["law"] = saved["traces"].pop("min_ahead")
    saved["traces"]["old"] = 3

  base = workdirs.configs.base()
  del base.traces["law"]
  monkeypatch.setattr(workdirs.configs, "base", lambda: base)
  config = ConfigDict(config)
  del config.traces["law"]
  _edit(path, older)
  workdirs.check(config, str(tmp_path))
  _edit(path, lambda saved: saved["traces"].update(old=4))
  with pytest.raises(UserError, match="traces.old .4 there, 'absent' here"):
    workdirs.check(config, str(tmp_path))


def test_a_config_that_is_none_is_one_line(tmp_path):
  config, path = _begun(tmp_path)
  for text in ("[1]", "{}", '{"decoder": 1, "data": 2, "coprocessor": 3}'):
    path.write_text(text)
    with pytest.raises(UserError, match="config.json cannot be read"):
      workdirs.check(config, str(tmp_path))
    with pytest.raises(UserError, match="not a run's config"):
      workdirs.read_config(tmp_path)


def test_a_constant_schedule_can_be_given_more_steps(tmp_path):
  schedule = {"optimizer.schedule": "constant", "optimizer.steps": 6}
  config, _ = _begun(tmp_path, **schedule)
  config.optimizer.steps = 9
  workdirs.check(config, str(tmp_path))
  config.optimizer.steps = 5
  with pytest.raises(UserError, match="optimizer.steps .6 there, 5 here"):
    workdirs.check(config, str(tmp_path))
  config.optimizer.steps, config.seed = 9, 4  # and nothing else may differ
  with pytest.raises(UserError, match="seed"):
    workdirs.check(config, str(tmp_path))


def test_a_falling_schedule_names_the_way_to_go_on(tmp_path):
  config, _ = _begun(tmp_path)
  config.optimizer.steps = 60
  with pytest.raises(UserError, match="coprocessor.init=DIR"):
    workdirs.check(config, str(tmp_path))


# --- nobody reads the output ------------------------------------------------

_PRINTS = """
from cacheaug.run import command
def main():
  for i in range(100_000):
    print(i)
command.run(main, "Counts.")
"""


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_a_pipe_that_is_shut_ends_quietly(flags):
  process = subprocess.Popen(
    [sys.executable, "-c", _PRINTS, *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
  )
  process.stdout.readline()
  process.stdout.close()
  with process.stderr:
    assert process.stderr.read() == b""
  assert process.wait() in (0, 128 + signal.SIGPIPE)
