"""Kills a run at random until it has had enough, or watches a long one.

  python benchmarks/endurance.py kills --directory=DIR [--count=50] [--seed=0]
  python benchmarks/endurance.py long --directory=DIR [--steps=2000]
  python benchmarks/endurance.py once --directory=DIR --config=FILE [-- FLAGS]

kills: a small run gets SIGKILL or SIGTERM `count` times, at random, while it
starts and while it trains, and is started again each time. Each start must go
on from the newest checkpoint, and in the end metrics.jsonl must equal an
undisturbed run's, byte for byte. 50 kills: about 10 minutes on two cores.

long: the text quickstart's config; resident memory after the first quarter must
grow by less than 1 MB in 100 steps, and the last quarter's median step may
take at most 10 % longer than the second's. About two minutes on two cores.

once: a run of any config gets SIGKILL when two thirds of its steps are done and
a checkpoint is saved (--config.checkpoint.every), and is started again;
metrics.jsonl must equal an undisturbed run's, byte for byte.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_ROOT = Path(__file__).resolve().parent.parent
_EVERY = 20  # steps between the killed run's checkpoints


def _start(config: str, workdir: Path, *arguments: str) -> subprocess.Popen:
  log = workdir.with_suffix(".log").open("w")
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "cacheaug.main",
      f"--config={config}",
      f"--workdir={workdir}",
      *arguments,
    ],
    cwd=_ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=log,
    stderr=subprocess.STDOUT,
  )


def _small(directory: Path, name: str, steps: int) -> subprocess.Popen:
  """A run of the tests' tiny config; a line a step, for the finest check."""
  return _start(
    f"{_ROOT / 'tests' / 'small_runs.py'}:{directory}",
    directory / name,
    f"--config.optimizer.steps={steps}",
    f"--config.checkpoint.every={_EVERY}",
    "--config.log_every=1",
    "--config.optimizer.average=0.9",
  )


def _lines(path: Path) -> int:
  return path.read_bytes().count(b"\n") if path.exists() else 0


def _last_step(path: Path) -> int:
  whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
  return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def _saved(workdir: Path) -> int:
  names = [p.name for p in (workdir / "checkpoints").glob("*")]
  return max((int(n) for n in names if n.isdigit()), default=0)


def _trains(process: subprocess.Popen, workdir: Path, saved: int) -> bool:
  """Whether this process, not one before it, has come to its loop."""
  path = workdir / "heartbeat.json"
  if not path.exists():
    return False
  found = json.loads(path.read_text())
  return found["pid"] == process.pid and found["step"] >= saved


def _strike(
  process: subprocess.Popen, workdir: Path, draw: random.Random, startup: float
) -> str:
  """Waits for a random moment, sends a random signal; says which."""
  kind = draw.choice((signal.SIGKILL, signal.SIGTERM))
  saved = _saved(workdir)
  if draw.random() < 0.25:
    where = "while starting"
    time.sleep(draw.uniform(0.0, startup))
  else:
    where = "while training"
    wanted = saved + draw.randint(1, 3 * _EVERY)
    while process.poll() is None and not (
      _trains(process, workdir, saved)
      and _lines(workdir / "metrics.jsonl") >= wanted
    ):
      time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 0.05))
  if process.poll() is not None:
    return "ended before"
  process.send_signal(kind)
  return f"{kind.name} {where}"


def kills(directory: Path, count: int, seed: int) -> None:
  """Raises AssertionError where a run does not go on as it should."""
  draw = random.Random(seed)
  steps = count * 3 * _EVERY
  began = time.monotonic()
  whole = _small(directory, "whole", steps)
  while not _lines(directory / "whole" / "metrics.jsonl"):
    assert whole.poll() is None, (directory / "whole.log").read_text()
    time.sleep(0.1)
  startup = time.monotonic() - began
  assert whole.wait() == 0, (directory / "whole.log").read_text()
  print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s")

  workdir = directory / "killed"
  metrics, log = workdir / "metrics.jsonl", workdir.with_suffix(".log")
  struck: collections.Counter[str] = collections.Counter()
  resumed, most_lost, reached = 0, 0, 0
  cycles = time.monotonic()
  while True:
    saved = _saved(workdir)
    process = _small(directory, "killed", steps)
    done = struck.total() >= count
    how = "" if done else _strike(process, workdir, draw, startup)
    status = process.wait()
    text = log.read_text()
    assert "Traceback" not in text and "cannot be read" not in text, text
    found = re.search(r"resumed from step (\d+)", text)
    if found:
      resumed += 1
      assert int(found[1]) == saved, (saved, text)
      most_lost = max(most_lost, reached - saved)
    else:  # Killed before it came to that, or nothing was there yet.
      assert not saved or "while starting" in how, (saved, text)
    if status == 0 and "is saved, run again" not in text:
      break
    assert not done, (status, text)
    struck[how] += 1
    if status == 0:
      assert f"step {_saved(workdir)} is saved" in text, text
    else:
      assert status in (-signal.SIGKILL, -signal.SIGTERM), (status, text)
      # SIGTERM without a save: only before the loop. (A first checkpoint is
      # what tells the loop apart for sure, see `_trains`.)
      early = "starting" in how or not saved
      assert status == -signal.SIGKILL or early, (how, text)
    reached = _last_step(metrics)
    print(f"{struck.total()}: {how}, at step {reached}", flush=True)
  for how, times in sorted(struck.items()):
    print(f"{how}: {times}")
  print(
    f"{struck.total()} kills in {time.monotonic() - cycles:.0f} s, {resumed} "
    f"starts went on from a checkpoint, at most {most_lost} steps were taken "
    f"again (a checkpoint every {_EVERY})"
  )
  same = metrics.read_bytes() == (
    (directory / "whole" / "metrics.jsonl").read_bytes()
  )
  assert same, "metrics.jsonl differs from the undisturbed run's"
  assert _last_step(metrics) == steps
  print(f"metrics.jsonl: {_lines(metrics)} lines, byte for byte the same")


