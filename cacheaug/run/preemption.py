"""SIGTERM, which a preempted machine gets: stop after the step at hand."""

import signal

import jax
from jax.experimental import multihost_utils


class StopOnSignal:
  """Within `with`, `asked` says whether SIGTERM has come."""

  def __enter__(self) -> "StopOnSignal":
    self._asked = False
    # With several processes JAX's coordination service catches the signal.
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_: object) -> None:
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._previous)

  def _ask(self, *_: object) -> None:
    self._asked = True

  def asked(self, step: int) -> bool:
    """Whether to stop after `step`; all processes agree on it."""
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)
