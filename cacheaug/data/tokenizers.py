"""Tokenizers: bytes, SentencePiece, Hugging Face `tokenizer.json`.

`encode` adds no special token and reads none out of the text: a document that
spells "<eos>" is encoded as those five characters.
"""

import collections.abc
import functools
import hashlib
import json
import pathlib
import shutil
from typing import Any, Protocol

from cacheaug import errors

_SPECIALS = ("bos", "eos", "pad")


class Tokenizer(Protocol):
  """What the rest of the package asks of a tokenizer.

  Attributes:
    name: identifies the mapping from text to ids; part of cache addresses.
    vocab_size: every id is below it.
    pad_id: id that fills rows; never a target.
    bos_id: id that opens each document, or None.
    eos_id: id that ends generation, or None.
  """

  name: str
  vocab_size: int
  pad_id: int
  bos_id: int | None
  eos_id: int | None

  def encode(self, text: str) -> list[int]:
    """Ids of the text, without special tokens."""
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


class ByteTokenizer:
  """UTF-8 bytes; byte b has id b + 4."""

  name = "byte"
  vocab_size = 260
  pad_id = 0
  eos_id = 1
  bos_id = 2
  unk_id = 3
  _offset = 4
  _special_tokens = ("<pad>", "<eos>", "<bos>", "<unk>")

  def encode(self, text: str) -> list[int]:
    """Ids of the text; a lone surrogate, which has no UTF-8, becomes '?'."""
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
    vocab = {token: i for i, token in enumerate(self._special_tokens)}
    vocab |= {c: b + self._offset for b, c in _byte_symbols().items()}
    byte_level = {
      "type": "ByteLevel",
      "add_prefix_space": False,
      "trim_offsets": False,
      # The regex would only cut the text into words, which changes no id as
      # there are no merges, and costs time.
      "use_regex": False,
    }
    flags = dict.fromkeys(
      ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    _write_json(
      directory / "tokenizer.json",
      {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
          {"id": i, "content": token, "special": True} | flags
          for i, token in enumerate(self._special_tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
          "type": "BPE",
          "dropout": None,
          "unk_token": None,
          "continuing_subword_prefix": None,
          "end_of_word_suffix": None,
          "fuse_unk": False,
          "byte_fallback": False,
          "ignore_merges": False,
          "vocab": vocab,
          "merges": [],
        },
      },
    )
    _write_json(
      directory / "tokenizer_config.json",
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
      },
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
    self._model = _read_bytes(path)
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
    self.name = f"sentencepiece-{_digest(self._model)}"
    # SentencePiece says -1 for a special piece that the model lacks.
    self.bos_id = _none_if_negative(self._processor.bos_id())
    self.eos_id = _none_if_negative(self._processor.eos_id())
    pad_id = _none_if_negative(self._processor.pad_id())
    self.pad_id = _first(pad_id, self.eos_id, 0)
    self._skipped = {self.bos_id, self.eos_id, pad_id}

  def encode(self, text: str) -> list[int]:
    """Ids of the text."""
    return self._processor.encode(text, out_type=int)

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
    """Writes `tokenizer.model`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(self._model)


class HuggingFaceTokenizer:
  """A Hugging Face `tokenizer.json`, read by the `tokenizers` library."""

  def __init__(self, path: str | pathlib.Path):
    """Reads the tokenizer and its special tokens.

    Special tokens come from the first of tokenizer_config.json,
    special_tokens_map.json and config.json, beside the tokenizer, that names
    them.

    Args:
      path: a `tokenizer.json`, or the directory that holds one.

    Raises:
      UserError: if a file is missing or cannot be read.
    """
    path = pathlib.Path(path)
    self._path = path / "tokenizer.json" if path.is_dir() else path
    content = _read_bytes(self._path)
    self._load(content)
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    ids = self._special_ids(vocab)
    self.bos_id, self.eos_id = ids["bos"], ids["eos"]
    self.pad_id = _first(ids["pad"], self.eos_id, 0)
    special = f"{self.bos_id} {self.eos_id} {self.pad_id}".encode()
    self.name = f"hf-{_digest(content + special)}"

  def _load(self, content: bytes) -> None:
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # The library raises the bare class.
      raise errors.UserError(
        f"{self._path}: not a tokenizer.json that `tokenizers` reads "
        f"({_one_line(error)}); download it again"
      ) from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True

  def __getstate__(self) -> dict[str, Any]:
    # The library's own pickle forgets `encode_special_tokens`.
    state = self.__dict__.copy()
    state["_tokenizer"] = self._tokenizer.to_str()
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    content = state.pop("_tokenizer")
    self.__dict__.update(state)
    self._load(content.encode())

  def _special_ids(self, vocab: dict[str, int]) -> dict[str, int | None]:
    """Ids of bos, eos and pad; None for one that no file names."""
    ids: dict[str, int | None] = dict.fromkeys(_SPECIALS)
    # Qwen's config.json names a bos that its models never saw in front.
    without: set[str] = set()
    for name in (
      "tokenizer_config.json",
      "special_tokens_map.json",
      "config.json",
    ):
      path = self._path.parent / name
      if not path.exists():
        continue
      entries = _read_json(path)
      if not entries.get("add_bos_token", True):
        without.add("bos")
      for special in _SPECIALS:
        if ids[special] is not None or special in without:
          continue
        token = entries.get(f"{special}_token")
        if isinstance(token, dict):  # A serialised AddedToken.
          token = token["content"]
        number = entries.get(f"{special}_token_id")
        if isinstance(number, list):  # Several eos: the text's first.
          number = number[0]
        ids[special] = vocab[token] if token in vocab else number
    return ids

  def encode(self, text: str) -> list[int]:
    """Ids of the text; the tokenizer's post-processor is not run."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """Text of the ids; see `Tokenizer.decode`."""
    # The files do not always mark bos, eos and pad as special.
    skipped = {self.bos_id, self.eos_id, self.pad_id}
    kept = [
      i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in skipped
    ]
    return self._tokenizer.decode(kept, skip_special_tokens=True)

  def spell(self, token: int) -> str:
    """A token's name; see `Tokenizer.spell`."""
    return self._spelled[token]

  @functools.cached_property
  def _spelled(self) -> dict[int, str]:
    # `id_to_token` would give a special token's text after normalisation.
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocab.items()}

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(self._path, directory / "tokenizer.json")
    path = self._path.parent / "tokenizer_config.json"
    config = _read_json(path) if path.exists() else {}
    for special in _SPECIALS:
      number = getattr(self, f"{special}_id")
      if number is not None:
        config[f"{special}_token"] = self.spell(number)
    _write_json(directory / "tokenizer_config.json", config)


