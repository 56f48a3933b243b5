"""One batch being decoded: when latents are inserted, and its new tokens.

The loop over tokens runs on the device (`engine.decode`); this is the loop
around it, which stops it where latents are due.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import arguments, engine
from cacheaug.inference.engine import Context
from cacheaug.inference.gates import Gate
from cacheaug.inference.sampling import GREEDY, Sampling
from cacheaug.model.attention import NO_LIMIT
from cacheaug.model.transformer import Params, Transformer


@dataclasses.dataclass(frozen=True)
class InsertionSchedule:
  """When latents are inserted; by default once, at the prompt's end.

  Raises:
    UserError: a value out of range; names it.
  """

  at: tuple[int, ...] = (0,)  # after so many new tokens; 0: the prompt's end
  every: int = 0  # and after every so many new tokens; 0: not
  after: tuple[int, ...] = ()  # and after each of these tokens
  most: int = 8  # of the insertions by `after`
  # And so many tokens before the prompt's end, the same for a whole batch.
  before: tuple[int, ...] = ()
  rounds: int = 1  # of latents at each of these points, one upon another

  def __post_init__(self):
    for key in ("at", "after", "before"):
      ids = arguments.whole_numbers(key, getattr(self, key))
      object.__setattr__(self, key, ids)
    for key in ("every", "most", "rounds"):
      arguments.whole_number(key, getattr(self, key))
    if any(step < 0 for step in self.at):
      raise UserError(f"at={self.at}: counts of new tokens are 0 or more")
    if self.every < 0:
      raise UserError(f"every={self.every} must be 0 (never) or more")
    for key in ("most", "rounds"):
      if getattr(self, key) < 1:
        raise UserError(f"{key}={getattr(self, key)} must be at least 1")
    if any(tokens < 1 for tokens in self.before):
      raise UserError(f"before={self.before}: counts of tokens are 1 or more")

  @classmethod
  def trained(cls, spec: Layout) -> "InsertionSchedule":
    """The schedule that a coprocessor was trained for, over all new tokens."""
    return cls(every=spec.stride, rounds=spec.rounds_per_point)

  def first(self, max_new_tokens: int) -> int:
    """The least new tokens before the first latents; below 0 in the prompt."""
    if self.before:
      return -self.forced_tokens
    return 0 if self.after else min(self.steps(max_new_tokens), default=0)

  @property
  def forced_tokens(self) -> int:
    """Tokens of a prompt's end that are decoded as if they were new."""
    return max(self.before, default=0)

  def steps(self, max_new_tokens: int) -> list[int]:
    """Counts of new tokens after which latents are due, ascending."""
    repeated = range(self.every, max_new_tokens, self.every or max_new_tokens)
    steps = {*self.at, *repeated} if self.every else {*self.at}
    return sorted(step for step in steps if step < max_new_tokens)

  def room(self, max_new_tokens: int) -> int:
    """The most insertions that there can be."""
    points = len(self.steps(max_new_tokens)) + len(set(self.before))
    return self.rounds * (points + (self.most if self.after else 0))


Plan = InsertionSchedule  # its former name, for one release


def before_stop(
  ids: Sequence[int], stop_ids: Collection[int]
) -> tuple[list[int], bool]:
  """The tokens before the first stop token, and whether there is one."""
  for i, token in enumerate(ids):
    if token in stop_ids:
      return list(ids[:i]), True
  return list(ids), False


@dataclasses.dataclass(frozen=True)
class Insertion:
  """N latents that were inserted into one sequence."""

  sequence: int
  step: int  # new tokens before them; -2: two before the prompt's end
  position: int  # of the first latent, the prompt's first token at 0
  slot: int  # of the first latent
  latents: int  # N


@dataclasses.dataclass(frozen=True)
class Declined:
  """A point where a gate let no latents through."""

  sequence: int
  step: int  # as of Insertion


