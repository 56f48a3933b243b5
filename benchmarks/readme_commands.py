"""Does what README.md says, as a stranger would, and takes the time.

  PYTHONPATH=tests python benchmarks/readme_commands.py --python=python3.12

Clones the checkout (what is committed) into a scratch directory, makes a
virtual environment of the given Python with empty caches, and runs every fenced
command of README.md there, in its order (what stands before the installation,
at the end), and its Python. What needs an accelerator, weights or a cloud is
named and left out; what takes longer than some minutes is shortened by the
words that the table names. A command fails if its status is not 0 or if what it
prints has not the form, numbers taken out, of what the README shows; all of it
is in printed.txt there. This program itself wants the standard library alone.

Two times are a person's: from the end of the installation to both answers of
`generate --compare` (goal: 20 s), and from before the clone to the first table
(goal: 10 minutes on two cores), with nothing else between than what the README
says; --first does no more than that. They want a machine with nothing else to
do: the load is printed. The status is 1 if a command failed, not if a goal was
missed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fenced

_README = fenced.ROOT / "README.md"
_SECONDS = 3600  # of one command: only a hang should reach it
# Start of a command -> words put behind it. All others run as they stand.
_SHORTER = {
  "python -m cacheaug.sweep": (
    "--only='^(N8|pause)-seed0$' --config.optimizer.steps=40 "
    "--config.optimizer.warmup=4 --config.eval.sequences=16 "
    "--config.eval.problems=16"
  ),
  "python -m cacheaug.main --config=configs/quickstart_text.py --workdir": (
    "--config.optimizer.steps=500"
  ),
  "pytest": "tests/test_traces.py",
}
# Asks a cloud: prints what it would run.
_DRY = "launch/"
# Of the environment: what could lend a fresh checkout something.
_NOT_PASSED = ("PYTHONPATH", "PYTHONHOME", "JAX_COMPILATION_CACHE_DIR")
_INSTALL = "pip install -e ."
_COMPARE = "python -m cacheaug.generate --compare"
_TABLE = "python -m cacheaug.main --config=configs/quickstart.py"
_GOALS = {"compare": 20.0, "table": 600.0}


def shortened(command: str) -> tuple[str, str]:
  """The command to run, and the words put in; '' where it is verbatim."""
  if command.startswith(_DRY):
    front, dashes, through = command.partition(" -- ")
    return f"{front} --dry-run{dashes}{through}", "--dry-run"
  more = fenced.longest(_SHORTER, command) or ""
  return f"{command} {more}".strip(), more


def _run(command: list[str], where: Path, env: dict[str, str]):
  """(seconds, status, standard output, its errors)."""
  start = time.perf_counter()
  done = subprocess.run(
    command,
    cwd=where,
    env=env,
    capture_output=True,
    text=True,
    timeout=_SECONDS,
  )
  seconds = time.perf_counter() - start
  with (where.parent / "printed.txt").open("a") as f:
    f.write(f"$ {command[-1]}\n{done.stdout}\n")
  return seconds, done.returncode, done.stdout, done.stderr


def _verdict(wanted: str, same: bool) -> str:
  return ("yes" if same else "NO") if wanted else "-"


def _report(result, command: str, more: str) -> bool:
  """Prints a command's row; whether it did what the README says."""
  seconds, rc, out, err = result
  wanted = fenced.form(fenced.shown(_README, command))
  same = wanted in fenced.form(out)
  form = _verdict(wanted, same)
  print(f"| `{command}` | {seconds:.1f} | {rc} | {form} | {more} |", flush=True)
  if rc or not same:
    print(f"{out[-2000:]}\n{err[-3000:]}", file=sys.stderr, flush=True)
  return not rc and same


def _python(checkout: Path, env: dict[str, str]):
  """Runs the README's Python; what its comments say must come."""
  code = (
    "import fenced; found = fenced.values(fenced.blocks("
    "fenced.ROOT / 'README.md', 'python')[0]); print(found); "
    "assert all(a == b for a, b in found)"
  )
  env = env | {"PYTHONPATH": str(checkout / "tests")}
  return _run(["python", "-c", code], checkout, env)


def main() -> int:
  """Returns the status."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--python", default=sys.executable, help="of the runs")
  parser.add_argument("--directory", help="scratch, new; a temporary one else")
  parser.add_argument(
    "--first", action="store_true", help="end with the first table"
  )
  given = parser.parse_args()
  if given.directory:
    Path(given.directory).mkdir(parents=True)
  else:
    given.directory = tempfile.mkdtemp(prefix="readme_commands.")
  scratch = Path(given.directory).resolve()
  checkout, venv = scratch / "cacheaug", scratch / "venv"
  env = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED}
  env |= {
    "PATH": f"{venv / 'bin'}:{env['PATH']}",
    "VIRTUAL_ENV": str(venv),
    "XDG_CACHE_HOME": str(scratch / "cache"),  # data, compiled programs, pip
  }

  def plain(*words: str) -> str:
    return subprocess.check_output(words, text=True).strip()

  begun = time.perf_counter()
  clone = ["git", "clone", "--quiet", str(fenced.ROOT), str(checkout)]
  subprocess.run(clone, check=True)
  subprocess.run([given.python, "-m", "venv", str(venv)], check=True)
  ready = time.perf_counter() - begun
  commit = plain("git", "-C", str(checkout), "rev-parse", "--short", "HEAD")
  version = plain(str(venv / "bin" / "python"), "--version")
  load = os.getloadavg()[0]
  print(f"{version}, commit {commit}, {os.cpu_count()} cores, load {load:.1f}")
  print(f"clone and virtual environment: {ready:.1f} s\n")
  print(
    "| command | seconds | rc | form | shortened by |\n|---|---|---|---|---|"
  )

  well, took, installed, loads = True, {}, False, []
  todo = fenced.commands(_README)
  for command, marked in todo:
    needs = marked or fenced.longest(fenced.NEEDS, command)
    installed |= command == _INSTALL
    if needs:
      print(f"| `{command}` | | | | not run: needs {needs} |", flush=True)
    elif given.first and _TABLE in took:
      break
    elif not installed:
      todo.append((command, marked))
    else:
      line, more = shortened(command)
      result = _run(["bash", "-c", line], checkout, env)
      well &= _report(result, command, more)
      took[command] = result[0]
      loads.append(os.getloadavg()[0])
  if not given.first:
    well &= _report(_python(checkout, env), "the Python example", "")

  compare = next(s for c, s in took.items() if c.startswith(_COMPARE))
  table = ready + took[_INSTALL] + compare + took[_TABLE]
  code = "import jax; print(jax.__version__)"
  jax = plain(str(venv / "bin" / "python"), "-c", code)
  print(f"\njax {jax}, load after each command up to {max(loads):.1f}")
  for what, seconds, goal in (
    ("installed to compared", compare, _GOALS["compare"]),
    ("clone to first table", table, _GOALS["table"]),
  ):
    verdict = "met" if seconds <= goal else "MISSED"
    print(f"{what}: {seconds:.1f} s, goal {goal:.0f} s: {verdict}")
  print("all as the README says" if well else "NOT all as the README says")
  return 0 if well else 1


if __name__ == "__main__":
  sys.exit(main())
