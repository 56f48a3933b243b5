"""A frozen decoder and its coprocessor as one Python object.

  lm = cacheaug.load("path/to/gemma-2-2b")          # decoder and tokenizer
  lm.generate(["Natalia sold clips to"])            # the decoder's own text
  lm = lm.with_coprocessor("runs/gemma2b")          # a run, or an export
  lm.generate(["Natalia sold clips to"])            # augments once, at the end
  for _, piece in lm.stream(["Once upon"]): ...     # the same, as it comes
  lm.chat([{"role": "user", "content": "Hi"}])      # an instruct model's answer
  lm.nll(tokens, points=[[17, 63]], ahead=16)       # [B, M, A] nats
  context = lm.augment(lm.prefill(tokens))
  lm.decode(context, max_new_tokens=32)             # [B, 32] tokens

Everything runs on the default device. Latents are inserted where a coprocessor
is attached; `latents=False` asks for the frozen decoder alone, `latents=True`
refuses to go on without a coprocessor.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cacheaug.augment import objective
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.traces import Layout
from cacheaug.data import chat, tokenizers
from cacheaug.data.chat import Messages, Rendered
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.errors import UserError
from cacheaug.inference import arguments, gates, padding
from cacheaug.inference import context as contexts
from cacheaug.inference.completion import Completion, Completions
from cacheaug.inference.context import Context
from cacheaug.inference.gates import Gate
from cacheaug.inference.sampling import GREEDY, Sampling
from cacheaug.inference.session import InsertionSchedule, Session
from cacheaug.model.transformer import Params, Transformer
from cacheaug.weights import trained

Tokens = jax.Array | np.ndarray | Sequence[Sequence[int]]

DTYPES = ("auto", "float32", "bfloat16")

_read = jax.jit(contexts.read, static_argnames=("model", "keep_states"))
_augment = jax.jit(contexts.augment_context, static_argnames=("model", "spec"))
_nll = jax.jit(objective.points_nll, static_argnames=("model", "layout"))
_decode = jax.jit(
  contexts.decode, static_argnames=("model", "max_new_tokens", "stop_ids")
)


@dataclasses.dataclass(frozen=True)
class Coprocessor:
  """Trained parameters and the trace layout that they were trained for."""

  params: Params = dataclasses.field(repr=False)
  spec: Layout
  draw: Draw = Draw()  # how training drew its traces

  @functools.cached_property
  def layers(self) -> Params:
    """The parameters as decoding wants them."""
    body = self.params.get("transformer")
    unstacked = {"transformer": contexts.unstack_on_cpu(body)} if body else {}
    return self.params | unstacked


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
  """A frozen decoder, its tokenizer and, where attached, a coprocessor.

  Attributes:
    model: the architecture, shared by decoder and coprocessor.
    decoder: its parameters.
    tokenizer: None where the directory has none; `generate` then refuses.
    fingerprint: of the decoder's weights.
    stop_ids: tokens that end generation.
    coprocessor: None until `with_coprocessor`.
  """

  model: Transformer = dataclasses.field(repr=False)
  decoder: Params = dataclasses.field(repr=False)
  tokenizer: Tokenizer | None = dataclasses.field(repr=False)
  fingerprint: str
  stop_ids: tuple[int, ...] = ()
  coprocessor: Coprocessor | None = None

  def with_coprocessor(self, path: str | Path) -> "LM":
    """The same decoder with a coprocessor.

    Args:
      path: an exported directory, 'shipped:NAME', or a run's workdir, whose
        newest whole checkpoint is read.

    Raises:
      UserError: nothing of the kind there, or one trained for other weights.
    """
    found = trained.open_coprocessor(
      path, self.model.config, self.decoder, dtype=self.model.dtype
    )
    if found.fingerprint != self.fingerprint:
      raise UserError(
        f"{path}: this coprocessor was trained for decoder "
        f"{found.fingerprint} ({found.source or 'random'}), the one loaded is "
        f"{self.fingerprint}: load that decoder, or give its own coprocessor"
      )
    return dataclasses.replace(
      self, coprocessor=Coprocessor(found.params, found.spec, found.draw)
    )

  def encode(self, text: str) -> list[int]:
    """Its tokens as `transformers` gives them, special ones included.

    Raises:
      UserError: no tokenizer, or what is not text.
    """
    arguments.instance("text", text, str)
    if self.tokenizer is None:
      raise UserError(
        "this decoder came without tokenizer.json or tokenizer.model: put it "
        "beside the weights, or use prefill and decode with tokens"
      )
    return tokenizers.with_special(self.tokenizer, text)

  def render(self, messages: Messages, **variables: Any) -> Rendered:
    """A conversation as the text that an instruct model was tuned on.

    Args:
      messages: [{"role": "user", "content": "..."}, ...].
      **variables: of `data.chat.render`: add_generation_prompt, tools, ...

    Returns:
      A prompt: `generate` and `encode` read its special tokens.

    Raises:
      UserError: no tokenizer or no chat template, or messages that it refuses.
    """
    if self.tokenizer is None:
      self.encode("")  # refuses
    return chat.render(
      self.tokenizer.chat_templates,
      messages,
      special_tokens=self.tokenizer.special_tokens,
      **variables,
    )

  def chat(
    self, messages: Messages, max_new_tokens: int = 128, **options: Any
  ) -> str:
    """The model's answer to a conversation.

    Args:
      messages: as of `render`.
      max_new_tokens: at least 1.
      **options: as of `generate`.

    Raises:
      UserError: as of `render` and `generate`.
    """
    prompt = self.render(messages)
    return self.generate([prompt], max_new_tokens, **options)[0]

  def prefill(self, tokens: Tokens) -> Context:
    """The decoder reads contexts.

    Args:
      tokens: [B, S], or lists of unequal lengths, which are padded on the
        left. Nothing is put before them: a BOS is the caller's.

    Raises:
      UserError: an empty context, a token outside the vocabulary, or more
        tokens than the decoder has positions.
    """
    rows = self._checked(tokens)
    return self._read(*padding.pad_left(rows, self._pad_id))

  def augment(self, context: Context) -> Context:
    """N latents at the end of each context; of a fresh `prefill`, once.

    Raises:
      UserError: no coprocessor, a context shorter than the latents need, or
        one that has latents already.
    """
    coproc = self._coprocessor()
    arguments.instance("context", context, Context)
    if context.augmented:
      raise UserError("context has latents already: augment a fresh prefill")
    lengths = (np.asarray(context.documents) >= 0).sum(1)
    contexts.check_prompts([[0] * int(n) for n in lengths], coproc.spec)
    return _augment(
      self.model, self._layers, coproc.layers, context, coproc.spec
    )

  def decode(
    self,
    context: Context,
    max_new_tokens: int = 128,
    *,
    stop_ids: tuple[int, ...] | None = None,
  ) -> np.ndarray:  # [B, max_new_tokens]
    """The most likely continuation of each context.

    Args:
      context: of `prefill` or `augment`; not changed.
      max_new_tokens: at least 1.
      stop_ids: end a sequence, which is filled up with the first of them; the
        decoder's own by default, () for none.

    Raises:
      UserError: more tokens than the decoder has positions.
    """
    arguments.instance("context", context, Context)
    max_new_tokens = arguments.whole_number("max_new_tokens", max_new_tokens, 1)
    if stop_ids is None:
      stop_ids = self.stop_ids
    stop_ids = arguments.whole_numbers("stop_ids", stop_ids)
    longest = int((np.asarray(context.documents) >= 0).sum(1).max())
    pushed = int(np.asarray(context.position).max()) - context.tokens.shape[1]
    self._check_positions(longest + pushed, max_new_tokens)
    out = _decode(
      self.model,
      self._layers,
      context,
      max_new_tokens=max_new_tokens,
      stop_ids=stop_ids or (-1,),
    )
    return np.asarray(out)

  def generate(
    self,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    *,
    latents: bool | Sequence[bool] | None = None,
    plan: InsertionSchedule | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] | None = (),
    gate: str | Gate = "",
  ) -> list[str]:
    """Continuations.

    A BOS is put first where the decoder's tokenizer has one; a stop token ends
    a text and is left out of it.

    Args:
      prompts: texts, in one batch.
      max_new_tokens: at least 1.
      latents: for all prompts, or for each; by default where a coprocessor is
        attached. Where False, the text is the frozen decoder's, whatever the
        others have.
      plan: when latents are inserted; at the prompt's end, and again if the
        coprocessor was trained for it (InsertionSchedule.trained), by default.
      sampling: the law of a token; the most likely one by default.
      seed: of the draws. Prompt i's draws do not depend on the others.
      stop: strings that end a text and are left out of it; None for none.
      gate: whether they are, for each prompt and time: 'entropy:NATS',
        'head:DIR[:NATS]' (inference/gates.py) or a function; by default always.

    Raises:
      UserError: no tokenizer, no coprocessor with latents=True, prompts that
        are too short or too long, or an argument of another type.
    """
    options = dict(latents=latents, plan=plan, sampling=sampling, seed=seed)
    options["gate"] = gate
    done = self.complete(prompts, max_new_tokens, stop=stop, **options)
    return [completion.text for completion in done]

  def complete(
    self, prompts: Sequence[str], max_new_tokens: int = 128, **options: Any
  ) -> list[Completion]:
    """`generate`, with tokens and where latents went.

    Args:
      prompts: as of `generate`.
      max_new_tokens: as of `generate`.
      **options: as of `generate`; `scored=True` gives each token's nll too.
    """
    writer = self.writer(prompts, max_new_tokens, **options)
    return writer.complete() if writer else []

  def stream(
    self, prompts: Sequence[str], max_new_tokens: int = 128, **options: Any
  ) -> Iterator[tuple[int, str]]:
    """`generate`, as it comes: (prompt, further text).

    Each prompt's pieces joined are what `generate` gives.
    """
    writer = self.writer(prompts, max_new_tokens, **options)
    return writer.pieces(1) if writer else iter(())

  def writer(
    self,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    latents: bool | Sequence[bool] | None = None,
    plan: InsertionSchedule | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] | None = (),
    scored: bool = False,
    gate: str | Gate = "",
  ) -> Completions | None:
    """Prompts read and laid out, to be run; None where there are none.

    Arguments and errors as of `complete`. `latents` as a list keeps room for
    them even where none is True: the very programs of the others.

    Raises:
      UserError: a list of another length than the prompts, besides.
    """
    prompts = arguments.texts("prompts", prompts)
    max_new_tokens = arguments.whole_number("max_new_tokens", max_new_tokens, 1)
    stop, seed = arguments.stop_strings(stop), arguments.seed(seed)
    arguments.instance("sampling", sampling, Sampling)
    arguments.instance(
      "plan", InsertionSchedule() if plan is None else plan, InsertionSchedule
    )
    if gate is not None and not isinstance(gate, str) and not callable(gate):
      raise UserError(f"gate={gate!r} is neither 'NAME:NATS' nor a function")
    latents = self.coprocessor is not None if latents is None else latents
    on = arguments.switches("latents", latents, len(prompts))
    frozen = isinstance(latents, bool | np.bool_) and not latents
    coproc = None if frozen else self._coprocessor()
    if not prompts:
      return None
    rows = self._checked([self.encode(p) for p in prompts])
    spec = coproc and coproc.spec
    plan = plan or (
      InsertionSchedule.trained(spec) if coproc else InsertionSchedule()
    )
    if coproc:
      first = plan.first(max_new_tokens)
      contexts.check_prompts(rows, spec, on=on, tokens_before=first)
    if isinstance(gate, str):
      gate = gate and gates.parse(
        gate, self.model, self.decoder, self.fingerprint
      )
    longest = max(map(len, rows))
    pushed = 0
    if coproc and spec.positions == "insert":
      pushed = plan.room(max_new_tokens) * spec.latents
    self._check_positions(longest + pushed, max_new_tokens)
    plan = plan if coproc else InsertionSchedule()
    forced_suffix = [row[len(row) - plan.forced_tokens :] for row in rows]
    read = [row[: len(row) - plan.forced_tokens] for row in rows]
    context, plan = self._begin(read, on, plan)
    ends = dict(stop_ids=self.stop_ids, scored=scored)
    session = Session(
      self.model,
      self._layers,
      context,
      max_new_tokens=max_new_tokens,
      coproc=coproc and coproc.layers,
      spec=spec,
      on=on,
      plan=plan,
      sampling=sampling,
      seed=seed,
      gate=gate or None,
      forced_suffix=forced_suffix,
      **ends,
    )
    return Completions(session, self.tokenizer, rows, stop=stop, **ends)

  def _begin(
    self, rows: list[list[int]], on: Sequence[bool], plan: InsertionSchedule
  ) -> tuple[Context, InsertionSchedule]:
    """What `writer` goes on from, and the insertions still to come."""
    padded = padding.round_up(max(map(len, rows)), padding.PROMPT)
    return self._read(*padding.pad_left(rows, self._pad_id, padded)), plan

  def _read(self, tokens: np.ndarray, documents: np.ndarray) -> Context:
    spec = self.coprocessor and self.coprocessor.spec
    keep = {"keep_states": True} if contexts.reads_states(spec) else {}
    return _read(self.model, self._layers, tokens, documents, **keep)

  def nll(
    self,
    tokens: Tokens,
    points: Sequence[Sequence[int]],
    ahead: int = 16,
    *,
    latents: bool | None = None,
  ) -> np.ndarray:  # [B, M, A] nats
    """Negative log-likelihood of the tokens after each point.

    Args:
      tokens: [B, S], each row one document.
      points: [B, M], or [1, M] for all rows alike: index of the last token
        seen; latents stand after it.
      ahead: A, tokens scored after each.
      latents: False gives the frozen decoder's; by default latents are there
        where a coprocessor is attached.

    Raises:
      UserError: a point without room for the latents before it or the ahead
        tokens after it, or no coprocessor with latents=True.
    """
    rows = self._checked(tokens)
    if len({len(row) for row in rows}) != 1:
      raise UserError("tokens: rows of one length are needed, [B, S]")
    tokens = np.array(rows, np.int32)
    ahead = arguments.whole_number("ahead", ahead, 1)
    spec, coproc = Layout(1, 1), None
    latents = self.coprocessor is not None if latents is None else latents
    (latents,) = arguments.switches("latents", latents, 1)
    if latents:
      coproc, spec = self._coprocessor().params, self.coprocessor.spec
    points = self._points(points, tokens.shape, ahead, spec if latents else 0)
    layout = spec.with_horizon(ahead)
    nll = _nll(self.model, self.decoder, coproc, tokens, points, layout)
    return np.asarray(nll)

  def _coprocessor(self) -> Coprocessor:
    if self.coprocessor is None:
      raise UserError(
        "no coprocessor is attached: lm = lm.with_coprocessor(PATH), or give "
        "latents=False"
      )
    return self.coprocessor

  @property
  def _pad_id(self) -> int:
    return 0 if self.tokenizer is None else self.tokenizer.pad_id

  @functools.cached_property
  def _layers(self) -> Params:
    """The decoder as decoding wants it."""
    return contexts.unstack_on_cpu(self.decoder)

  def _checked(self, tokens: Tokens) -> list[list[int]]:
    """As lists, none empty, of the vocabulary, within the positions."""
    try:
      rows = [np.asarray(row).tolist() for row in tokens]
    except (TypeError, ValueError) as e:  # No rows at all, or rows in a row.
      raise UserError("tokens: give [B, S] ids, or a list of ids a row") from e
    if not rows:
      raise UserError("tokens is empty: give at least one row")
    vocab = self.model.config.vocab_size
    for i, row in enumerate(rows):
      if not isinstance(row, list):
        raise UserError("tokens: a row is a number: give [B, S], a row each")
      if not row:
        raise UserError(f"tokens: row {i} is empty: give at least one token")
      wrong = [t for t in row if type(t) is not int or not 0 <= t < vocab]
      if wrong:
        raise UserError(
          f"tokens: {wrong[0]!r} in row {i} is not a token from 0 to "
          f"{vocab - 1}"
        )
    self._check_positions(max(map(len, rows)), 0)
    return rows

  def _check_positions(self, context: int, new: int) -> None:
    limit = self.model.config.longest_context
    if context + new > limit:
      more = f" and {new} new ones" if new else ""
      raise UserError(
        f"{context} tokens{more} exceed the decoder's {limit} positions: "
        "shorten the prompt, or ask for fewer"
      )

  def _points(
    self,
    points: Sequence[Sequence[int]],
    shape: tuple[int, int],
    ahead: int,
    spec: Layout | int,
  ) -> np.ndarray:
    """[B, M], each with room before and after it."""
    b, s = shape
    try:
      points = np.asarray(points)
    except ValueError:  # Rows of unequal lengths.
      points = np.empty(0)
    if points.ndim != 2 or not points.size or points.dtype.kind not in "iu":
      raise UserError("points: give whole numbers, [[p, ...]] or a row each")
    if points.shape[0] not in (1, b):
      raise UserError(
        f"points has {points.shape[0]} rows, tokens {b}: give as many, or one"
      )
    first = spec.context_needed - 1 if spec else 0
    last = s - 1 - ahead
    wrong = points[(points < first) | (points > last)]
    if wrong.size:
      raise UserError(
        f"points: {wrong[0]} is not from {first} to {last}, which leaves room "
        f"for the latents and ahead={ahead} in {s} tokens"
      )
    return np.broadcast_to(points, (b, points.shape[1])).astype(np.int32)
