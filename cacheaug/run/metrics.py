"""What a run writes while it goes: metrics, speed, and a progress line.

metrics.jsonl holds only what is a function of the config and the step, so
that a killed and resumed run's file equals the uninterrupted one's byte for
byte; wall-clock figures are in speed.jsonl beside it.
"""

import contextlib
import json
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, BinaryIO

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from cacheaug.errors import UserError
from cacheaug.run import files
from cacheaug.run.checksum import batch_checksum

_FILES = ("metrics.jsonl", "speed.jsonl")


def _json_value(value: Any) -> Any:
  """A JSON value that reads back to the same bits: Python's repr of floats."""
  if isinstance(value, (str, bool, int, float)) or value is None:
    return value
  return np.asarray(value).tolist()


def _truncate_file(path: epath.Path, step: int) -> None:
  """Drops lines of later steps, and a last line that a kill tore."""
  if not path.exists():
    return
  kept: list[bytes] = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      record = json.loads(line)
    except ValueError:
      break
    if record["step"] > step:
      break
    # A kill may have torn off just the newline of a whole object.
    kept.append(line.rstrip(b"\n") + b"\n")
  files.write_whole(path, b"".join(kept))


class MetricWriter:
  """Appends to metrics.jsonl, speed.jsonl and TensorBoard; process 0 only.

  On object storage, which cannot append, each line sends its file anew, and
  TensorBoard's files, which hold nothing else, are left out. They are left out
  as well from where they can no longer be written.

  Args:
    workdir: of the run, local or gs://; created if absent.

  Raises:
    UserError: a workdir that cannot be written to. Every method that writes
      raises it.
  """

  def __init__(self, workdir: str | epath.Path) -> None:
    self._workdir = files.expanded(workdir)
    self._active = jax.process_index() == 0
    self._remote = files.is_remote(self._workdir)
    self._files: dict[str, BinaryIO] = {}
    self._texts: dict[str, str] = {}  # of the files on object storage
    self._board: _Board | None = None
    self._draws = not self._remote
    self._purge_step: int | None = None
    if self._active:
      try:
        self._workdir.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
          if not (self._workdir / name).exists():
            (self._workdir / name).write_text("")
          if not self._remote:
            (self._workdir / name).open("a").close()
      except OSError as e:
        raise UserError(
          f"{self._workdir}: cannot be written to ({e.strerror or e}): give "
          "another --workdir"
        ) from e
      if self._remote:
        logging.info("%s: no TensorBoard files on object storage", workdir)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def truncate_after(self, step: int) -> None:
    """Makes the files those of a run that stopped right after `step`.

    Call it before the first `write`, with the step that was restored, or -1
    for a fresh start. A run must write the metrics of all steps up to k
    before it saves checkpoint k: then nothing is missing after a kill.
    """
    if self._active:
      self.close()
      for name in _FILES:
        path = self._workdir / name
        with files.disk_errors(path, f"write {name}"):
          _truncate_file(path, step)
      self._purge_step = step + 1

  def write(
    self,
    step: int,
    metrics: Mapping[str, Any],
    speed: Mapping[str, Any] | None = None,
  ) -> None:
    """Appends one line a file; it has left this process when this returns.

    Args:
      step: steps taken; not below the step of the line before.
      metrics: name -> number or array, on the host; deterministic ones only.
      speed: step_time, tokens_per_second, memory_peak and the like.
    """
    if not self._active:
      return
    self._append("metrics.jsonl", step, metrics)
    if speed is not None:
      self._append("speed.jsonl", step, speed)
    if self._draws:
      self._draw(step, {**metrics, **(speed or {})})

  def close(self) -> None:
    """Closes the files; another `write` reopens them."""
    for file in self._files.values():
      file.close()
    self._files, self._texts = {}, {}
    if self._board is not None:
      board, self._board = self._board, None
      with self._board_errors():
        board.close()

  def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
    record = {"step": step, **{k: _json_value(v) for k, v in values.items()}}
    line, path = json.dumps(record) + "\n", self._workdir / name
    with files.disk_errors(path, f"write {name}"):
      if self._remote:
        if name not in self._texts:
          self._texts[name] = path.read_text()
        self._texts[name] += line
        files.write_whole(path, self._texts[name].encode())
        return
      if name not in self._files:
        # Unbuffered: a kill loses no whole line, and what a full disk did not
        # take is not tried again when the file is closed.
        self._files[name] = open(path, "ab", buffering=0)
      rest = memoryview(line.encode())
      while rest:
        rest = rest[self._files[name].write(rest) :]

  def _draw(self, step: int, values: Mapping[str, Any]) -> None:
    with self._board_errors():
      if self._board is None:
        self._board = _Board(self._workdir / "tensorboard", self._purge_step)
      for name, value in values.items():
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "biuf":
          continue
        if numbers.ndim == 0:
          self._board.add(name, numbers.item(), step)
        else:
          for i, number in enumerate(numbers.ravel().tolist(), start=1):
            self._board.add(f"{name}/{i}", number, step)

  @contextlib.contextmanager
  def _board_errors(self) -> Iterator[None]:
    """TensorBoard's files repeat metrics.jsonl: no run ends for them."""
    try:
      yield
    except OSError as e:
      board, self._board, self._draws = self._board, None, False
      if board is not None:
        with contextlib.suppress(OSError):
          board.close()
      logging.warning(
        "%s/tensorboard cannot be written (%s): left out from here on",
        self._workdir,
        e.strerror or e,
      )


