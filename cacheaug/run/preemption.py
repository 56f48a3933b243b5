"""SIGTERM during the training loop.

`requested(step)` becomes True on all processes after the same step; train.py
then saves, waits and exits 0. Outside the loop (packing, loading, the report)
SIGTERM ends the process as usual.
"""

import signal

import jax
from jax.experimental import multihost_utils


class StopOnSignal:
  """Catches SIGTERM within `with`; `requested` tells whether it has arrived."""

  def __enter__(self) -> "StopOnSignal":
    self._requested = False
    # With several processes JAX's coordination service catches the signal.
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *_: object) -> None:
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._previous)

  def _request(self, *_: object) -> None:
    self._requested = True

  def requested(self, step: int) -> bool:
    """Whether the run must stop after `step`; all processes get one answer."""
    if jax.process_count() == 1:
      return self._requested
    return multihost_utils.reached_preemption_sync_point(step)
