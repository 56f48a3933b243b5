"""A sweep over small_runs, and a command that stands in for its runs."""

import json
import sys
from pathlib import Path

from cacheaug.projects.sweep import rows

_HERE = Path(__file__).resolve().parent

_FILE = """
import runpy

from cacheaug.projects.sweep.rows import Row, Sweep


def get_config():
  return runpy.run_path({small_runs!r})["get_config"]({directory!r})


def get_sweep():
  return Sweep(rows=({rows},), reference={reference!r}, axis={axis!r})
"""

ROWS = (
  'Row("N1", {"coprocessor.latents": 1}, (0, 1))',
  'Row("N2", {"coprocessor.latents": 2})',
)

# Ends as the file of its run's name says: 'fail', 'wait' (for SIGTERM) or, by
# default, as a run that has finished.
_STUB = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
workdir = next(a for a in sys.argv if a.startswith("--workdir="))
workdir = pathlib.Path(workdir.removeprefix("--workdir="))
workdir.mkdir(parents=True, exist_ok=True)
with open(here / "started.txt", "a") as f:
  f.write(workdir.name + "\\n")
script = here / workdir.name
how = script.read_text() if script.exists() else "finish"
if how == "fail":
  print("loading")
  sys.exit("error: no room in here")
if how == "wait":
  def save(*_):
    (workdir / "saved").touch()
    sys.exit(0)
  signal.signal(signal.SIGTERM, save)
  script.unlink()
  (here / "waiting").touch()
  time.sleep(60)
if how == "cores":
  (workdir / "cores").write_text(str(sorted(os.sched_getaffinity(0))))
known = json.loads((here / "configs.json").read_text())[workdir.name]
(workdir / "config.json").write_text(json.dumps(known))
beat = {"state": "finished", "step": known["optimizer"]["steps"], "saved": 0}
(workdir / "heartbeat.json").write_text(json.dumps(beat))
"""


def write(
  tmp_path: Path,
  *lines: str,
  reference: str = "",
  axis: str = "",
) -> str:
  """A sweep file of these rows (Python text); returns its path."""
  path = tmp_path / "sweep.py"
  path.write_text(
    _FILE.format(
      small_runs=str(_HERE / "small_runs.py"),
      directory=str(tmp_path / "text"),
      rows=", ".join(lines or ROWS),
      reference=reference,
      axis=axis,
    )
  )
  return str(path)


def runs(file: str, directory: Path, **given) -> list[rows.Run]:
  """The file's runs, in `directory`."""
  built = rows.build(rows.load(file), file, given)
  return rows.runs_of(built, directory)


def stub(tmp_path: Path, runs: list[rows.Run], **how: str) -> list[str]:
  """A command in place of cacheaug.main; `how` by run, '-' written '_'."""
  directory = tmp_path / "stub"
  directory.mkdir(exist_ok=True)
  known = {run.name: json.loads(run.config.to_json()) for run in runs}
  (directory / "configs.json").write_text(json.dumps(known))
  for name, what in how.items():
    (directory / name.replace("_", "-")).write_text(what)
  (directory / "stub.py").write_text(_STUB)
  return [sys.executable, str(directory / "stub.py")]


def started(tmp_path: Path) -> list[str]:
  """Names of the runs that the stub was started for, in order."""
  path = tmp_path / "stub" / "started.txt"
  return path.read_text().split() if path.exists() else []
