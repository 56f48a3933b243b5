"""Where a step's time goes: parts of the host's loop, and XProf traces."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from cacheaug.errors import UserError, one_line
from cacheaug.run import files


class Clock:
  """Seconds of the host's loop by part, without waiting for the device.

  `device` is the time the loop waited for the device's results: near zero
  means that the host, not the device, sets the pace.
  """

  PARTS = ("data", "dispatch", "device", "log", "checkpoint")

  def __init__(self) -> None:
    self.reset(0)

  def reset(self, step: int) -> None:
    """Starts anew at `step` steps taken."""
    self._began, self._step = time.monotonic(), step
    self._seconds = dict.fromkeys(self.PARTS, 0.0)

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the time within `with` as `name`, one of PARTS."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._seconds[name] += time.perf_counter() - began

  def read(self, step: int) -> dict[str, float]:
    """Mean seconds a step since `reset`: step_time, and time_<part> of it."""
    steps = step - self._step
    means = {f"time_{k}": v / steps for k, v in self._seconds.items()}
    return {"step_time": (time.monotonic() - self._began) / steps, **means}


def parse_steps(text: str) -> tuple[int, int] | None:
  """'10:13' is (10, 13), both included; '' is None.

  Raises:
    UserError: anything else.
  """
  if not text:
    return None
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal() and 1 <= int(first)):
    raise UserError(
      f"profile={text!r}: give the first and last step, such as 10:13"
    )
  if int(first) > int(last):
    raise UserError(f"profile={text!r}: the first step is after the last")
  return int(first), int(last)


class Trace:
  """An XProf trace of a few steps, in workdir/profile.

  Open it with `xprof workdir/profile` or TensorBoard's profile plugin.

  Args:
    workdir: of the run.
    steps: `profile` of the config.
  """

  def __init__(self, workdir: str | epath.Path, steps: str) -> None:
    self._directory = files.expanded(workdir) / "profile"
    self._steps = parse_steps(steps)
    self._running = False

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_: object) -> None:
    if self._running:
      self._running = False
      try:
        jax.profiler.stop_trace()
      except Exception as e:  # a profile is no reason to lose a run
        logging.warning(
          "%s: the profile cannot be written (%s)",
          self._directory,
          one_line(e),
        )

  def before(self, step: int) -> None:
    """Starts the trace where `step` is among those asked for."""
    if self._steps and not self._running:
      if self._steps[0] <= step <= self._steps[1]:
        jax.profiler.start_trace(self._directory)
        self._running = True

  def after(self, step: int, state: Any) -> None:
    """Ends it after the last of them, once the device is done with it."""
    if self._running and step >= self._steps[1]:
      jax.block_until_ready(state)
      self.__exit__()
      logging.info(
        "profile of steps %d to %d: %s", *self._steps, self._directory
      )
