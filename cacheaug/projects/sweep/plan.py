"""What a sweep says on the terminal: its plan, then a line a run."""

import shlex
import time
from collections.abc import Sequence

from cacheaug.projects.sweep import runner
from cacheaug.projects.sweep.rows import Built, Run

_HEADER = ("row", "runs", "done", "steps", "trained", "frozen", "FLOP a run")


def table(built: Sequence[Built], wanted: Sequence[Run]) -> str:
  """The rows with runs among `wanted`, what they cost and what they change."""
  lines = []
  for b in built:
    mine = [run for run in wanted if run.built is b]
    if mine:
      done = sum(runner.finished(run) for run in mine)
      lines.append(
        (
          b.row.name,
          str(len(mine)),
          str(done),
          f"{b.config.optimizer.steps:,}",
          f"{b.trained:,}",
          f"{b.frozen:,}",
          f"{b.flop:.3g}",
          _changes(b),
        )
      )
  widths = [
    max(len(cell) for cell in column)
    for column in zip(_HEADER, *(line[:-1] for line in lines), strict=True)
  ]
  text = [_line(_HEADER, widths)]
  text += [f"{_line(line[:-1], widths)}  {line[-1]}" for line in lines]
  return "\n".join(text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
  first, *others = zip(cells, widths, strict=True)
  return "  ".join(
    [first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)]
  )


def _changes(built: Built) -> str:
  changes = [f"{k}={v}" for k, v in built.row.overrides.items()]
  if built.row.flop_of:
    changes.append(f"FLOP of {built.row.flop_of}")
  return " ".join(changes) or "as the base"


def commands(wanted: Sequence[Run]) -> str:
  """Each run's command, to be started elsewhere."""
  return "\n".join(
    shlex.join(["python", *runner.COMMAND[1:], *run.flags]) for run in wanted
  )


class Progress:
  """A line for each run that ends: how it went, how long all still takes."""

  def __init__(self, wanted: Sequence[Run]):
    waiting = [run for run in wanted if not runner.finished(run)]
    self._total = len(wanted)
    self._done = self._total - len(waiting)
    self._flop = sum(run.built.flop for run in waiting)
    self._flop_done = 0.0
    self._began = time.monotonic()
    if self._done:
      print(f"{self._done} of {self._total} are finished already", flush=True)

  def ended(self, outcome: runner.Outcome) -> None:
    """Prints the line."""
    self._done += 1
    self._flop_done += outcome.run.built.flop
    seconds = time.monotonic() - self._began
    left = seconds * (self._flop / self._flop_done - 1.0)
    how = f"failed: {outcome.error}" if outcome.error else "finished"
    print(
      f"{self._done}/{self._total} {outcome.run.name} {how} after "
      f"{clock(outcome.seconds)}, about {clock(left)} left",
      flush=True,
    )


def clock(seconds: float) -> str:
  """'1:02:03'."""
  whole = int(seconds)
  return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