class _Board:
  """TensorBoard's event file, written by the caller itself.

  tensorboardX's SummaryWriter writes in a thread, and once that has died of a
  full disk the next scalar waits for ever (lanpa/tensorboardX#532).

  Args:
    directory: created if absent.
    purge_step: TensorBoard forgets what was drawn from this step on.
  """

  _FLUSH = 120.0  # seconds between two times that the disk is waited for

  def __init__(self, directory: epath.Path, purge_step: int | None) -> None:
    # Imported here: it takes half a second that most commands do not need.
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    self._event, self._scalar = event_pb2.Event, summary.scalar
    self._file = record_writer.RecordWriter(str(directory / name))
    self._flushed = time.monotonic()
    self._write(file_version="brain.Event:2")
    if purge_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(step=purge_step, file_version="brain.Event:2")
      self._write(step=purge_step, session_log=start)

  def _write(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._file.write(event.SerializeToString())

  def add(self, name: str, value: float, step: int) -> None:
    """One number; OSError: no space."""
    self._write(step=step, summary=self._scalar(name, value))
    if time.monotonic() - self._flushed > self._FLUSH:
      self._flushed = time.monotonic()
      self._file.flush()

  def close(self) -> None:
    """Ends the file; OSError: no space."""
    self._file.close()


class Progress:
  """How far a loop is, how fast, and how long it still takes.

  A bar on a terminal; elsewhere a plain line at most every ten seconds. Only
  process 0 shows anything.

  Args:
    total: steps of the whole run.
    start: steps already taken; they do not count for the rate.
    description: a word or two in front.
    stream: stderr by default.
    interval: seconds between plain lines.
  """

  def __init__(
    self,
    total: int,
    start: int,
    description: str,
    *,
    stream: IO[str] | None = None,
    interval: float = 10.0,
  ) -> None:
    self._total, self._start, self._step = total, start, start
    self._description = description
    self._stream = sys.stderr if stream is None else stream
    self._interval = interval
    self._active = jax.process_index() == 0
    self._began = self._shown = time.monotonic()
    self._bar: Any = None
    if self._active and self._stream.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=total,
        initial=start,
        desc=description,
        file=self._stream,
        dynamic_ncols=True,
      )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def update(self, step: int, **shown: float | str) -> None:
    """`step` steps are done; `shown` are figures to put beside."""
    previous, self._step = self._step, step
    if not self._active:
      return
    texts = {
      k: v if isinstance(v, str) else f"{v:.4g}" for k, v in shown.items()
    }
    if self._bar is not None:
      if texts:
        self._bar.set_postfix(texts, refresh=False)
      self._bar.update(step - previous)
      return
    now = time.monotonic()
    if now - self._shown < self._interval and step < self._total:
      return
    self._shown = now
    try:
      print(self._line(now, texts), file=self._stream, flush=True)
    except OSError:
      self._active = False  # nobody reads it any more: no reason to stop

  def _line(self, now: float, texts: Mapping[str, str]) -> str:
    rate = (self._step - self._start) / max(now - self._began, 1e-9)
    parts = [f"{self._description} {self._step}/{self._total}"]
    if rate > 0.0:
      left = int((self._total - self._step) / rate)
      hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
      parts.append(f"{rate:.3g} steps/s")
      parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left")
    parts += [f"{k} {v}" for k, v in texts.items()]
    return ", ".join(parts)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()


