"""Heartbeat, watchdog, data retries, profile, a workdir on object storage."""

import json
import subprocess
import sys
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from etils import epath
from fsspec.implementations import memory

from cacheaug.data import opening, pipeline, shards, tokenizers
from cacheaug.errors import UserError
from cacheaug.evals import report
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.run import heartbeat as heartbeats
from cacheaug.run import metrics, profiling
from cacheaug.run import workdir as workdirs


def _read(directory):
  return json.loads((directory / "heartbeat.json").read_text())


def _wait(condition):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_heartbeat_tells_step_state_and_what_is_saved(tmp_path):
  began = time.time()
  beating = heartbeats.Heartbeat(tmp_path, limit=0, every=0.05)
  assert _read(tmp_path)["state"] == "starting"
  beating.start(3)
  assert _read(tmp_path)["saved"] == 3
  with beating:
    beating.beat(4)
    _wait(lambda: _read(tmp_path)["step"] == 4)
    assert _read(tmp_path)["state"] == "training"
    beating.beat(6, "saving")
    beating.saving(6)
    _wait(lambda: _read(tmp_path)["state"] == "saving")
    # The save under way is not known to have ended, only the one before.
    assert _read(tmp_path)["saved"] == 3
    beating.saving(9)
    beating.beat(9)
    _wait(lambda: _read(tmp_path)["step"] == 9)
    found = _read(tmp_path)
    assert found["saved"] == 6 and found["process"] == 0
    # A hung step: written goes on, time stands still.
    _wait(lambda: _read(tmp_path)["written"] > found["written"])
    assert _read(tmp_path)["time"] == found["time"] >= round(began, 3)
  assert _read(tmp_path)["state"] == "reporting"
  assert _read(tmp_path)["saved"] == 9
  beating.enter_phase("finished")
  assert _read(tmp_path)["state"] == "finished"
  assert [p.name for p in tmp_path.iterdir()] == ["heartbeat.json"]


@pytest.mark.parametrize(
  "error, state", [(SystemExit(0), "stopped"), (UserError("x"), "failed")]
)
def test_heartbeat_tells_how_a_run_ended(tmp_path, error, state):
  with pytest.raises(type(error)):
    with heartbeats.Heartbeat(tmp_path, limit=0):
      raise error
  assert _read(tmp_path)["state"] == state


def test_each_process_has_a_file_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(heartbeats.jax, "process_index", lambda: 3)
  heartbeats.Heartbeat(tmp_path, limit=0)
  (path,) = tmp_path.iterdir()
  assert path.name == "heartbeat-3.json"
  assert json.loads(path.read_text())["process"] == 3


def test_steps_within_the_limit_do_not_end_the_run(tmp_path, monkeypatch):
  ended = []
  monkeypatch.setattr(
    heartbeats.Heartbeat,
    "_end_process",
    lambda self, waited: ended.append(waited),
  )
  with heartbeats.Heartbeat(tmp_path, limit=2.0, every=0.02) as beating:
    for step in range(30):
      beating.beat(step)
      time.sleep(0.1)
    assert not ended
    _wait(lambda: ended)  # Control: and then one that is beyond it.


_HUNG = """
import sys, time
from cacheaug.run import files, heartbeat
heartbeat._GRACE = 1.0
beating = heartbeat.Heartbeat(sys.argv[1], limit=0.5, every=0.1)
beating.start(20)
with beating:
  beating.saving(30)
  beating.beat(41)
  if sys.argv[2] == "files":
    files.write_whole = lambda *_: time.sleep(600)
  time.sleep(600)
"""