def once(directory: Path, config: str, flags: Sequence[str]) -> None:
  """Raises AssertionError where the killed run's metrics are others."""
  arguments = ("--config.log_every=1", *flags)

  def start(name: str) -> subprocess.Popen:
    return _start(config, directory / name, *arguments)

  began = time.monotonic()
  whole, log = start("whole"), (directory / "whole.log")
  assert whole.wait() == 0, log.read_text()
  metrics = directory / "whole" / "metrics.jsonl"
  steps = _last_step(metrics)
  print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s")
  workdir = directory / "killed"
  killed = start("killed")
  while not (
    _saved(workdir) and _last_step(workdir / "metrics.jsonl") >= 2 * steps // 3
  ):
    assert killed.poll() is None, "it ended before it could be killed"
    time.sleep(0.05)
  killed.kill()
  killed.wait()
  at, saved = _last_step(workdir / "metrics.jsonl"), _saved(workdir)
  again = start("killed")
  assert again.wait() == 0, workdir.with_suffix(".log").read_text()
  said = f"resumed from step {saved}"
  assert said in workdir.with_suffix(".log").read_text(), said
  print(f"killed at step {at}, {said}")
  same = metrics.read_bytes() == (workdir / "metrics.jsonl").read_bytes()
  assert same, "metrics.jsonl differs from the undisturbed run's"
  print(f"metrics.jsonl: {_lines(metrics)} lines, byte for byte the same")


def _resident(pid: int) -> float:
  """Megabytes; 0 for a process that is gone."""
  try:
    text = Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0.0
  found = re.search(r"VmRSS:\s+(\d+) kB", text)
  return int(found[1]) / 1024 if found else 0.0


def long(directory: Path, steps: int) -> None:
  """Raises AssertionError where memory or step time grows."""
  workdir = directory / "long"
  process = _start(
    str(_ROOT / "configs" / "quickstart_text.py"),
    workdir,
    f"--config.optimizer.steps={steps}",
    "--config.log_every=20",
    f"--config.checkpoint.every={steps // 8}",
    "--config.eval.sequences=64",
  )
  speed, seen, memory = workdir / "speed.jsonl", 0, []
  while process.poll() is None:
    lines = _lines(speed)
    if lines > seen:
      seen = lines
      memory.append((20 * lines, _resident(process.pid)))
    time.sleep(0.02)
    if seen * 20 >= steps:
      break
  assert process.wait() == 0, workdir.with_suffix(".log").read_text()
  records = [json.loads(k) for k in speed.read_text().splitlines()]
  quarter = len(records) // 4
  times = [r["step_time"] for r in records]
  second = statistics.median(times[quarter : 2 * quarter])
  last = statistics.median(times[-quarter:])
  late = np.array([m for m in memory if m[0] > steps // 4])
  slope = 100 * np.polyfit(late[:, 0], late[:, 1], 1)[0]
  print(
    f"resident memory: {memory[0][1]:.0f} MB at step {memory[0][0]}, "
    f"{late[0, 1]:.0f} MB at {late[0, 0]:.0f}, {late[-1, 1]:.0f} MB at "
    f"{late[-1, 0]:.0f}; slope {slope:+.3f} MB in 100 steps"
  )
  print(
    f"step time: median {1e3 * second:.1f} ms in the second quarter, "
    f"{1e3 * last:.1f} ms in the last"
  )
  for part in ("data", "dispatch", "device", "log", "checkpoint"):
    mean = statistics.mean(r[f"time_{part}"] for r in records[quarter:])
    print(f"  {part}: {1e3 * mean:.2f} ms a step")
  assert slope < 1.0, f"{slope} MB in 100 steps"
  assert last < 1.1 * second, (second, last)


def main() -> None:
  """Reads the arguments."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("what", choices=("kills", "long", "once"))
  parser.add_argument("--directory", type=Path, required=True)
  parser.add_argument("--count", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--config", default="")
  parser.add_argument("flags", nargs="*", help="of the run `once`, after --")
  given = parser.parse_intermixed_args()
  if given.what == "once" and not given.config:
    parser.error("once needs --config")
  directory = given.directory.absolute()
  name = "long" if given.what == "long" else "whole"
  if (directory / name).exists():
    parser.error(f"{directory / name} is there: give another --directory")
  directory.mkdir(parents=True, exist_ok=True)
  if given.what == "kills":
    kills(directory, given.count, given.seed)
  elif given.what == "once":
    once(directory, given.config, given.flags)
  else:
    long(directory, given.steps)


if __name__ == "__main__":
  main()
