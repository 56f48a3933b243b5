"""A session's tokens as text: in pieces as they come, and as completions."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from cacheaug.data.tokenizers import Tokenizer
from cacheaug.inference.session import (
  Declined,
  Insertion,
  Session,
  before_stop,
)
from cacheaug.inference.text import TextStream

# Tokens between looks for a stop string where nobody reads along.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Completion:
  """The result of one sequence."""

  prompt: tuple[int, ...]  # its tokens, BOS too
  text: str  # without the stop string or token
  ids: tuple[int, ...]  # without the stop token, with a stop string's tokens
  nll: np.ndarray | None  # [len(ids)] nats under the model, where scored
  insertions: tuple[Insertion, ...]
  declined: tuple[Declined, ...] = ()  # where a gate declined latents


class Completions:
  """Runs a session to its end.

  Attributes:
    session: what is run.
  """

  def __init__(
    self,
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    stop_ids: tuple[int, ...] = (),
    scored: bool = False,
  ):
    """`stop` are strings that end a text; the others as the session's."""
    self.session = session
    self._streams = [TextStream(tokenizer, stop, p[-1:]) for p in prompts]
    self._prompts = [tuple(p) for p in prompts]
    self._ids: list[list[int]] = [[] for _ in prompts]
    self._ended = [False] * len(prompts)
    self._stop, self._stop_ids, self._scored = stop, stop_ids, scored

  def advance(self, tokens: int) -> list[tuple[int, str]]:
    """Up to so many further tokens: (sequence, further text) where any."""
    new = self.session.run(tokens)
    last, pieces = self.session.finished, []
    for i, row in enumerate(new.tolist()):
      piece = "" if self._ended[i] else self._take(i, row, last)
      if piece:
        pieces.append((i, piece))
    return pieces

  def pieces(self, tokens: int) -> Iterator[tuple[int, str]]:
    """All that comes, after every so many tokens."""
    while not self.session.finished:
      yield from self.advance(tokens)

  def complete(self) -> list[Completion]:
    """All sequences to their ends."""
    while not self.session.finished:
      self.advance(_CHUNK if self._stop else self.session.state.room)
    nll = self.session.nll() if self._scored else None
    session = self.session

    def own(found, i):
      return tuple(x for x in found if x.sequence == i)

    return [
      Completion(
        prompt=self._prompts[i],
        text=stream.text,
        ids=tuple(ids),
        nll=None if nll is None else nll[i, : len(ids)],
        insertions=own(session.insertions, i),
        declined=own(session.declined, i),
      )
      for i, (stream, ids) in enumerate(
        zip(self._streams, self._ids, strict=True)
      )
    ]

  def _take(self, i: int, row: list[int], last: bool) -> str:
    """Adds a sequence's tokens; ends it at a stop token or string."""
    row, stopped = before_stop(row, self._stop_ids)
    last = last or stopped
    stream, piece = self._streams[i], ""
    # One by one, to know the token with which a stop string became whole.
    for ids in [[t] for t in row] if self._stop else [row]:
      piece += stream.push(ids)
      self._ids[i] += ids
      if stream.stopped:
        self.session.end(i)
        break
    if last:
      piece += stream.push([], last=True)
    self._ended[i] = last or stream.stopped
    return piece
