"""The coprocessor in the background: decoding never waits for it.

  with Worker(model, coproc, spec) as worker:
    session = BackgroundSession(model, decoder, context, worker=worker, ...)

Where latents are due the session leaves a copy of its cache with the worker
and goes on decoding. What comes back is inserted at the next step at which the
session looks: after token q in place of the point p that it was computed for,
late by d = q - p tokens. The latents stand where on-time latents of q would,
and

  harmless  z = embeddings of the N tokens up to q + the output for p
  as_is     z = the output for p

so with d = 0 they are those of `engine.insert_latents`, bit for bit. Latents
that do not come, for whatever reason, leave slots that stay empty: the sequence
is the frozen decoder's, bit for bit.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment import coprocessor, objective
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import engine
from cacheaug.inference.engine import Context, DecodeState
from cacheaug.inference.session import Insertion, Session
from cacheaug.model.transformer import Params, Transformer
from cacheaug.projects.background.worker import Job, Snapshot, Worker


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def snapshot(
  model: Transformer, decoder: Params, state: DecodeState, spec: Layout
) -> Snapshot:
  """The state as it is, for latents at the end of each sequence."""
  traces = _point(state, spec)
  copied, _ = objective.embedded(model, decoder, traces)
  # What jit returns is memory of its own, while the state's is written over.
  return Snapshot(state.cache.stacked(), traces, copied)


@functools.partial(
  jax.jit, static_argnames=("model", "spec"), donate_argnames="state"
)
def insert_late_latents(
  model: Transformer,
  decoder: Params,  # as of `engine.insert_latents`, all but `outputs`
  state: DecodeState,
  outputs: jax.Array,  # [B, N, D], the coprocessor's for an earlier step
  count: jax.Array,  # []
  on: jax.Array,  # [B]
  spec: Layout,
) -> DecodeState:
  """`engine.insert_latents` where the coprocessor has run already."""
  traces = _point(state, spec)
  copied, _ = objective.embedded(model, decoder, traces)
  z = coprocessor.combine(copied[:, 0], outputs, spec.start == "harmless")
  latents = engine.Latents(traces.latent_rows.positions[:, 0], z=z)
  return engine.write_latents(
    model, decoder, state, latents, count=count, on=on, spec=spec
  )


_copy = jax.jit(jnp.copy)


def _point(state, spec):
  return engine.lay_point(
    state.tokens,
    state.documents,
    last=state.prompt + state.step - 1,
    position=state.position,
    spec=spec,
  )


@dataclasses.dataclass(frozen=True)
class LateInsertion(Insertion):
  """Latents of the background; `step` is where they were inserted."""

  late: int  # new tokens since the snapshot


class BackgroundSession(Session):
  """A session whose latents come from a worker, if and when they do.

  Slots for them are made when the first have come: until then decoding is that
  of a session without a coprocessor, and as fast. A step attends to all slots,
  empty or not.
  """

  _at_once = False

  def __init__(
    self,
    model: Transformer,
    decoder: Params,
    context: Context,
    *,
    worker: Worker | None,
    poll_every: int = 8,
    **options: Any,
  ):
    """Lays out the cache.

    Args:
      model: as of Session.
      decoder: as of Session.
      context: as of Session.
      worker: None decodes without latents.
      poll_every: the least tokens between looks at the worker while latents are
        due.
      **options: Session's own but for coproc and spec.

    Raises:
      UserError: `poll_every` is less than 1.
    """
    if poll_every < 1:
      raise UserError(f"poll_every={poll_every} must be at least 1 token")
    super().__init__(
      model,
      decoder,
      context,
      spec=None if worker is None else worker.spec,
      **options,
    )
    self._worker, self._poll_every = worker, poll_every
    self._jobs: list[Job] = []

  def set_keys(self, keys: jax.Array) -> None:  # [B]
    """Uses these keys for sampling in place of the seed's.

    Call it before the first token.
    """
    self.state = self.state.replace(keys=keys)

  def run(self, tokens: int) -> np.ndarray:  # [B, up to `tokens`]
    """As Session's; latents that have come are inserted on the way.

    While latents may come the device gets a few tokens' work at a time, the
    next before it is through with the last: it is never idle for a look, and
    what `_step` says is what has been given to it.
    """
    first, pausing = self._step, bool(self._options["pause_ids"])
    until = min(first + tokens, self.state.room)
    earlier = None
    while self._step < until and not self.finished:
      self._insert_arrived()
      if pausing or self._step in self._due:
        self._insert_where_due()
      stop = min([until, *(d for d in self._due if d > self._step)])
      if self._jobs:
        # For a slow coprocessor looks grow rare: at most a quarter later.
        late = self._step - self._jobs[0].step
        stop = min(stop, self._step + max(self._poll_every, late // 4))
      self.state = engine.decode(
        self._model, self._decoder, self.state, stop, **self._options
      )
      self._step = stop
      if pausing:
        self._catch_up()
      elif earlier is not None:
        self._done = np.array(earlier)  # Waits for the work before this.
      earlier = _copy(self.state.done)  # The state's own is soon used up.
    self._catch_up()
    if self.finished:
      self.close()
    return np.asarray(self.state.generated)[:, first : self._step]

  def _catch_up(self) -> None:
    """Waits for the device."""
    self._step = int(self.state.step)
    self._done = np.array(self.state.done)

  def close(self) -> None:
    """Drops what is still under way; `run` does so at the end."""
    for job in self._jobs:
      self._finish_job(job, "cancelled")
    self._jobs = []

  def _insert(self, on: np.ndarray) -> None:
    take = functools.partial(
      snapshot, self._model, self._decoder, self.state, self._spec
    )
    job = self._worker.submit(take, on=on, step=self._step, count=self._count)
    if job is not None:
      self._count += 1  # Its slots are its own, even if it never comes.
      self._jobs.append(job)
      self._insert_arrived()

  def _insert_arrived(self) -> None:
    """Inserts the newest latents that have come; settles what will not."""
    if not self._jobs:
      return
    self._worker.check()
    waiting, ready = [], None
    for job in self._jobs:
      outcome = self._outcome(job)
      if outcome == "ready":
        if ready is not None:
          self._finish_job(ready, "expired")
        ready = job
      elif outcome is None:
        waiting.append(job)
      else:
        self._finish_job(job, outcome)
    self._jobs = waiting
    if ready is not None:
      self._write(ready)

  def _outcome(self, job: Job) -> str | None:
    """None where it may still come."""
    limits = self._worker.limits
    if not (job.on & ~self._done).any():
      return "cancelled"
    if limits.tokens is not None and self._step - job.step > limits.tokens:
      return "expired"
    if limits.seconds is not None:
      if time.monotonic() - job.asked > limits.seconds:
        return "expired"
    return job.outcome

  def _write(self, job: Job) -> None:
    on = job.on & ~self._done
    room = self._room * self._spec.latents
    self.state = engine.grow_cache(self.state, room)
    self.state = insert_late_latents(
      self._model,
      self._decoder,
      self.state,
      job.outputs,
      job.count,
      on,
      self._spec,
    )
    before = len(self.insertions)
    self._note(on, self.state.latent_slot(job.count, self._spec.latents))
    late = self._step - job.step
    self.insertions[before:] = [
      LateInsertion(**dataclasses.asdict(x), late=late)
      for x in self.insertions[before:]
    ]
    self._finish_job(job, "inserted")

  def _finish_job(self, job: Job, outcome: str) -> None:
    self._worker.finish_job(job, outcome, self._done, self._step - job.step)