def load(spec: str) -> Tokenizer:
  """Makes the tokenizer that `spec` names.

  Args:
    spec: 'byte', 'sentencepiece:PATH', 'hf:PATH', or a directory that holds
      tokenizer.json or tokenizer.model (the first of the two that exists), or
      has tokenizer.model beside it and is no Hugging Face model.

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
  if not directory.is_dir():
    raise errors.UserError(
      f"tokenizer {spec!r}: use 'byte', 'sentencepiece:PATH', 'hf:PATH' or a "
      "directory with tokenizer.json or tokenizer.model"
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


def _byte_symbols() -> dict[int, str]:
  """The printable character that stands for each byte (GPT-2's table)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  symbols = {b: chr(b) for b in printable}
  others = (b for b in range(256) if b not in symbols)
  symbols |= {b: chr(256 + i) for i, b in enumerate(others)}
  return symbols


def _read_bytes(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot read the tokenizer ({error.strerror})"
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    entries = json.loads(_read_bytes(path))
  except ValueError as error:
    raise errors.UserError(f"{path}: not JSON ({_one_line(error)})") from error
  if not isinstance(entries, dict):
    raise errors.UserError(f"{path}: expected a JSON object")
  return entries


def _write_json(path: pathlib.Path, entries: dict[str, Any]) -> None:
  path.write_text(
    json.dumps(entries, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
  )


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:12]


def _first(*numbers: int | None) -> int:
  return next(n for n in numbers if n is not None)


def _none_if_negative(number: int) -> int | None:
  return None if number < 0 else number


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:120]
