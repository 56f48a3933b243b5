"""Publishes where a run is for supervisors, and ends a run that hangs."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import Literal

import jax
from etils import epath

from cacheaug.run import files

RunPhase = Literal[
  "starting",  # restoring, or compiling for the first step
  "training",
  "saving",
  "reporting",  # all steps are taken
  "finished",
  "stopped",  # by SIGTERM, saved
  "failed",
]
RUNNING = ("starting", "training", "saving", "reporting")
EVERY = 5.0  # seconds between two writings of the file
# Seconds beyond the limit after which the watchdog itself counts as hung.
_GRACE = 60.0


class Heartbeat:
  """Publishes where a run is, from a thread, so that the loop never waits.

  `heartbeat.json` in the workdir (`heartbeat-<i>.json` for process i > 0):
  step, state (a RunPhase), time (Unix, when the run reached them),
  written (Unix), pid, process, host, saved (the last step whose checkpoint is
  known to be complete). An old `written` shows a dead process, an old `time` a
  hung one.

  Within `with`, a step that takes longer than `limit` ends the process with
  status 1, after the stacks of all threads and one clear line on stderr.

  Args:
    workdir: of the run; exists.
    limit: seconds a step, with its share of compiling and saving, may take;
      0 for no limit.
    every: seconds between two writings of the file.
  """

  def __init__(
    self,
    workdir: str | epath.Path,
    *,
    limit: float,
    every: float = EVERY,
  ) -> None:
    index = jax.process_index()
    name = f"heartbeat-{index}.json" if index else "heartbeat.json"
    self._path = files.expanded(workdir) / name
    self._limit, self._every = limit, every
    self._fixed = {
      "pid": os.getpid(),
      "process": index,
      "host": socket.gethostname(),
    }
    self._saved, self._saving = 0, 0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat_until_ended, daemon=True)
    self.start(0)

  def start(self, step: int) -> None:
    """Marks the start of the run, or its resumption from `step`."""
    self._saved = self._saving = step
    self.enter_phase("starting", step)

  def __enter__(self) -> "Heartbeat":
    self._thread.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._ended.set()
    self._thread.join()
    if self._limit:
      faulthandler.cancel_dump_traceback_later()
    stopped = kind is not None and issubclass(kind, SystemExit)
    if kind is None or stopped:
      self._saved = self._saving  # Checkpoints are closed within.
      self.enter_phase("stopped" if stopped else "reporting")
    else:
      self.enter_phase("failed")

  def beat(self, step: int, state: RunPhase = "training") -> None:
    """Records that `step` steps are taken; costs a microsecond."""
    # One assignment, so that the thread sees all of it or nothing.
    self._now = (step, state, time.time(), time.monotonic())

  def saving(self, step: int) -> None:
    """Records that a save of `step` has begun; the save before has ended."""
    self._saved, self._saving = self._saving, step

  def enter_phase(self, state: RunPhase, step: int | None = None) -> None:
    """Changes the state and writes the file at once."""
    self.beat(self._now[0] if step is None else step, state)
    self._write()

  def _beat_until_ended(self) -> None:
    written = time.monotonic()
    while not self._ended.wait(min(1.0, self._every)):
      if self._limit:
        # Where this thread hangs as well (a file system, a library that
        # keeps the interpreter's lock), C code ends the process.
        faulthandler.dump_traceback_later(self._limit + _GRACE, exit=True)
        waited = time.monotonic() - self._now[3]
        if waited > self._limit:
          self._end_process(waited)
      if time.monotonic() - written >= self._every:
        self._write()
        written = time.monotonic()

  def _write(self) -> None:
    step, state, reached, _ = self._now
    figures = {
      "step": step,
      "state": state,
      "time": round(reached, 3),
      "written": round(time.time(), 3),
      "saved": self._saved,
      **self._fixed,
    }
    try:
      files.write_whole(self._path, json.dumps(figures).encode())
    except OSError:
      pass  # A full disk is for the next checkpoint to report.

  def _end_process(self, waited: float) -> None:
    faulthandler.dump_traceback(all_threads=True)
    print(
      f"error: step {self._now[0] + 1} has not finished for {waited:.0f} s "
      "(watchdog.seconds): a host is dead or a collective hangs; restart all "
      f"processes, the run resumes from step {self._saved} or later",
      file=sys.stderr,
      flush=True,
    )
    self.beat(self._now[0], "failed")
    self._write()
    os._exit(1)