class Session:
  """A batch from its context to its last token.

  Attributes:
    insertions: so far, in order.
    declined: so far, in order.
    state: what `engine` works on.
  """

  _at_once = True  # slots for latents are there from the start

  def __init__(
    self,
    model: Transformer,
    decoder: Params,  # stacked, or of decode_rows.unstack_layers
    context: Context,
    *,
    max_new_tokens: int,
    coproc: Params | None = None,
    spec: Layout | None = None,
    on: Sequence[bool] | None = None,
    plan: InsertionSchedule | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
    scored: bool = False,
    gate: Gate | None = None,
    forced_suffix: Sequence[Sequence[int]] | None = None,
  ):
    """Lays out the cache, and decodes the forced suffix if there is one.

    Args:
      model: of decoder and coprocessor.
      decoder: frozen parameters.
      context: of `context.read`; kept as it is.
      max_new_tokens: the most that `run` may be asked for.
      coproc: the coprocessor's parameters.
      spec: how its latents are laid out; None decodes without latents.
      on: [B], which sequences get latents; all by default.
      plan: when.
      sampling: the law of a token.
      seed: sequence i draws from key(seed) folded with i, whatever its batch.
      stop_ids: end a sequence.
      scored: keep each token's nll.
      gate: called wherever latents are due, by the hidden state of the row that
        predicts the next token; latents are inserted where it is true.
      forced_suffix: [B, plan.forced_tokens] tokens, the prompts' ends, where
        latents are due before these: the context is then of the rest.
    """
    b = len(context.tokens)
    self._model, self._decoder = model, decoder
    self._coproc, self._spec = coproc, spec
    self._on = np.ones(b, bool) if on is None else np.array(on, bool)
    plan, self._gate = plan or InsertionSchedule(), gate
    self._forced_tokens = plan.forced_tokens
    forced = None
    if self._forced_tokens:
      if forced_suffix is None:
        raise UserError(
          f"before={plan.before}: latents before a prompt's end need the "
          "prompt's end as forced_suffix; LM.generate gives it, a server "
          "does not"
        )
      free = np.full((b, max_new_tokens), -1, np.int32)
      forced = np.concatenate([np.array(forced_suffix, np.int32), free], 1)
    # Of the first token; stored contexts need not count from the padding.
    self._skipped = np.asarray(context.cache.positions).min(
      1, where=np.asarray(context.cache.segments) > 0, initial=NO_LIMIT
    )
    self._due: list[int] = []
    self._rounds, self._room, latents = 1, 0, 0
    pause_ids: tuple[int, ...] = ()
    if spec is not None:
      self._due = sorted({self._forced_tokens - n for n in plan.before})
      self._due += [self._forced_tokens + n for n in plan.steps(max_new_tokens)]
      self._rounds, self._room = plan.rounds, plan.room(max_new_tokens)
      latents, pause_ids = self._room * spec.latents, plan.after
      if spec.window and self._room > 1:
        raise UserError(
          f"traces.window={spec.window}: latents are inserted once, as what "
          "they stand for is hidden then; leave out every, after and before"
        )
    self._options = dict(
      sampling=sampling,
      stop_ids=stop_ids or (-1,),
      pause_ids=pause_ids,
      scored=scored,
      forced=forced,
    )
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    self.state = engine.start(
      model,
      context,
      fold(jax.random.key(seed), jnp.arange(b)),
      max_new_tokens=self._forced_tokens + max_new_tokens,
      latents=latents if self._at_once else 0,
    )
    self.insertions: list[Insertion] = []
    self.declined: list[Declined] = []
    self._count = self._step = 0
    self._done = np.zeros(b, bool)
    if self._forced_tokens:
      self.run(self._forced_tokens)

  @property
  def finished(self) -> bool:
    """All sequences have ended, or have their most new tokens."""
    return self._step >= self.state.room or bool(self._done.all())

  @property
  def done(self) -> np.ndarray:
    """[B], which sequences have ended, by a stop token or by `end`."""
    return self._done.copy()

  def end(self, sequence: int) -> None:
    """Ends a sequence; its tokens so far stay."""
    self._done[sequence] = True
    self.state = engine.end(self.state, self.done)

  def run(self, tokens: int) -> np.ndarray:  # [B, up to `tokens`]
    """Decodes up to `tokens` further tokens a sequence, latents where due."""
    first = self._step
    until = min(first + tokens, self.state.room)
    while self._step < until and not self.finished:
      self._insert_where_due()
      stop = min([until, *(d for d in self._due if d > self._step)])
      self.state = engine.decode(
        self._model, self._decoder, self.state, stop, **self._options
      )
      self._step = int(self.state.step)
      self._done = np.array(self.state.done)
    return np.asarray(self.state.generated)[:, first : self._step]

  def nll(self) -> np.ndarray:  # [B, new tokens]
    """Nats of each token under the model, 0 after a sequence's end."""
    return np.asarray(self.state.nll)[:, self._forced_tokens : self._step]

  def _insert_where_due(self) -> None:
    paused = np.asarray(self.state.paused)
    due = bool(self._due) and self._due[0] == self._step
    if due:
      self._due.pop(0)
    elif not paused.any():
      return
    on = self._on & ~self._done & (due | paused)
    # Insertions by `after` must leave room for those that are planned.
    planned = self._count + self._rounds * len(self._due)
    if not on.any() or not (due or planned + self._rounds <= self._room):
      return
    if self._gate is not None:
      wanted, on = on, on & np.asarray(self._gate(self.state.hidden))
      self.declined += [
        Declined(int(i), self._step - self._forced_tokens)
        for i in np.flatnonzero(wanted & ~on)
      ]
    for _ in range(self._rounds if on.any() else 0):
      self._insert(on)

  def _insert(self, on: np.ndarray) -> None:
    n = self._spec.latents
    slot = self.state.latent_slot(self._count, n)
    self.state = engine.insert_latents(
      self._model,
      self._decoder,
      self._coproc,
      self.state,
      self._count,
      on,
      self._spec,
    )
    self._count += 1
    self._note(on, slot)

  def _note(self, on: np.ndarray, slot: int) -> None:
    """Records latents that are now in the cache."""
    n = self._spec.latents
    first = np.asarray(self.state.position) - n - self._skipped
    self.insertions += [
      Insertion(
        int(i), self._step - self._forced_tokens, int(first[i]), slot, n
      )
      for i in np.flatnonzero(on)
    ]
