"""Tokenizers: bytes, SentencePiece, Hugging Face `tokenizer.json`, GGUF.

`encode` adds no special token and reads none out of the text: a document that
spells "<eos>" is encoded as those five characters. What stands before and
after each text, for tokenizers that put something there, is `prefix` and
`suffix`.
"""

import collections.abc
import pathlib
from typing import Protocol

from cacheaug import errors
from cacheaug.data import chat, gguf_tokenizer, tokenizer_json
from cacheaug.data.tokenizer_json import HuggingFaceTokenizer, well_formed


class Tokenizer(Protocol):
  """The interface of a tokenizer.

  Attributes:
    name: identifies the mapping from text to ids; part of cache addresses.
    vocab_size: every id that a text has is below it. Special tokens that no
      text gives may lie beyond.
    pad_id: id that fills rows; never a target.
    prefix: ids that stand before each text: a BOS, or nothing.
    suffix: ids that stand after each text; mostly nothing.
    bos_id: the BOS, where it is in the prefix; else None.
    named_bos_id: the BOS that the files name, whether texts begin with it.
    eos_id: id that ends generation, or None.
    special_tokens: texts of 'bos_token', 'eos_token', ..., where there is one.
    chat_templates: by name; empty for base models. See chat.py.
  """

  name: str
  vocab_size: int
  pad_id: int
  prefix: tuple[int, ...]
  suffix: tuple[int, ...]
  bos_id: int | None
  named_bos_id: int | None
  eos_id: int | None
  special_tokens: dict[str, str]
  chat_templates: dict[str, str]

  def encode(self, text: str) -> list[int]:
    """Ids of the text, without special tokens.

    A lone surrogate, which has no UTF-8, becomes '?'. A tokenizer that has
    chat templates also takes `parse_special=True`, where text that spells a
    special token becomes that token.
    """
    ...

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """Text of the ids; special and unknown ids are skipped.

    A character cut in two at an end of the ids becomes U+FFFD.
    """
    ...

  def spell(self, token: int) -> str:
    """The text that names a token, a special one too: '<eos>'."""
    ...

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes files from which `load(directory)` makes an equal tokenizer."""
    ...


def with_special(tokenizer: Tokenizer, text: str) -> list[int]:
  """Ids of a whole text, as `transformers` gives by default.

  A rendered conversation brings its special tokens itself.
  """
  if isinstance(text, chat.Rendered):
    return tokenizer.encode(text, parse_special=True)
  return [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]


class ByteTokenizer:
  """UTF-8 bytes; byte b has id b + 4."""

  name = "byte"
  vocab_size = 260
  pad_id = 0
  eos_id = 1
  bos_id = named_bos_id = 2
  unk_id = 3
  prefix, suffix = (2,), ()
  _special_tokens = ("<pad>", "<eos>", "<bos>", "<unk>")
  special_tokens = {
    key: token
    for key, token in tokenizer_json.BYTE_CONFIG.items()
    if key.endswith("_token")
  }
  chat_templates: dict[str, str] = {}

  def encode(self, text: str) -> list[int]:
    """Ids of the text; see `Tokenizer.encode`."""
    return [b + 4 for b in text.encode("utf-8", errors="replace")]

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """Text of the ids; see `Tokenizer.decode`."""
    data = bytes(i - 4 for i in map(int, ids) if 4 <= i < self.vocab_size)
    return data.decode("utf-8", errors="replace")

  def spell(self, token: int) -> str:
    """A token's name; see `Tokenizer.spell`."""
    return (self._special_tokens[token : token + 1] or (self.decode([token]),))[
      0
    ]

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the same mapping as a Hugging Face `tokenizer.json`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer_json.byte_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_json.write_json(
      directory / "tokenizer_config.json",
      tokenizer_json.BYTE_CONFIG,
    )


