"""Text out of tokens as they come: whole characters, cut at stop strings."""

from collections.abc import Sequence

from cacheaug.data.tokenizers import Tokenizer

_HALF = "\ufffd"  # what a tokenizer gives for a character not yet whole
# Tokens that are decoded again with each new one, at most. Older ones change
# nothing: a character is at most four bytes, and so at most four tokens.
_WINDOW = 64
_KEPT = 16  # of these that stay when the window moves on
_BEFORE = 8  # of the kept ones whose text has been given out


class TextStream:
  """The text of one sequence's new tokens, in pieces.

  The pieces joined are the text of all tokens at once, up to the first stop
  string and without it. A piece never ends within a character, nor within what
  may yet become a stop string. Time grows with the tokens, not their square.

  Attributes:
    stopped: a stop string was found.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    stop: Sequence[str] = (),
    before: Sequence[int] = (),
  ):
    """Starts empty.

    Args:
      tokenizer: of the tokens.
      stop: strings that end the text, none empty.
      before: the prompt's last token: some tokenizers write a word's leading
        space only where a token precedes it.
    """
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    # Decoded together: tokens whose text is known, and those after them.
    self._before, self._ids = list(before), []
    self._known = tokenizer.decode(self._before) if before else ""
    self._pieces: list[str] = []
    self._shown = 0  # characters of the window's text that are in pieces
    self._limit = _WINDOW
    self.stopped = False

  @property
  def text(self) -> str:
    """All that may be shown so far."""
    return "".join(self._pieces)

  def push(self, ids: Sequence[int], last: bool = False) -> str:
    """Takes further tokens; returns the text that they add.

    Args:
      ids: may be none.
      last: no more will come: what was held back is given out.
    """
    if self.stopped:
      return ""
    self._ids += map(int, ids)
    text = self._decoded(self._ids)
    # What was shown holds no stop string, nor a beginning of one at its end.
    found = [(text.find(s) + len(s), s) for s in self._stop if s in text]
    if found:  # The first to be whole, however the tokens came.
      end, stop = min(found)
      text, self.stopped = text[: end - len(stop)], True
    elif not last:
      text = text.rstrip(_HALF)
      text = text[: len(text) - self._pending(text)]
    piece = text[self._shown :]
    if piece:
      self._pieces.append(piece)
      self._shown += len(piece)
    if len(self._ids) > self._limit:
      self._move_on()
    return piece

  def _decoded(self, ids: list[int]) -> str:
    text = self._tokenizer.decode(self._before + ids)
    if text.startswith(self._known):
      return text[len(self._known) :]
    # The new tokens complete a character that the prompt began.
    return self._tokenizer.decode(ids)

  def _move_on(self) -> None:
    """Leaves old tokens out of the window where that changes no text.

    Where none can go (a run of bytes that is one character to the tokenizer)
    the window grows, so that this is tried seldom.
    """
    whole = self._decoded(self._ids)
    for keep in range(_KEPT, 2 * _KEPT):
      old, rest = self._ids[:-keep], self._ids[-keep:]
      done = self._decoded(old)
      if len(done) > self._shown or not whole.startswith(done):
        continue
      before = old[-_BEFORE:]
      known = self._tokenizer.decode(before)
      text = self._tokenizer.decode(before + rest)
      if text.startswith(known) and text[len(known) :] == whole[len(done) :]:
        self._before, self._ids, self._known = before, rest, known
        self._shown -= len(done)
        self._limit = _WINDOW
        return
    self._limit *= 2

  def _pending(self, text: str) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max(
      (
        n
        for stop in self._stop
        for n in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:n])
      ),
      default=0,
    )
