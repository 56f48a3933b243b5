"""Tokens to text as they come: whole characters, stop strings."""

import numpy as np
import pytest

from cacheaug.data import tokenizers
from cacheaug.inference.text import TextStream
from cacheaug.weights import pretrained

BYTES = tokenizers.ByteTokenizer()
TEXT = "naïve – 漢字 😀, and then END of it"


def pieces(text, sizes, stop=()):
  """All pieces, the tokens given in runs of the sizes, in turn."""
  stream, ids, found, i = TextStream(BYTES, stop), BYTES.encode(text), [], 0
  while ids:
    size = sizes[i % len(sizes)]
    found.append(stream.push(ids[:size]))
    ids, i = ids[size:], i + 1
  return [*found, stream.push([], last=True)], stream


@pytest.mark.parametrize("sizes", ((1,), (2,), (3, 1), (5,), (200,)))
def test_pieces_are_whole_characters_and_join_to_the_text(sizes):
  found, stream = pieces(TEXT, sizes)
  assert "".join(found) == stream.text == TEXT
  assert not any("\ufffd" in piece for piece in found)
  if sizes == (1,):
    assert sum(piece == "" for piece in found) > 8, "half characters came out"


@pytest.mark.parametrize("sizes", ((1,), (2,), (3, 1), (200,)))
@pytest.mark.parametrize(
  "stop, expected",
  (
    (("END",), TEXT[: TEXT.index("END")]),
    (("never", "字"), TEXT[: TEXT.index("字")]),
    (("and then ENDING",), TEXT),  # begins, and does not come
    (("n END", "then"), TEXT[: TEXT.index("then")]),
    # Both come; the one whole first ends the text, however tokens come.
    (("then END", "en"), TEXT[: TEXT.index("en")]),
    (("it",), TEXT[: TEXT.rindex("it")]),
  ),
)
def test_stop_strings_cut_wherever_tokens_end(sizes, stop, expected):
  found, stream = pieces(TEXT, sizes, stop)
  assert "".join(found) == stream.text == expected
  assert stream.stopped == (expected != TEXT)
  assert stream.push(BYTES.encode("+")) == "+" * (not stream.stopped)


def test_nothing_of_a_stop_string_is_shown_early():
  stream, shown = TextStream(BYTES, ("\n\nQ:",)), ""
  for token in BYTES.encode("a\n\nb\n\nQ: no"):
    shown += stream.push([token])
    assert "a\n\nb".startswith(shown)
  assert shown == "a\n\nb" and stream.stopped


def test_what_is_no_character_comes_at_the_end():
  half = BYTES.encode("é")[:1]
  stream = TextStream(BYTES)
  assert stream.push(BYTES.encode("a") + half) == "a"
  assert stream.push([], last=True) == "\ufffd"
  stream = TextStream(BYTES)
  assert stream.push(half + BYTES.encode("b")) == "\ufffdb"


def test_a_words_leading_space_stays(shared_data):
  """SentencePiece drops it from a text's first token."""
  path = shared_data("tokenizers", "sp_test_model_1000.model")
  tokenizer = tokenizers.load(f"sentencepiece:{path}")
  prompt, new = "Once upon a time", " there was a girl. END"
  known = tokenizer.encode(prompt)
  ids = tokenizer.encode(prompt + new)[len(known) :]
  assert tokenizer.decode(ids) == new[1:]
  for size in (1, 2, 3, 99):
    stream, text = TextStream(tokenizer, ("END",), known[-1:]), ""
    for at in range(0, len(ids), size):
      text += stream.push(ids[at : at + size])
    assert text + stream.push([], last=True) == " there was a girl. "


class Counting:
  """A tokenizer that counts the tokens it decodes."""

  def __init__(self, tokenizer):
    self.tokenizer, self.decoded = tokenizer, 0

  def decode(self, ids):
    self.decoded += len(ids)
    return self.tokenizer.decode(ids)


LONG = [TEXT, "漢字😀" * 40, "x" * 200, "\ufffd and\n\n  spaces  " * 9] * 3


@pytest.mark.parametrize("name", ("byte", "shipped", "sentencepiece"))
@pytest.mark.parametrize("size", (1, 3))
def test_long_texts_are_whole_and_take_linear_time(name, size, request):
  if name == "sentencepiece":
    shared_data = request.getfixturevalue("shared_data")
    path = shared_data("tokenizers", "sp_test_model_1000.model")
    name = f"sentencepiece:{path}"
  elif name == "shipped":
    name = f"hf:{pretrained.resolve('shipped:nano') / 'tokenizer.json'}"
  counting = Counting(tokenizers.load(name))
  before, *ids = counting.tokenizer.encode("a " + "".join(LONG))
  both = counting.tokenizer.decode([before, *ids])
  expected = both[len(counting.tokenizer.decode([before])) :]
  assert len(ids) > 800
  stream, text = TextStream(counting, ("never",), [before]), ""
  for at in range(0, len(ids), size):
    text += stream.push(ids[at : at + size])
  text += stream.push([], last=True)
  assert text == stream.text == expected
  # With all tokens decoded at each step: 400 times and more.
  assert counting.decoded * size < 100 * len(ids)


def test_bytes_that_are_no_text_come_as_at_once():
  ids = np.random.default_rng(0).integers(4, 260, 700).tolist()
  stream = TextStream(BYTES)
  text = "".join(stream.push([token]) for token in ids)
  assert text + stream.push([], last=True) == BYTES.decode(ids)
