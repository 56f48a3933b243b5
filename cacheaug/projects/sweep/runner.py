"""Runs side by side in processes of their own, until all have ended."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from cacheaug.errors import UserError
from cacheaug.projects.sweep.rows import Run
from cacheaug.run.workdir import read_config

COMMAND = (sys.executable, "-m", "cacheaug.main")
# In the sweep's directory, beside its runs' own.
LOGS, LOCK = "logs", "sweep.lock"
_POLL = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How one run's process ended; `error` is its last line, '' if it is done."""

  run: Run
  seconds: float
  error: str


class Stopped(Exception):  # noqa: N818
  """A signal has ended the sweep; what ran has saved."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


def finished(run: Run) -> bool:
  """Whether the run's directory holds its last step and its report.

  A run that finished with other eval keys has to report again.
  """
  try:
    beat = json.loads((run.workdir / "heartbeat.json").read_text())
    saved = json.loads(read_config(run.workdir).to_json())
  except (OSError, ValueError, UserError):
    return False
  config = json.loads(run.config.to_json())
  phase = beat.get("state"), beat.get("step")
  return phase == ("finished", config["optimizer"]["steps"]) and all(
    saved[key] == config[key] for key in ("eval", "export")
  )


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[IO[str]]:
  """Holds the sweep's directory; the system frees it when all have ended.

  Children inherit the lock, so that the runs of a sweep that was killed
  outright keep others away as well.

  Raises:
    UserError: another sweep, or a run that one left behind, is at work there.
  """
  try:
    (directory / LOGS).mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK).open("a+")
  except OSError as e:
    raise UserError(
      f"--workdir={directory} cannot be written to ({e.strerror}): give another"
    ) from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      file.seek(0)
      raise UserError(
        f"--workdir={directory}: a sweep is at work there ({file.read()}): "
        "wait until it ends, or end it, or give another"
      ) from e
    yield file


def run_all(
  runs: Sequence[Run],
  directory: Path,
  *,
  workers: int,
  lock: IO[str],
  ended: Callable[[Outcome], None],
  command: Sequence[str] = COMMAND,
) -> list[Outcome]:
  """Runs all that are not finished, `workers` at once; failures do not stop it.

  SIGINT and SIGTERM are passed on as SIGTERM, upon which a run saves its step
  and ends; a second one kills.

  Args:
    runs: in the order of starting.
    directory: of the sweep; logs go to its logs/.
    workers: processes at once, each on its share of the cores.
    lock: of `alone`.
    ended: called for each process that has ended, except those stopped by a
      signal.
    command: what is run, with a run's flags behind it.

  Raises:
    Stopped: by a signal, after all processes have ended.
  """
  waiting = [run for run in runs if not finished(run)]
  going: dict[int, _Child] = {}  # by the number of their share of the cores
  outcomes: list[Outcome] = []
  with _Signals() as signals:
    while waiting or going:
      for slot in range(workers):
        if waiting and slot not in going and not signals.got:
          child = _Child(waiting.pop(0), directory, command, lock)
          _pin(child.process.pid, slot, workers)
          going[slot] = child
          _note(lock, going)
      for slot, child in list(going.items()):
        signals.pass_to(child.process)
        if child.process.poll() is not None:
          outcomes.append(child.outcome())
          del going[slot]
          _note(lock, going)
          if not (signals.got and outcomes[-1].error):
            ended(outcomes[-1])
      if signals.got and not going:
        raise Stopped(signals.got[0])
      time.sleep(_POLL)
  return outcomes


class _Child:
  """One run's process and its log."""

  def __init__(
    self, run: Run, directory: Path, command: Sequence[str], lock: IO[str]
  ):
    self.run = run
    self.log = directory / LOGS / f"{run.name}.txt"
    argv = [*command, *run.flags]
    self._began = time.monotonic()
    with self.log.open("a") as log:
      log.write(f"$ {' '.join(argv)}\n")
      log.flush()
      self._from = log.tell()
      # In a session of its own: ctrl-C reaches it through this process only,
      # as the signal that makes it save.
      self.process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[lock.fileno()],
      )

  def outcome(self) -> Outcome:
    status, error = self.process.returncode, ""
    if not finished(self.run):
      error = self._last_line() or "it wrote nothing"
      if status < 0:
        error = f"ended by {signal.Signals(-status).name} after: {error}"
      elif not status:
        error = f"ended before its last step: {error}"
    return Outcome(self.run, time.monotonic() - self._began, error)

  def _last_line(self) -> str:
    with self.log.open("rb") as log:
      log.seek(self._from)
      text = log.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


class _Signals:
  """SIGINT and SIGTERM within `with`, counted instead of obeyed."""

  def __enter__(self) -> "_Signals":
    self.got: list[int] = []
    self._sent: dict[int, int] = {}  # pid -> signals passed on
    self._previous = {
      number: signal.signal(number, lambda n, _: self.got.append(n))
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def pass_to(self, process: subprocess.Popen) -> None:
    """Once for the first signal, and then the end for the second."""
    sent = self._sent.get(process.pid, 0)
    if len(self.got) > sent and sent < 2:
      (process.terminate if not sent else process.kill)()
      self._sent[process.pid] = sent + 1


def _pin(pid: int, slot: int, workers: int) -> None:
  """Keeps a process to its share of the cores.

  XLA takes all cores that it may use: on a laptop two runs of a core each get
  further than one after the other on both.
  """
  if workers == 1 or not hasattr(os, "sched_setaffinity"):
    return
  cores = sorted(os.sched_getaffinity(0))
  share = cores[slot % len(cores) :: workers]
  with contextlib.suppress(ProcessLookupError):
    os.sched_setaffinity(pid, share)


def _note(lock: IO[str], going: dict[int, _Child]) -> None:
  """Who holds the directory, for whoever is refused."""
  pids = {child.run.name: child.process.pid for child in going.values()}
  lock.seek(0)
  lock.truncate()
  lock.write(
    ", ".join(
      [f"pid {os.getpid()}", *(f"{k} pid {v}" for k, v in pids.items())]
    )
  )
  lock.flush()
