"""Trains every row of a sweep, then compares them in one report.

  python -m cacheaug.sweep --config=configs/sweeps/tiny.py [--workdir=DIR]
      [--workers=1] [--only=REGEX] [--plan_only] [--report_only]
      [--config.key=value ...]

A sweep file is a config file that names rows as well: keys that differ from its
base experiment, and seeds. Each row and seed is an ordinary run (python -m
cacheaug.main) in DIR/NAME-seedK with its log in DIR/logs. Run it again with the
same --workdir to go on: what is finished is skipped, what was stopped resumes.
A run that fails does not stop the others.

The report is DIR/report/comparison.md, with comparison.csv and plots; it is
written at the end, and by --report_only at any time, over what is finished.
--only=REGEX is for a part of the runs, by their names: a part trains without a
report, unless --report_only asks for one of it.

--plan_only prints each run's own command as well: for machines that want more
than a process each, which start them by launch/.
"""

import os
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cacheaug.errors import UserError
from cacheaug.run import command
from cacheaug.run.files import expanded, refuse_remote


def main() -> None:
  """Reads the flags that are defined below."""
  from cacheaug.projects.sweep import plan, rows, runner

  values = flags.FLAGS
  if values.workers < 1:
    raise UserError(f"--workers={values.workers} must be at least 1")
  if values.plan_only and values.report_only:
    raise UserError("--plan_only and --report_only: give one of the two")
  rows.quietly()
  flag = values["config"]
  file = config_flags.get_config_filename(flag)
  sweep = rows.load(file)
  built = rows.build(
    sweep,
    file,
    config_flags.get_override_values(flag),
    pattern=values.only,
  )
  refuse_remote(values.workdir, "--workdir")
  directory = Path(expanded(values.workdir or f"runs/sweeps/{_name(file)}"))
  runs = rows.runs_of(built, directory.absolute())
  if values.plan_only:
    print(plan.table(built, runs), plan.commands(runs), sep="\n")
    return
  failed = []
  if not values.report_only:
    print(plan.table(built, runs), flush=True)
    failed = _run(runs, directory, values.workers)
  if values.report_only or not values.only:
    _report(file, sweep, built, runs, directory)
  if failed:
    raise UserError(
      f"{len(failed)} of {len(runs)} runs failed: "
      + "; ".join(f"{o.run.name}: {o.error}" for o in failed)
      + f" (logs: {directory / runner.LOGS}); run again to try them again"
    )


def _run(runs, directory, workers):
  """Trains; returns the outcomes of the runs that failed."""
  from cacheaug.projects.sweep import plan, runner

  with runner.alone(directory) as lock:
    progress = plan.Progress(runs)
    try:
      outcomes = runner.run_all(
        runs, directory, workers=workers, lock=lock, ended=progress.ended
      )
    except runner.Stopped as e:
      print(f"stopped by {e}: run the sweep again to go on", flush=True)
      sys.exit(128 + e.number)
  return [o for o in outcomes if o.error]


def _report(file, sweep, built, runs, directory):
  """Over what is finished; says where it is."""
  from cacheaug.projects.sweep import comparison, page

  results = comparison.compare(built, runs, sweep.reference)
  if not results:
    raise UserError(f"--workdir={directory}: no run of the sweep has finished")
  path = page.write(
    directory,
    title=f"Sweep {_name(file)}",
    sweep=sweep,
    results=results,
    runs=runs,
  )
  print(f"report: {path}")


def _name(file: str) -> str:
  name = os.path.basename(file).replace(".py", "", 1)
  return re.sub(r"\W+", "_", name)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "sweep file")
  flags.DEFINE_string(
    "workdir", "", "the sweep's directory; default: runs/sweeps/<file's name>"
  )
  flags.DEFINE_integer("workers", 1, "runs at once, each on its own cores")
  flags.DEFINE_string("only", "", "regular expression of runs (NAME-seedK)")
  flags.DEFINE_bool("plan_only", False, "show rows and commands, run nothing")
  flags.DEFINE_bool("report_only", False, "write the report, run nothing")
  command.run(main, __doc__)
