"""Answers to many prompts, by the frozen decoder and with latents at once.

What evaluation asks of a language model: the log-likelihood of continuations
of a context, that of running text, and greedy or drawn text after a prompt.
The decoder reads each context once; both columns go on from that one cache,
the augmented one after N latents at the context's end, so that they differ in
the latents and in nothing else.

  short contexts   one that has fewer tokens than the latents stand on (an
                   empty one is a single BOS) gets none: its augmented answer
                   is the frozen one. They are counted.
  long contexts    lose tokens on the left, for both columns alike. Where
                   latents take positions of their own ('insert'), room for
                   them is kept in both.
  running text     has no prompt whose end could bear latents. They are renewed
                   every A tokens, the A that the coprocessor was trained for:
                   each token is predicted once, from what precedes it and from
                   the latents before its block. Those before the first point
                   that has room for latents are the frozen decoder's.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from cacheaug.augment import objective, traces
from cacheaug.augment.coprocessor import source_cache
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context as prompt_contexts
from cacheaug.inference import padding
from cacheaug.inference.context import Context
from cacheaug.inference.sampling import GREEDY, Sampling
from cacheaug.inference.session import Session, before_stop
from cacheaug.lm import LM
from cacheaug.model import transformer
from cacheaug.model.attention import NO_LIMIT, QueryLayout
from cacheaug.model.transformer import Params, Transformer

FROZEN, AUGMENTED = "frozen", "augmented"
# The most continuations of one context that are scored side by side.
_WIDEST = 8
# New tokens between two looks for a stop string.
_CHUNK = 16

_read = jax.jit(prompt_contexts.read, static_argnames=("model", "keep_states"))
_augment = jax.jit(
  prompt_contexts.augment_context, static_argnames=("model", "spec")
)

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to be continued; equal ones are answered once.

  Where it is drawn, its draws are those of its place in a batch, the same in
  both columns.
  """

  prompt: Ids
  max_new_tokens: int
  stop: tuple[str, ...] = ()
  sampling: Sampling = GREEDY


