"""A thread that runs the coprocessor over copies of caches, one at a time.

Its queue is bounded, its work can be dropped at any time, and whatever goes
wrong in it ends in one warning and no latents. `session.py` is its user.
"""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np
from absl import logging

from cacheaug.augment import coprocessor
from cacheaug.augment.traces import Layout, Traces
from cacheaug.errors import UserError, one_line
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer

_GRACE = 5.0  # seconds that `close` gives a pass that is under way


@flax.struct.dataclass
class Snapshot:
  """What the coprocessor reads; shares no memory with the state."""

  cache: KVCache
  traces: Traces  # one a sequence
  copied: jax.Array  # [B, 1, N, D]


@functools.partial(jax.jit, static_argnames="model")
def _outputs(model: Transformer, coproc: Params, taken: Snapshot) -> jax.Array:
  out = coprocessor.outputs(
    model, coproc, taken.cache, taken.traces, taken.copied
  )
  return out[:, 0]  # [B, N, D]


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the worker may take on, and how late its latents may be.

  Raises:
    UserError: a value out of range; names it.
  """

  waiting: int = 4  # snapshots in the queue; beyond them work is refused
  tokens: int | None = None  # later than this latents are left out; None: never
  seconds: float | None = None  # the same, in seconds since the snapshot
  timeout: float = 300.0  # seconds of one pass, its compilation with it

  def __post_init__(self):
    if self.waiting < 1:
      raise UserError(f"waiting={self.waiting} must be at least 1")
    for name in ("tokens", "seconds"):
      value = getattr(self, name)
      if value is not None and value < 0:
        raise UserError(f"{name}={value} must be 0 or more, or None")
    if self.timeout <= 0:
      raise UserError(f"timeout={self.timeout} must be more than 0 seconds")


@dataclasses.dataclass
class Times:
  """Seconds of many waits, in constant memory."""

  count: int = 0
  total: float = 0.0
  longest: float = 0.0

  def add(self, seconds: float) -> None:
    """One more."""
    self.count += 1
    self.total += seconds
    self.longest = max(self.longest, seconds)

  @property
  def mean(self) -> float:
    """0 where there were none."""
    return self.total / max(self.count, 1)


OUTCOMES = ("inserted", "refused", "expired", "cancelled", "failed")


@dataclasses.dataclass
class Metrics:
  """What became of the augmentations asked for, each of one sequence.

  inserted + refused + expired + cancelled + failed is `asked`, but for those
  that are still under way.
  """

  asked: int = 0
  inserted: int = 0
  refused: int = 0  # the queue was full
  expired: int = 0  # beyond a limit, or overtaken by later latents
  cancelled: int = 0  # the sequence, or the worker, had ended
  failed: int = 0  # the worker had
  lateness: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )  # tokens -> augmentations inserted so late
  queue: Times = dataclasses.field(default_factory=Times)  # a snapshot each
  compute: Times = dataclasses.field(default_factory=Times)

  @property
  def hit_rate(self) -> float:
    """Share of those settled that were inserted; 0 where there were none."""
    settled = sum(getattr(self, name) for name in OUTCOMES)
    return self.inserted / max(settled, 1)


@dataclasses.dataclass(eq=False)
class Job:
  """One snapshot on its way; the session's own, the worker fills it in.

  Its `outcome` is None until it is ready or will never be.
  """

  on: np.ndarray  # [B], sequences that want latents
  step: int  # new tokens at the snapshot
  count: int  # which of the session's augmentations it is
  taken: Snapshot | None = dataclasses.field(repr=False)
  asked: float = dataclasses.field(default_factory=time.monotonic)
  begun: float | None = None
  outcome: str | None = None  # "ready", or one of OUTCOMES
  outputs: np.ndarray | None = None  # [B, N, D]
  _finished: threading.Event = dataclasses.field(
    default_factory=threading.Event
  )

  def finish(self, outcome: str) -> None:
    """The first outcome stands. The snapshot is let go."""
    self.outcome = self.outcome or outcome
    self.taken = None
    self._finished.set()

  def wait(self, seconds: float | None = None) -> bool:
    """Until there is an outcome; for tests and offline use, not decoding."""
    return self._finished.wait(seconds)


class Worker:
  """A thread that runs the coprocessor over snapshots, one at a time.

  A pass that raises, gives no finite latents or takes longer than it may ends
  the worker's usefulness: one warning is logged, and all that is asked of it
  from then on stays without latents.

  Attributes:
    spec: the coprocessor's.
    limits: as given.
    failure: why no more latents will come; "" while they may.
  """

  def __init__(
    self,
    model: Transformer,
    coproc: Params,  # as of `engine.insert_latents`
    spec: Layout,
    *,
    limits: Limits | None = None,
    device: jax.Device | None = None,
  ):
    """Starts the thread.

    Args:
      model: of decoder and coprocessor.
      coproc: the coprocessor's parameters.
      spec: its layout.
      limits: by default those of `Limits`.
      device: where it computes; by default the second of this process's, or
        beside the decoder where there is one alone.

    Raises:
      UserError: a kind that does not turn a cache into embeddings, or several
        rounds at one point.
    """
    spec.kind.check("background")
    if spec.rounds_per_point > 1:
      raise UserError(
        f"traces.rounds={spec.rounds} at one point: the background computes "
        "one round; insert latents at once (Session)"
      )
    if device is None and len(jax.local_devices()) > 1:
      device = jax.local_devices()[1]
    self.spec, self.limits = spec, limits or Limits()
    self.failure = ""
    self._model, self._device = model, device
    self._coproc = coproc if device is None else jax.device_put(coproc, device)
    self._metrics = Metrics()
    self._waiting: collections.deque[Job] = collections.deque()
    self._running: Job | None = None
    self._closed = False
    self._change = threading.Condition()
    self._thread = threading.Thread(
      target=self._work, name="coprocessor", daemon=True
    )
    self._thread.start()

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the thread after the pass under way; what waits is cancelled.

    A pass that hangs cannot be ended from outside: its thread is left behind
    with a warning, and ends with the process.
    """
    with self._change:
      self._closed = True
      self._clear("cancelled")
      self._change.notify_all()
    # One that hangs has had its time.
    self._thread.join(0.0 if self.failure else _GRACE)
    if self._thread.is_alive():
      self._fail(f"still computing {_GRACE:.0f} s after it was closed")

  def compute(self, taken: Snapshot) -> np.ndarray:  # [B, N, D]
    """The coprocessor's outputs; runs in the worker's thread."""
    if self._device is not None:
      taken = jax.device_put(taken, self._device)
    return np.asarray(_outputs(self._model, self._coproc, taken))

  def submit(
    self,
    take: Callable[[], Snapshot],
    *,
    on: np.ndarray,  # [B]
    step: int,
    count: int,
  ) -> Job | None:
    """A job to look at from time to time, or None where it is refused.

    Args:
      take: makes the snapshot; called only where there is room for it.
      on: sequences that want latents.
      step: new tokens so far.
      count: augmentations of the session before this one.
    """
    self.check()
    self._count("asked", on)
    with self._change:
      refusal = self._refusal()
    if not refusal:
      try:
        job = Job(on, step, count, take())
      except Exception as e:
        self._fail(f"no snapshot, {_line(e)}")
      with self._change:  # Another session may have been quicker.
        refusal = self._refusal()
        if not refusal:
          self._waiting.append(job)
          self._change.notify_all()
          return job
    self._count(refusal, on)
    return None

  def check(self) -> None:
    """Notices a thread that is gone, or has been at one job for too long."""
    with self._change:
      job = self._running
      late = job is not None and time.monotonic() - job.begun
    if late and late > self.limits.timeout:
      self._fail(f"one pass took over {self.limits.timeout:g} s")
    elif not self._closed and not self._thread.is_alive():
      self._fail("its thread has died")

  def finish_job(
    self, job: Job, outcome: str, done: np.ndarray, late: int
  ) -> None:
    """Counts what became of a job.

    Args:
      job: of `submit`.
      outcome: one of OUTCOMES.
      done: [B], sequences that have ended, to which nothing was done.
      late: tokens decoded since the snapshot.
    """
    with self._change:
      job.finish(outcome)
      if job in self._waiting:
        self._waiting.remove(job)
    self._count("cancelled", job.on & done)
    self._count(outcome, job.on & ~done)
    if outcome == "inserted":
      with self._change:
        self._metrics.lateness[late] += int((job.on & ~done).sum())

  def metrics(self) -> Metrics:
    """A copy of the counts so far."""
    with self._change:
      return dataclasses.replace(
        self._metrics,
        lateness=self._metrics.lateness.copy(),
        queue=dataclasses.replace(self._metrics.queue),
        compute=dataclasses.replace(self._metrics.compute),
      )

  def _refusal(self) -> str:
    """The outcome of a job that cannot be taken; "" where it can."""
    if self.failure or self._closed:
      return "failed" if self.failure else "cancelled"
    return "refused" if len(self._waiting) >= self.limits.waiting else ""

  def _count(self, name: str, on: np.ndarray) -> None:
    with self._change:
      count = getattr(self._metrics, name) + int(on.sum())
      setattr(self._metrics, name, count)

  def _clear(self, outcome: str) -> None:
    """Gives up all that is not ready; with `_change` held."""
    jobs = [*self._waiting, *([self._running] if self._running else [])]
    self._waiting.clear()
    for job in jobs:
      job.finish(outcome)

  def _fail(self, reason: str) -> None:
    with self._change:
      first, self.failure = not self.failure, self.failure or reason
      self._clear("failed")
      self._change.notify_all()
    if first:
      logging.warning(
        "the background coprocessor has stopped (%s): decoding goes on "
        "without latents",
        reason,
      )

  def _work(self) -> None:
    try:
      while (job := self._next()) is not None:
        outputs = self.compute(job.taken)
        if not np.isfinite(outputs).all():
          raise ValueError("latents that are not finite")
        self._finish(job, outputs)
        del job, outputs  # Else they are kept until the next has come.
    except BaseException as e:  # Nothing may end this thread unnoticed.
      self._fail(_line(e))

  def _next(self) -> Job | None:
    """Waits for a job; None when there will be none."""
    with self._change:
      self._running = None
      while True:
        self._change.wait_for(
          lambda: self._waiting or self._closed or self.failure
        )
        if self._closed or self.failure:
          return None
        job, now = self._waiting.popleft(), time.monotonic()
        most = self.limits.seconds
        if most is not None and now - job.asked > most:
          job.finish("expired")
        if job.outcome is None:
          job.begun, self._running = now, job
          self._metrics.queue.add(now - job.asked)
          return job

  def _finish(self, job: Job, outputs: np.ndarray) -> None:
    with self._change:
      self._running = None
      self._metrics.compute.add(time.monotonic() - job.begun)
      if job.outcome is None:
        job.outputs = outputs
      job.finish("ready")


def _line(error: BaseException) -> str:
  return one_line(f"{type(error).__name__}: {error}", 200)
