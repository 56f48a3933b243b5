"""Text out of tokens as they come: whole characters, cut at stop strings."""

from collections.abc import Sequence

from cacheaug.data.tokenizers import Tokenizer

_HALF = "\ufffd"  # what a tokenizer gives for a character not yet whole


class TextStream:
  """The text of one sequence's new tokens, in pieces.

  The pieces joined are the text of all tokens at once, up to the first stop
  string and without it. A piece never ends within a character, nor within what
  may yet become a stop string.

  Attributes:
    text: all that may be shown so far.
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
    self._ids: list[int] = []
    self._before = list(before)
    self._known = tokenizer.decode(self._before) if before else ""
    self.text = ""
    self.stopped = False

  def push(self, ids: Sequence[int], last: bool = False) -> str:
    """Takes further tokens; returns the text that they add.

    Args:
      ids: may be none.
      last: no more will come: what was held back is given out.
    """
    if self.stopped:
      return ""
    self._ids += map(int, ids)
    text = self._decoded()
    found = [(text.find(s) + len(s), s) for s in self._stop if s in text]
    if found:  # The first to be whole, however the tokens came.
      end, stop = min(found)
      text, self.stopped = text[: end - len(stop)], True
    elif not last:
      text = text.rstrip(_HALF)
      text = text[: len(text) - self._pending(text)]
    piece = text[len(self.text) :]
    self.text += piece
    return piece

  def _decoded(self) -> str:
    text = self._tokenizer.decode(self._before + self._ids)
    if text.startswith(self._known):
      return text[len(self._known) :]
    # The new tokens complete a character that the prompt began.
    return self._tokenizer.decode(self._ids)

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