class Answerer:
  """An LM that answers in batches of few shapes, and remembers.

  Attributes:
    columns: 'frozen', and 'augmented' where latents are requests for.
    max_length: the most tokens of a context and its continuation but one.
    counts: since it was last cleared: 'requests', of these 'short' (no
      room for latents) and 'truncated', and 'windows' of running text.
  """

  def __init__(self, lm: LM, *, latents: bool | None = None, batch: int):
    """Answers by `lm`.

    Args:
      lm: with a tokenizer, and a coprocessor where latents are requests for.
      latents: answer with latents too; by default where there is a
        coprocessor.
      batch: contexts at a time.

    Raises:
      UserError: no coprocessor or tokenizer, or a batch below 1.
    """
    if batch < 1:
      raise UserError(f"batch={batch} must be at least 1")
    latents = lm.coprocessor is not None if latents is None else latents
    if latents and lm.coprocessor is None:
      raise UserError(
        "no coprocessor is attached: lm = lm.with_coprocessor(PATH), or give "
        "latents=False"
      )
    lm.encode("")  # refuses where there is no tokenizer
    self.lm = lm
    self.columns = (FROZEN, AUGMENTED) if latents else (FROZEN,)
    self.counts: collections.Counter[str] = collections.Counter()
    self._spec = lm.coprocessor.spec if latents else None
    self._batch = batch
    self._known: dict[Any, dict[str, Any]] = {}
    self._layers = prompt_contexts.unstack_on_cpu(lm.decoder)
    reserve = 0
    if latents and self._spec.positions == "insert":
      reserve = self._spec.latents
    self.max_length = lm.model.config.max_positions - reserve

  def loglikelihoods(
    self, pairs: Sequence[tuple[Ids, Ids]]
  ) -> list[dict[str, tuple[float, bool]]]:
    """Scores each (context, continuation), neither empty, in each column.

    Returns:
      the continuation's log-probability in nats, and whether each of its
      tokens is the most likely one.

    Raises:
      UserError: a continuation without tokens, or longer than the decoder.
    """
    cut = [self._cut(*pair) for pair in pairs]
    self._count([context for context, _ in cut])
    new = dict.fromkeys(pair for pair in cut if pair not in self._known)
    groups: dict[Ids, list[Ids]] = {}
    for context, continuation in new:
      groups.setdefault(context, []).append(continuation)
    rows = [
      (context, some[i : i + _WIDEST])
      for context, some in groups.items()
      for i in range(0, len(some), _WIDEST)
    ]
    for some in self._batches(rows, lambda row: len(row[0])):
      self._score(some)
    return [self._known[pair] for pair in cut]

  def texts(self, requests: Sequence[Request]) -> list[dict[str, str]]:
    """Continues each prompt up to a stop string, in each column.

    Raises:
      UserError: more new tokens than the decoder has positions.
    """
    cut = []
    for one in requests:
      if one.max_new_tokens < 1:
        raise UserError(f"max_gen_toks={one.max_new_tokens} must be at least 1")
      room = self.max_length - one.max_new_tokens
      if room < 1:
        raise UserError(
          f"max_gen_toks={one.max_new_tokens} leaves no room for a prompt in "
          f"{self.max_length} positions: give a smaller max_gen_toks"
        )
      self.counts["truncated"] += len(one.prompt) > room
      cut.append(dataclasses.replace(one, prompt=one.prompt[-room:]))
    self._count([one.prompt for one in cut])
    kinds: dict[Any, list[Request]] = {}
    for one in dict.fromkeys(one for one in cut if one not in self._known):
      kind = dataclasses.replace(one, prompt=())
      kinds.setdefault(kind, []).append(one)
    for kind in kinds.values():
      for some in self._batches(kind, lambda one: len(one.prompt)):
        self._write(some)
    return [self._known[one] for one in cut]

  def running(
    self, windows: Sequence[tuple[Ids, Ids]]
  ) -> list[dict[str, float]]:
    """Log-probability of each window's second part, by column.

    Args:
      windows: (what comes before and is not scored, at least one token; what
        is scored), together at most max_length + 1 tokens.
    """
    self.counts["windows"] += len(windows)
    keys = [("running", *window) for window in windows]
    new = dict.fromkeys(key for key in keys if key not in self._known)
    for some in self._batches(list(new), lambda k: len(k[1]) + len(k[2])):
      self._run(some)
    return [self._known[key] for key in keys]

  def _count(self, contexts: list[Ids]) -> None:
    self.counts["requests"] += len(contexts)
    if self._spec:
      needed = self._spec.context_needed
      self.counts["short"] += sum(len(c) < needed for c in contexts)

  def _cut(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
    """The context without what is too long, on the left."""
    if not continuation:
      raise UserError(
        "a continuation has no tokens: its log-likelihood says nothing"
      )
    room = self.max_length + 1 - len(continuation)
    if room < 1:
      raise UserError(
        f"a continuation of {len(continuation)} tokens exceeds the decoder's "
        f"{self.max_length} positions"
      )
    self.counts["truncated"] += len(context) > room
    return context[-room:], continuation

  def _batches(
    self, rows: list[Any], length: Callable[[Any], int]
  ) -> Iterable[list[Any]]:
    """Rows of like length together, the longest first (it fits or fails)."""
    rows = sorted(rows, key=lambda row: -padding.bucket(length(row)))
    # A bar on a terminal alone.
    with tqdm.tqdm(total=len(rows), unit="prompt", disable=None) as bar:
      for i in range(0, len(rows), self._batch):
        yield rows[i : i + self._batch]
        bar.update(len(rows[i : i + self._batch]))

  def _contexts(self, prompts: list[Ids]) -> tuple[dict, list[bool]]:
    """Each column's context after `prompts`, and which have room for latents.

    As many as are requests for at a time, the last one again where there are
    fewer: shapes are compiled for.
    """
    rows = [list(prompt) for prompt in prompts]
    rows += [rows[-1]] * (self._height(len(rows)) - len(rows))
    tokens, documents = padding.pad_left(
      rows, self.lm.tokenizer.pad_id, padding.bucket(max(map(len, rows)))
    )
    model, spec = self.lm.model, self._spec
    keep = {"keep_states": True} if prompt_contexts.reads_states(spec) else {}
    context = _read(model, self._layers, tokens, documents, **keep)
    if self._spec is None:
      return {FROZEN: context}, [False] * len(rows)
    return {FROZEN: context}, [
      len(row) >= self._spec.context_needed for row in rows
    ]

  def _height(self, count: int) -> int:
    return min(self._batch, padding.power(count))

  def _score(self, rows: list[tuple[Ids, list[Ids]]]) -> None:
    contexts, room = self._contexts([context for context, _ in rows])
    if any(room):
      coproc = self.lm.coprocessor.layers
      contexts[AUGMENTED] = _augment(
        self.lm.model, self._layers, coproc, contexts[FROZEN], self._spec
      )
    m = padding.power(max(len(some) for _, some in rows))
    a = padding.power(max(len(ids) for _, some in rows for ids in some))
    targets = np.zeros((len(room), m, a), np.int32)
    lengths = np.zeros((len(room), m, 1), np.int32)
    for b, (_, some) in enumerate(rows):
      for j, ids in enumerate(some):
        targets[b, j, : len(ids)] = ids
        lengths[b, j] = len(ids)
    scores = {
      column: jax.device_get(
        _loglikelihood(self.lm.model, self._layers, context, targets, lengths)
      )
      for column, context in contexts.items()
    }
    for b, (context, some) in enumerate(rows):
      for j, ids in enumerate(some):
        self._known[context, ids] = {
          column: tuple(
            x[b, j].item()
            for x in scores[AUGMENTED if self._in(column, room[b]) else FROZEN]
          )
          for column in self.columns
        }

  @staticmethod
  def _in(column: str, room: bool) -> bool:
    return column == AUGMENTED and room

  def _write(self, requests: list[Request]) -> None:
    contexts, room = self._contexts([one.prompt for one in requests])
    found = {FROZEN: self._texts_after(contexts[FROZEN], requests, None)}
    if any(room):
      found[AUGMENTED] = self._texts_after(contexts[FROZEN], requests, room)
    for i, one in enumerate(requests):
      self._known[one] = {
        column: found[AUGMENTED if self._in(column, room[i]) else FROZEN][i]
        for column in self.columns
      }

  def _texts_after(
    self, context: Context, requests: list[Request], on: list[bool] | None
  ) -> list[str]:
    """Texts after a context, with latents where `on`."""
    first, lm = requests[0], self.lm
    session = Session(
      lm.model,
      self._layers,
      context,
      max_new_tokens=first.max_new_tokens,
      coproc=None if on is None else lm.coprocessor.layers,
      spec=None if on is None else self._spec,
      on=on,
      sampling=first.sampling,
      stop_ids=lm.stop_ids,
    )
    height = len(context.tokens)
    ids: list[list[int]] = [[] for _ in range(height)]
    for i in range(len(requests), height):
      session.end(i)  # there to fill the batch
    while not session.finished:
      done = session.done
      for i, row in enumerate(session.run(_CHUNK).tolist()):
        if i >= len(requests) or done[i]:
          continue
        ids[i] += before_stop(row, lm.stop_ids)[0]
        text = lm.tokenizer.decode(ids[i])
        if not session.done[i] and any(stop in text for stop in first.stop):
          session.end(i)
    return [
      cut_at(lm.tokenizer.decode(row), first.stop)
      for row in ids[: len(requests)]
    ]

  def _run(self, keys: list[tuple[str, Ids, Ids]]) -> None:
    rows = [[*before, *scored] for _, before, scored in keys]
    # One more than a bucket: the last token is a target alone.
    t = padding.bucket(max(map(len, rows)) - 1) + 1
    tokens = np.zeros((self._height(len(rows)), t), np.int32)
    documents = np.full_like(tokens, -1)
    for b, row in enumerate(rows):
      tokens[b, : len(row)], documents[b, : len(row)] = row, 0
    args = self.lm.model, self.lm.decoder
    coproc, spec = None, Layout(1, 1)
    points = np.full((len(tokens), 1), -1, np.int32)
    if self._spec:
      coproc, spec = self.lm.coprocessor.params, self._spec
      points = np.full((len(tokens), -(-t // spec.ahead)), -1, np.int32)
      for b, (_, before, scored) in enumerate(keys):
        first = max(len(before), spec.context_needed) - 1
        last = len(before) + len(scored) - 1
        there = np.arange(first, last, spec.ahead)
        points[b, : len(there)] = there
    frozen, augmented = jax.device_get(
      _running(*args, coproc, tokens, documents, points, spec)
    )
    for b, (_, before, _) in enumerate(keys):
      nll = {FROZEN: frozen[b, : len(rows[b]) - 1]}
      if self._spec:
        nll[AUGMENTED] = nll[FROZEN].copy()
        for p, block in zip(points[b], augmented[b], strict=True):
          if p >= 0:
            there = nll[AUGMENTED][p : p + spec.ahead]
            there[:] = block[: len(there)]
      first = len(before) - 1
      self._known[keys[b]] = {
        column: -float(nll[column][first:].sum(dtype=np.float64))
        for column in self.columns
      }


def cut_at(text: str, stops: Sequence[str]) -> str:
  """The text before the first of `stops`."""
  for stop in stops:
    text = text.split(stop, 1)[0] if stop else text
  return text


@functools.partial(jax.jit, static_argnames="model")
def _loglikelihood(
  model: Transformer,
  decoder: Params,
  context: Context,
  targets: jax.Array,  # [B, M, A] tokens
  lengths: jax.Array,  # [B, M, 1], of which so many count
) -> tuple[jax.Array, jax.Array]:  # nats [B, M], most likely [B, M]
  """Scores M continuations of each context, side by side."""
  b, m, a = targets.shape
  hidden = jnp.broadcast_to(
    context.hidden[:, None, None], (b, m, 1, context.hidden.shape[-1])
  )
  if a > 1:
    steps = jnp.arange(a - 1, dtype=jnp.int32)[None, None]
    positions = context.position[:, None, None] + steps
    positions = jnp.broadcast_to(positions, (b, m, a - 1))
    rows = QueryLayout(
      positions,
      jnp.ones_like(positions),
      jnp.full((b, m, 1), NO_LIMIT, jnp.int32),
    )
    x = transformer.embed(model, decoder, targets[..., :-1])
    further = transformer.run_blocks(model, decoder, x, rows, context.cache)
    hidden = jnp.concatenate([hidden, further.astype(hidden.dtype)], 2)

  def place(of):  # One of A at a time: all logits at once are A times larger.
    hidden, target = of
    logits = transformer.logits(model, decoder, hidden)
    at = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    chosen = jnp.argmax(logits, -1) == target
    return at - jax.nn.logsumexp(logits, -1), chosen

  each, chosen = jax.lax.map(
    place, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(targets, 2, 0))
  )
  counts = jnp.arange(a)[:, None, None] < lengths[..., 0][None]  # [A, B, M]
  return jnp.where(counts, each, 0).sum(0), (chosen | ~counts).all(0)


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def _running(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokens: jax.Array,  # [B, T]
  documents: jax.Array,  # [B, T], -1 = padding
  points: jax.Array,  # [B, M], -1 = none
  spec: Layout,
) -> tuple[jax.Array, jax.Array]:  # nats [B, T - 1], [B, M, A]
  """Nll of each token, and of the tokens after each point with latents."""
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, spec
  )
  frozen = objective.next_token_nll(model, decoder, hidden, tokens)
  if coproc is None:
    return frozen, jnp.zeros((*points.shape, spec.ahead))
  placed = traces.layout_traces(tokens, documents, points, spec)
  read = source_cache(model, coproc, cache, hidden, spec)
  nll = objective.traces_nll(model, decoder, coproc, cache, placed, read)
  return frozen, nll
