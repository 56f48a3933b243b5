"""How long a killed run takes to its next finished step, and on which data.

  python benchmarks/recovery.py --directory=DIR --config=FILE \
      [--devices=1,1,1] [--every=10] [-- --config.KEY=VALUE ...]

The run gets SIGKILL a few steps after a checkpoint and is started again at
once, on each number of devices in turn (of the host, where there is no other).
A line of the table a restart:

- ready: seconds from the kill until the log says 'resumed from step';
- step: seconds from the kill to the next finished step;
- back: seconds from the kill until the step of the kill is finished again;
- CPU: processor seconds of the new process until that next finished step, which
  say more than the clock where the machine has other work.

Every step that was logged twice, before a kill and after it, must have the same
checksum of its rows (`batch` in speed.jsonl), whatever the devices; otherwise
this ends with an error. TinyStories-656K: two minutes on two idle cores.
"""

import argparse
import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_BEYOND = 3  # steps after a checkpoint at which the kill comes


class Run:
  """One start of the run's process, in a log of its own."""

  def __init__(self, number: int, devices: int, options: argparse.Namespace):
    self.workdir = options.directory / "run"
    self.log = options.directory / f"start{number}.log"
    flags = f"--xla_force_host_platform_device_count={devices}"
    before = os.environ.get("XLA_FLAGS", "")
    self.process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "cacheaug.main",
        f"--config={options.config}",
        f"--workdir={self.workdir}",
        "--config.log_every=1",
        f"--config.checkpoint.every={options.every}",
        "--config.optimizer.steps=1000000",
        *options.flags,
      ],
      cwd=_ROOT,
      env=os.environ | {"XLA_FLAGS": f"{before} {flags}"},
      stdout=self.log.open("w"),
      stderr=subprocess.STDOUT,
    )

  def wait(self, condition: Callable[[], object]) -> float:
    """Until `condition` is true; the time when it came to be."""
    while not condition():
      if self.process.poll() is not None:
        raise SystemExit(f"{self.log}: the run has ended:\n{self.text()}")
      time.sleep(0.01)
    return time.monotonic()

  def cpu(self) -> float:
    """Processor seconds that the process has taken so far."""
    fields = Path(f"/proc/{self.process.pid}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

  def text(self) -> str:
    """What the process has printed."""
    return self.log.read_text(errors="replace")

  def resumed(self) -> int | None:
    """The step that it goes on from; None before it says so."""
    found = re.search(r"resumed from step (\d+)", self.text())
    return int(found[1]) if found else None

  def batches(self) -> dict[int, str]:
    """The rows' checksum by step, of every line that is whole."""
    path = self.workdir / "speed.jsonl"
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    whole = [json.loads(x) for x in lines if x.endswith(b"\n")]
    return {x["step"]: x["batch"] for x in whole}

  def last(self) -> int:
    """The last finished step."""
    return max(self.batches(), default=0)

  def file(self) -> int:
    """Which file the lines are in: a run that resumes puts another there."""
    return (self.workdir / "speed.jsonl").stat().st_ino

  def saved(self) -> int:
    """The newest checkpoint's step."""
    names = [p.name for p in (self.workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)

  def kill_after_checkpoint(self) -> tuple[float, int]:
    """SIGKILL a few steps after its next checkpoint; when, and at which."""
    first = self.saved()
    self.wait(lambda: self.saved() > first)
    wanted = self.last() + _BEYOND
    self.wait(lambda: self.last() >= wanted)
    self.process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    self.process.wait()
    return killed, self.last()


def measure(options: argparse.Namespace) -> None:
  """Prints the table; SystemExit where a run ends, or reads other rows."""
  devices = [int(n) for n in options.devices.split(",")]
  seen: dict[int, set[str]] = collections.defaultdict(set)
  twice = 0
  run = Run(0, devices[0], options)
  killed, step = run.kill_after_checkpoint()
  print("| devices | resumed from | killed at | ready | step | back | CPU |")
  print("|---|---|---|---|---|---|---|")
  for number, count in enumerate(devices, start=1):
    for k, checksum in run.batches().items():
      seen[k].add(checksum)
    before = run.file()
    run = Run(number, count, options)
    ready = run.wait(lambda run=run: run.resumed() is not None)
    start = run.resumed()
    run.wait(lambda run=run, old=before: run.file() != old)
    again = run.wait(lambda run=run, s=start: s < run.last()) - killed
    cpu = run.cpu()
    back = run.wait(lambda run=run, s=step: run.last() >= s) - killed
    print(
      f"| {count} | {start} | {step} | {ready - killed:.1f} s "
      f"| {again:.1f} s | {back:.1f} s | {cpu:.1f} s |",
      flush=True,
    )
    killed, step = run.kill_after_checkpoint()
    for k, checksum in run.batches().items():
      twice += k in seen
      seen[k].add(checksum)
  size = sum(
    p.stat().st_size
    for p in (run.workdir / "checkpoints" / str(run.saved())).rglob("*")
    if p.is_file()
  )
  print(f"\ncheckpoint: {size / 1e6:.1f} MB")
  other = [k for k, checksums in seen.items() if len(checksums) > 1]
  if other:
    raise SystemExit(f"steps {other[:5]} had other rows after a restart")
  print(f"{len(seen)} steps, logged {twice} times again: the same rows")


def main() -> None:
  """Reads the flags of the module's docstring."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--directory", type=Path, required=True)
  parser.add_argument("--config", required=True)
  parser.add_argument("--devices", default="1,1,1")
  parser.add_argument("--every", type=int, default=10)
  parser.add_argument("flags", nargs="*")
  options = parser.parse_args()
  options.directory = options.directory.absolute()
  options.directory.mkdir(parents=True, exist_ok=True)
  measure(options)


if __name__ == "__main__":
  main()