@pytest.mark.parametrize("what", ["step", "files"])
def test_a_hung_step_ends_the_process_in_one_clear_line(tmp_path, what):
  """Even where the workdir's file system hangs as well."""
  found = subprocess.run(
    [sys.executable, "-c", _HUNG, tmp_path, what],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert found.returncode == 1
  assert "time.sleep" not in found.stdout and 'File "<string>"' in found.stderr
  if what == "files":
    assert "Timeout (0:00:01" in found.stderr
    return
  (line,) = [k for k in found.stderr.splitlines() if k.startswith("error:")]
  assert "step 42 has not finished for" in line
  assert "restart all processes, the run resumes from step 20 or later" in line
  assert _read(tmp_path)["state"] == "failed"


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
  """A run's batches, read from disk record by record."""
  monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
  config = small_runs.get_config(str(tmp_path))
  tokenizer = tokenizers.load("byte")
  return opening.open_batches(config.data, tokenizer, split="train", seed=0)


def _failing(monkeypatch, waits_needed):
  """Reads of packed data fail until so many waits; returns the waits."""
  waits = []
  monkeypatch.setattr(pipeline.time, "sleep", waits.append)
  take = shards.PackedRows.take

  def read(self, rows):
    source = self._source

    class Broken:
      def take(self, rows):
        if len(waits) < waits_needed:
          raise OSError(116, "Stale file handle")
        return source.take(rows)

    self._source = Broken()
    return take(self, rows)

  monkeypatch.setattr(shards.PackedRows, "take", read)
  return waits


def test_a_read_error_is_tried_again(on_disk, monkeypatch, caplog):
  expected = [on_disk.at(i) for i in range(3)]
  waits = _failing(monkeypatch, 2)
  found = on_disk.iterate(retries=2)
  for batch in expected:
    np.testing.assert_array_equal(next(found)["tokens"], batch["tokens"])
  assert waits == [1, 2]
  assert "data.sources.text" in caplog.text and "again in 2 s" in caplog.text


def test_a_lasting_read_error_names_the_source(on_disk, monkeypatch):
  waits = _failing(monkeypatch, 1000)
  with pytest.raises(UserError, match="data.sources.text: .*packed") as caught:
    next(on_disk.iterate(retries=3))
  assert "\n" not in str(caught.value) and "delete this" in str(caught.value)
  assert waits == [1, 2, 4]


class _Bucket(memory.MemoryFileSystem):
  """Object storage in memory: no append, no rename in place."""

  protocol = ("gcs", "gs")
  store, pseudo_dirs = {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gs://"))

  def _open(self, path, mode="rb", **kwargs):
    if mode not in ("rb", "wb"):
      raise ValueError(f"object storage has no mode {mode}")
    return super()._open(path, mode, **kwargs)

  def mv(self, *_, **__):
    raise ValueError("object storage has no rename")


@pytest.fixture
def bucket(monkeypatch):
  """A gs:// directory that etils sees through fsspec."""
  fsspec.register_implementation("gcs", _Bucket, clobber=True)
  _Bucket.store.clear()
  return epath.Path("gs://bucket/some/run")


def test_a_run_directory_on_object_storage(bucket, tmp_path):
  """Everything but the checkpoints, which Orbax writes."""
  config = small_runs.get_config(str(tmp_path))
  workdirs.check(config, str(bucket))
  workdirs.claim(config, str(bucket))
  for directory in (str(bucket), str(tmp_path / "local")):
    for steps, restored in ((range(6), -1), (range(4, 8), 3)):
      with metrics.MetricWriter(directory) as writer:
        writer.truncate_after(restored)
        for step in steps:
          writer.write(step, {"loss": 1 / (step + 3)}, {"step_time": step})
  for name in ("metrics.jsonl", "speed.jsonl"):
    text = (bucket / name).read_text()
    assert text == (tmp_path / "local" / name).read_text()
    assert len(text.splitlines()) == 8
  workdirs.check(config, str(bucket))
  config.seed = 5
  with pytest.raises(UserError, match="seed .0 there, 5 here"):
    workdirs.check(config, str(bucket))

  with heartbeats.Heartbeat(bucket, limit=0) as beating:
    beating.beat(7)
  assert _read(bucket)["step"] == 7
  some, ones = np.arange(4.0)[:, None], np.ones((4, 1), int)
  nll = {"frozen": some, "augmented": some}
  sums = DocumentSums((1,), np.arange(4), ones, ones, nll)
  page = report.write_report(
    str(bucket),
    rows=report.make_rows(sums, seed=0),
    meta={"seed": 0},
    documents={"text": sums},
  )
  assert str(page) == "gs://bucket/some/run/report/report.md"
  assert "Perplexity by position" in page.read_text()
  assert sorted(p.name for p in bucket.iterdir()) == [
    "config.json",
    "heartbeat.json",
    "metrics.jsonl",
    "report",
    "speed.jsonl",
  ]


def test_object_storage_without_its_package_says_what_to_install(monkeypatch):
  def missing(*_, **__):
    raise ImportError("Install gcsfs to access Google Storage")

  monkeypatch.setattr(workdirs, "_has_run", missing)
  config = small_runs.configs.base()
  with pytest.raises(UserError, match=r"pip install 'cacheaug\[gcs\]'"):
    workdirs.check(config, "gs://bucket/run")


@pytest.mark.parametrize("text", ["10", "a:b", "13:10", "0:3", "3:", "1:2:3"])
def test_profile_of_no_steps_is_refused(text):
  with pytest.raises(UserError, match=f"profile='{text}'"):
    profiling.parse_steps(text)


def test_profile_traces_the_steps_asked_for(tmp_path, monkeypatch):
  calls = []
  start, stop = jax.profiler.start_trace, jax.profiler.stop_trace

  def started(directory):
    calls.append(("start", step))
    start(directory)

  def stopped():
    calls.append(("stop", step))
    stop()

  monkeypatch.setattr(jax.profiler, "start_trace", started)
  monkeypatch.setattr(jax.profiler, "stop_trace", stopped)
  x = jnp.ones(3)
  with profiling.Trace(tmp_path, "2:3") as trace:
    for step in range(1, 6):
      trace.before(step)
      x = x + 1
      trace.after(step, x)
  assert calls == [("start", 2), ("stop", 3)]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  # A run that ends within, or resumes behind, leaves no trace running.
  for steps in (range(2, 3), range(4, 6)):
    with profiling.Trace(tmp_path, "2:3") as trace:
      for step in steps:
        trace.before(step)
        trace.after(step, x)
  assert calls[2:] == [("start", 2), ("stop", 2)]


def test_clock_splits_the_step_time(monkeypatch):
  now = [50.0]
  monkeypatch.setattr(profiling.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
  clock = profiling.Clock()
  clock.reset(10)
  for _ in range(4):
    with clock.part("data"):
      now[0] += 1.0
    with clock.part("device"):
      now[0] += 2.0
    now[0] += 0.5
  found = clock.read(14)
  assert found["step_time"] == 3.5
  assert (found["time_data"], found["time_device"]) == (1.0, 2.0)
  assert found["time_checkpoint"] == found["time_log"] == 0.0
  clock.reset(14)
  assert clock.read(15)["time_data"] == 0.0