def memory_peak() -> int:
  """Peak bytes on this process's fullest device.

  Where the backend does not count them (CPU), this process's peak resident
  size.
  """
  stats = [d.memory_stats() for d in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s]
  if peaks:
    return max(peaks)
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts kibibytes, macOS bytes.
  return resident if sys.platform == "darwin" else resident * 1024


def log_step(
  config: ConfigDict,
  writer: MetricWriter,
  floor: float | None,
  step: int,
  metrics: Mapping[str, Any],
  baseline: tuple[jax.Array, jax.Array] | None,
  batch: Mapping[str, jax.Array],
  times: Mapping[str, float],
) -> dict[str, float]:
  """Writes one line of metrics; returns what the progress line shows.

  Args:
    config: of the run.
    writer: of the line.
    floor: seconds that the devices' peak would need, where it is known.
    step: steps taken.
    metrics: of make_step.
    baseline: the frozen decoder's sums over this step's tokens, where there
      is one.
    batch: this step's, [B, S] each.
    times: of profiling.Clock.
  """
  metrics, baseline = jax.device_get((metrics, baseline))
  running = metrics["running"]

  def mean(sums):
    return float(sums[0].sum() / max(sums[1].sum(), 1.0))

  line = {
    "loss": mean(running),  # mean since the last line
    "nll": running[0] / np.maximum(running[1], 1.0),
    "gradient_norm": float(metrics["gradient_norm"]),
    "parameter_norm": float(metrics["parameter_norm"]),
    "batch_loss": mean(metrics["batch"]),  # this step's tokens
  }
  for name, sums in metrics["terms"].items():
    line[f"{name}_loss"] = mean(sums)  # of this step, unweighted
  seconds, (rows, length) = times["step_time"], batch["tokens"].shape
  speed = {
    **times,
    "tokens_per_second": rows * length / seconds,
    "memory_peak": memory_peak(),
    "batch": batch_checksum(batch),  # the same on any number of devices
  }
  if floor:
    speed["mfu"] = floor / seconds
  shown = {"loss": line["loss"]}
  if baseline is not None:
    line["baseline_loss"] = mean(baseline)  # frozen decoder, the same tokens
    shown["against_frozen"] = line["batch_loss"] - line["baseline_loss"]
  if config.objective == "coprocessor":
    speed["traces_per_second"] = rows * config.traces.count / seconds
  writer.write(step, line, speed)
  return shown


def check_finite(step: int, metrics: dict[str, Any]) -> None:
  """Stops the run at a number that is not finite; nothing is overwritten.

  The new parameters are looked at too: the loss of their own step may still
  be finite, and a checkpoint of them would be beyond use.

  Raises:
    UserError: naming the number, the step and its batch.
  """
  for name in ("loss", "gradient_norm", "parameter_norm"):
    if not np.isfinite(metrics[name]):
      raise UserError(
        f"{name} is {metrics[name]} at step {step} (batch {step - 1} of the "
        "data): stopped, the last checkpoint is kept; start anew in another "
        "--workdir with a lower optimizer.learning_rate or a longer "
        "optimizer.warmup"
      )
