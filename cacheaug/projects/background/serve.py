"""Many prompts through a batch of fixed size, one group after another.

  server = Server(model, decoder, max_new_tokens=128, worker=worker)
  request = server.submit(tokens)
  for answer in server.answers(): ...

Up to B prompts of one padded length are read and decoded together, and the
next group starts when all of one have ended. A finished sequence's place stays
empty until then: a sequence that joined a running batch would have its tokens
in other slots than one that began it, sums over slots would round differently,
and its answer would depend on when it came. As it is, an answer is that of its
prompt alone in a batch of B, bit for bit, whatever the others are or do; only
latents of a background worker depend on time.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.errors import UserError
from cacheaug.inference import context, padding
from cacheaug.inference.sampling import GREEDY, Sampling
from cacheaug.inference.session import InsertionSchedule, before_stop
from cacheaug.model.transformer import Params, Transformer
from cacheaug.projects.background.session import (
  BackgroundSession,
  LateInsertion,
)
from cacheaug.projects.background.worker import Worker

_read = jax.jit(context.read, static_argnames="model")


@dataclasses.dataclass(frozen=True)
class Answer:
  """What came of one request."""

  request: int
  ended: str  # "stop" (token), "length", "cancelled" or "error"
  ids: tuple[int, ...] = ()  # new tokens, without the stop token
  error: str = ""  # one line
  insertions: tuple[LateInsertion, ...] = ()


@dataclasses.dataclass(eq=False)
class _Request:
  number: int
  prompt: list[int]
  most: int  # new tokens
  latents: bool
  seed: int
  ids: list[int] = dataclasses.field(default_factory=list)
  ended: str = ""

  @functools.cached_property
  def length(self) -> int:
    """Of the prompt with its padding."""
    return padding.doubled(len(self.prompt))


class Server:
  """Requests in, answers out; `submit` and `cancel` from any thread."""

  def __init__(
    self,
    model: Transformer,
    decoder: Params,  # of context.unstack_on_cpu
    *,
    max_new_tokens: int,
    batch: int = 16,
    worker: Worker | None = None,
    plan: InsertionSchedule | None = None,
    sampling: Sampling = GREEDY,
    stop_ids: tuple[int, ...] = (),
    poll_every: int = 8,
  ):
    """Nothing is compiled yet.

    Args:
      model: of decoder and coprocessor.
      decoder: frozen parameters.
      max_new_tokens: the most that a request may ask for.
      batch: B, sequences decoded together.
      worker: None decodes without latents; shared by as many as like.
      plan: when latents are due.
      sampling: the law of a token, of all requests.
      stop_ids: end a sequence.
      poll_every: tokens between looks at the worker and at cancelled requests.

    Raises:
      UserError: a count below 1.
    """
    counts = dict(
      max_new_tokens=max_new_tokens, batch=batch, poll_every=poll_every
    )
    for name, value in counts.items():
      if value < 1:
        raise UserError(f"{name}={value} must be at least 1")
    self._model, self._decoder, self._worker = model, decoder, worker
    self._most, self._batch, self._poll_every = (
      max_new_tokens,
      batch,
      poll_every,
    )
    self._plan = plan or InsertionSchedule()
    self._options = dict(plan=self._plan, sampling=sampling, stop_ids=stop_ids)
    self._stop_ids = frozenset(stop_ids)
    self._lock = threading.Lock()
    self._numbers = 0
    self._waiting: collections.OrderedDict[int, _Request] = (
      collections.OrderedDict()
    )
    self._cancelled: set[int] = set()
    self._answers: list[Answer] = []
    self._group: list[_Request] = []
    self._session: BackgroundSession | None = None

  def submit(
    self,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None = None,
    latents: bool = True,
    seed: int = 0,
  ) -> int:
    """A request's number; what is wrong with it becomes its answer.

    Args:
      prompt: tokens; a BOS is the caller's.
      max_new_tokens: the server's by default.
      latents: False decodes without.
      seed: of the draws, which are those of `LM.generate` with one prompt.
    """
    most = self._most if max_new_tokens is None else max_new_tokens
    latents = latents and self._worker is not None
    error, tokens = "", []
    try:
      tokens = self._checked(prompt, most, latents)
    except UserError as e:
      error = str(e)
    with self._lock:
      self._numbers += 1
      number = self._numbers
      if error:
        self._answers.append(Answer(number, "error", error=error))
      else:
        self._waiting[number] = _Request(number, tokens, most, latents, seed)
    return number

  def cancel(self, request: int) -> bool:
    """Cancels a request, whose answer is then the tokens decoded so far.

    Returns:
      False if it has already ended.
    """
    with self._lock:
      if self._waiting.pop(request, None) is not None:
        self._answers.append(Answer(request, "cancelled"))
        return True
      running = any(x.number == request and not x.ended for x in self._group)
      if running:
        self._cancelled.add(request)
      return running

  @property
  def pending(self) -> int:
    """Requests whose answers are still to come."""
    with self._lock:
      live = sum(not x.ended for x in self._group)
      return len(self._waiting) + len(self._answers) + live

  def answers(self) -> Iterator[Answer]:
    """As they come, until none is left to come."""
    while self.pending:
      yield from self.step()

  def step(self) -> list[Answer]:
    """Up to `poll_every` further tokens; the answers that are whole by then."""
    if not self._group:
      self._begin()
    if self._group:
      live = [x for x in self._group if not x.ended]
      tokens = min(self._poll_every, max(x.most - len(x.ids) for x in live))
      self._take(self._session.run(tokens))
    with self._lock:
      out, self._answers = self._answers, []
    return out

  def close(self) -> None:
    """Cancels all that has no answer yet; `step` gives those answers out."""
    with self._lock:
      waiting, running = list(self._waiting), list(self._group)
    for number in waiting + [x.number for x in running]:
      self.cancel(number)
    self._end_cancelled()

  def _begin(self) -> None:
    """Reads the next group, of the longest-waiting request's length."""
    with self._lock:
      waiting = list(self._waiting.values())
      group = [x for x in waiting if x.length == waiting[0].length]
      self._group = group[: self._batch]
      for request in self._group:
        del self._waiting[request.number]
    if not self._group:
      return
    empty = self._batch - len(self._group)
    tokens, documents = padding.pad_left(
      [x.prompt for x in self._group] + [[0]] * empty, 0, self._group[0].length
    )
    self._session = BackgroundSession(
      self._model,
      self._decoder,
      _read(self._model, self._decoder, tokens, documents),
      worker=self._worker,
      poll_every=self._poll_every,
      max_new_tokens=self._most,
      on=[x.latents for x in self._group] + [False] * empty,
      **self._options,
    )
    seeds = np.array([x.seed for x in self._group] + [0] * empty)
    self._session.set_keys(_keys(seeds))
    for row in range(len(self._group), self._batch):
      self._session.end(row)

  def _take(self, new: np.ndarray) -> None:
    """Adds tokens [B, some]; ends what has come to its end."""
    for row, request in enumerate(self._group):
      if request.ended:
        continue
      ids = new[row].tolist()[: request.most - len(request.ids)]
      ids, stopped = before_stop(ids, self._stop_ids)
      request.ids += ids
      if stopped:
        self._end(row, "stop")
      elif len(request.ids) == request.most:
        self._end(row, "length")
    self._end_cancelled()

  def _end_cancelled(self) -> None:
    with self._lock:
      cancelled, self._cancelled = self._cancelled, set()
    for row, request in enumerate(self._group):
      if request.number in cancelled and not request.ended:
        self._end(row, "cancelled")
    if all(x.ended for x in self._group):
      if self._session is not None:
        self._session.close()
      self._group, self._session = [], None

  def _end(self, row: int, ended: str) -> None:
    request, session = self._group[row], self._session
    if not session.done[row]:
      session.end(row)
    insertions = tuple(x for x in session.insertions if x.sequence == row)
    answer = Answer(
      request.number, ended, tuple(request.ids), insertions=insertions
    )
    with self._lock:
      request.ended = ended
      self._answers.append(answer)

  def _checked(self, prompt: Any, most: int, latents: bool) -> list[int]:
    """The prompt as a list.

    Raises:
      UserError: it is empty, too short or too long, or no tokens.
    """
    try:
      tokens = np.asarray(prompt)
    except ValueError:  # Lists of unequal lengths.
      tokens = np.empty((1, 1))
    config = self._model.config
    if tokens.size == 0:
      raise UserError("the prompt is empty: give at least one token")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
      raise UserError("the prompt is not a list of tokens: give whole numbers")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
      raise UserError(
        f"{wrong[0]} is not a token from 0 to {config.vocab_size - 1}"
      )
    if not 1 <= most <= self._most:
      raise UserError(
        f"max_new_tokens={most} is not from 1 to the server's {self._most}"
      )
    pushed, spec = 0, latents and self._worker.spec
    if latents:
      plan = self._plan
      first = 0 if plan.after else min(plan.steps(self._most), default=0)
      needed = spec.context_needed - first
      if len(tokens) < needed:
        raise UserError(
          f"the prompt has {len(tokens)} tokens: with latents={spec.latents} "
          f"it needs at least {needed}; lengthen it, or ask for latents=False"
        )
      if spec.positions == "insert":
        pushed = plan.room(self._most) * spec.latents
    if len(tokens) + pushed + most > config.longest_context:
      raise UserError(
        f"{len(tokens) + pushed} tokens and {most} new ones exceed the "
        f"decoder's {config.longest_context} positions: shorten the prompt, or "
        "ask for fewer"
      )
    return tokens.tolist()


@jax.jit
def _keys(seeds: jax.Array) -> jax.Array:  # [B] -> [B] keys
  keys = jax.vmap(jax.random.key)(seeds.astype(jnp.uint32))
  return jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