class SentencePieceTokenizer:
  """A SentencePiece `.model` file."""

  def __init__(self, path: str | pathlib.Path):
    """Reads the model.

    Args:
      path: the `.model` file.

    Raises:
      UserError: if it is missing or not a SentencePiece model.
    """
    import sentencepiece

    path = pathlib.Path(path)
    self._model = tokenizer_json.read_bytes(path)
    try:
      self._processor = sentencepiece.SentencePieceProcessor(
        model_proto=self._model
      )
      self.vocab_size = self._processor.vocab_size()
    except (RuntimeError, ValueError, TypeError) as error:
      raise errors.UserError(
        f"{path}: not a SentencePiece model; download it again"
      ) from error
    if not self.vocab_size:
      raise errors.UserError(
        f"{path}: not a SentencePiece model; download it again"
      )
    self.name = f"sentencepiece-{tokenizer_json.digest(self._model)}"
    # SentencePiece says -1 for a special piece that the model lacks.
    ids = {
      special: None if number < 0 else number
      for special, number in (
        ("bos", self._processor.bos_id()),
        ("eos", self._processor.eos_id()),
        ("pad", self._processor.pad_id()),
      )
    }
    self.named_bos_id, self.eos_id = ids["bos"], ids["eos"]
    self.prefix, self.suffix = self._surroundings(path)
    self.bos_id = ids["bos"] if self.prefix else None
    fillers = (ids["pad"], self.eos_id, 0)
    self.pad_id = next(i for i in fillers if i is not None)
    self.special_tokens = {
      f"{special}_token": self._processor.id_to_piece(number)
      for special, number in ids.items()
      if number is not None
    }
    self.chat_templates: dict[str, str] = {}
    self._skipped = set(ids.values())
    if (self.bos_id, self.suffix) != (self.named_bos_id, ()):
      self.name += f"-{self.prefix}-{self.suffix}"

  def _surroundings(
    self, path: pathlib.Path
  ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The model's BOS before a text, unless the files beside it decide."""
    config = path.with_name("tokenizer_config.json")
    entries = tokenizer_json.read_json(config) if config.exists() else {}
    flags = {
      "bos": entries.get("add_bos_token", True)
      and entries.get("bos_token", "") is not None,
      "eos": entries.get("add_eos_token", False),
    }
    ids = {"bos": self.named_bos_id, "eos": self.eos_id}
    bos, eos = (
      (ids[special],) if flags[special] and ids[special] is not None else ()
      for special in ids
    )
    return bos, eos

  def encode(self, text: str) -> list[int]:
    """Ids of the text; see `Tokenizer.encode`."""
    return self._processor.encode(well_formed(text), out_type=int)

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """Text of the ids; see `Tokenizer.decode`."""
    kept = [
      i
      for i in map(int, ids)
      if 0 <= i < self.vocab_size and i not in self._skipped
    ]
    return self._processor.decode(kept)

  def spell(self, token: int) -> str:
    """A token's name; see `Tokenizer.spell`."""
    return self._processor.id_to_piece(token)

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes `tokenizer.model`, and the flags of BOS and EOS."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(self._model)
    if (self.bos_id, self.suffix) != (self.named_bos_id, ()):
      tokenizer_json.write_json(
        directory / "tokenizer_config.json",
        {
          "add_bos_token": bool(self.prefix),
          "add_eos_token": bool(self.suffix),
        },
      )


def load(spec: str) -> Tokenizer:
  """Makes the tokenizer that `spec` names.

  Args:
    spec: 'byte', 'sentencepiece:PATH', 'hf:PATH', a GGUF file, or a directory
      that holds tokenizer.json or tokenizer.model (the first of the two that
      exists), or has tokenizer.model beside it and is no Hugging Face model.

  Returns:
    The tokenizer.

  Raises:
    UserError: if the spec is unknown or its files are missing or corrupt.
  """
  if spec == "byte":
    return ByteTokenizer()
  kind, _, path = spec.partition(":")
  if kind == "sentencepiece" and path:
    return SentencePieceTokenizer(pathlib.Path(path).expanduser())
  if kind == "hf" and path:
    return HuggingFaceTokenizer(pathlib.Path(path).expanduser())
  directory = pathlib.Path(spec).expanduser()
  if directory.suffix.lower() == ".gguf":
    return gguf_tokenizer.GGUFTokenizer(directory)
  if not directory.is_dir():
    raise errors.UserError(
      f"tokenizer {spec!r}: use 'byte', 'sentencepiece:PATH', 'hf:PATH', a "
      ".gguf file, or a directory with tokenizer.json or tokenizer.model"
    )
  if (directory / "tokenizer.json").exists():
    return HuggingFaceTokenizer(directory)
  if (directory / "tokenizer.model").exists():
    return SentencePieceTokenizer(directory / "tokenizer.model")
  # Google's Gemma checkpoints have it beside them. A Hugging Face directory
  # without one is incomplete, and its neighbour's would be another's.
  beside = directory.absolute().parent / "tokenizer.model"
  if beside.exists() and not (directory / "config.json").exists():
    return SentencePieceTokenizer(beside)
  raise errors.UserError(
    f"tokenizer {spec!r}: no tokenizer.json or tokenizer.model in it"
  )
