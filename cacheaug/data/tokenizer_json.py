"""Hugging Face `tokenizer.json`, read by the `tokenizers` library.

Its ids are those of `transformers`: the file's post-processor alone decides
what stands before and after a text. `add_bos_token` of tokenizer_config.json
and the ids of config.json do not (transformers drops the one where there is a
tokenizer.json, and never reads the others for it).
"""

import collections.abc
import functools
import hashlib
import json
import pathlib
import shutil
import threading
from typing import Any

from cacheaug import errors
from cacheaug.data import chat

# The files that name special tokens; the first that names one decides.
_NAMING = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_SPECIALS = ("bos", "eos", "pad", "unk")
# What lies beside the byte tokenizer's tokenizer.json.
BYTE_CONFIG = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "pad_token": "<pad>",
  "eos_token": "<eos>",
  "bos_token": "<bos>",
  "unk_token": "<unk>",
  "clean_up_tokenization_spaces": False,
  "model_max_length": 10**9,
}
# Texts of which a vocabulary knows at least one.
_PROBES = ("a", "e", "1", " ", "the")


class HuggingFaceTokenizer:
  """A Hugging Face `tokenizer.json`; see `tokenizers.Tokenizer`."""

  def __init__(self, path: str | pathlib.Path):
    """Reads the tokenizer and its special tokens.

    Special tokens come from the first of tokenizer_config.json,
    special_tokens_map.json and config.json, beside the tokenizer, that names
    them; an explicit null there says that there is none.

    Args:
      path: a `tokenizer.json`, or the directory that contains it.

    Raises:
      UserError: if a file is missing or cannot be read.
    """
    path = pathlib.Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    content = read_bytes(path)
    earlier = _is_earlier_byte_tokenizer(path, content)
    if earlier:
      content = byte_tokenizer().to_str(pretty=True).encode()
    # Another file is copied as it is, not held.
    self._replacement = content if earlier else None
    tokenizer = _parse(path, content)
    named = _named_tokens(path.parent, tokenizer)
    templates = chat.find_templates(path.parent)
    self._set_up(tokenizer, path, named, templates, content)

  def _set_up(
    self,
    tokenizer: Any,
    path: pathlib.Path,
    named: dict[str, str | int | None],
    templates: dict[str, str],
    content: bytes,
  ) -> None:
    """Sets all attributes.

    Args:
      tokenizer: `tokenizers.Tokenizer`.
      path: the file that it came from.
      named: text or id of 'bos', 'eos', 'pad', 'unk'; None where it is absent.
      templates: chat templates by name.
      content: bytes that identify the tokenizer; its name is their checksum.
    """
    self._path = path
    self._tokenizer = _configured(tokenizer)
    self._lock = threading.Lock()
    self.prefix, self.suffix = _surroundings(tokenizer)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    self._size = max(vocab.values(), default=-1) + 1
    ids = {special: _token_id(vocab, named[special]) for special in _SPECIALS}
    self.eos_id, self.named_bos_id = ids["eos"], ids["bos"]
    self.bos_id = ids["bos"] if ids["bos"] in self.prefix else None
    self.vocab_size = self._largest_id() + 1
    # One beyond the model's table, which text never gives, cannot fill rows.
    fillers = (ids["pad"], self.eos_id, *self.prefix, 0)
    fillers = (i for i in fillers if i is not None and i < self.vocab_size)
    self.pad_id = next(fillers, 0)
    self.special_tokens = {
      f"{special}_token": self._spellings[number]
      for special, number in ids.items()
      if number in self._spellings
    }
    self.chat_templates = templates
    key = f"{self.bos_id} {self.eos_id} {self.pad_id}"
    if (self.prefix, self.suffix) != (_tuple(self.bos_id), ()):
      key += f" {self.prefix} {self.suffix}"
    self.name = f"hf-{digest(content + key.encode())}"

  def _largest_id(self) -> int:
    """The largest id that `encode`, the prefix and the suffix can have."""
    added = self._tokenizer.get_added_tokens_decoder()
    return max(
      [
        *self._tokenizer.get_vocab(with_added_tokens=False).values(),
        *(i for i, token in added.items() if not token.special),
        *self.prefix,
        *self.suffix,
      ],
      default=-1,
    )

  @property
  def source(self) -> pathlib.Path:
    """The file that the tokenizer came from."""
    return self._path

  def __getstate__(self) -> dict[str, Any]:
    # The library's own pickle forgets `encode_special_tokens`.
    state = self.__dict__.copy()
    state["_tokenizer"] = self._tokenizer.to_str()
    del state["_lock"]
    state.pop("_spellings", None)
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    content = state.pop("_tokenizer").encode()
    self.__dict__.update(state)
    self._tokenizer = _configured(_parse(self._path, content))
    self._lock = threading.Lock()

  def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
    """Ids of the text; the tokenizer's post-processor is not run.

    Args:
      text: a lone surrogate in it, which has no UTF-8, becomes '?'.
      parse_special: text that spells a special token becomes that token, as
        in what a chat template has rendered.
    """
    text = well_formed(text)
    with self._lock:  # The flag is the tokenizer's, for all threads.
      self._tokenizer.encode_special_tokens = not parse_special
      return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """Text of the ids; see `Tokenizer.decode`."""
    # The files do not always mark bos, eos and pad as special.
    skipped = {*self.prefix, *self.suffix, self.eos_id, self.pad_id}
    kept = [i for i in map(int, ids) if 0 <= i < self._size]
    kept = [i for i in kept if i not in skipped]
    return self._tokenizer.decode(kept, skip_special_tokens=True)

  def spell(self, token: int) -> str:
    """A token's name; see `Tokenizer.spell`."""
    return self._spellings[token]

  @functools.cached_property
  def _spellings(self) -> dict[int, str]:
    # `id_to_token` would give a special token's text after normalisation.
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocab.items()}

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat templates."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._save_tokenizer(directory / "tokenizer.json")
    config = self._saved_config()
    config.pop("chat_template", None)  # It goes into its own file.
    for special in _SPECIALS:
      name = f"{special}_token"
      config[name] = self.special_tokens.get(name)
    write_json(directory / "tokenizer_config.json", config)
    chat.save_templates(directory, self.chat_templates)

  def _save_tokenizer(self, path: pathlib.Path) -> None:
    if self._replacement is None:
      shutil.copyfile(self._path, path)
    else:
      path.write_bytes(self._replacement)

  def _saved_config(self) -> dict[str, Any]:
    path = self._path.parent / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def byte_tokenizer() -> Any:
  """`tokenizers.ByteTokenizer` as the `tokenizers` library has it."""
  import tokenizers as library

  special = ("<pad>", "<eos>", "<bos>", "<unk>")
  vocab = {token: i for i, token in enumerate(special)}
  vocab |= {symbol: b + len(special) for b, symbol in byte_symbols().items()}
  tokenizer = library.Tokenizer(library.models.BPE(vocab, []))
  # The regex would only cut the text into words, which changes no id as there
  # are no merges, and costs time.
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, trim_offsets=False, use_regex=False
  )
  tokenizer.decoder = library.decoders.ByteLevel(
    add_prefix_space=False, trim_offsets=False, use_regex=False
  )
  tokenizer.post_processor = library.processors.TemplateProcessing(
    single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
  )
  tokenizer.add_special_tokens(
    [library.AddedToken(token, normalized=False) for token in special]
  )
  return tokenizer


def byte_symbols() -> dict[int, str]:
  """The printable character that stands for each byte (GPT-2's table)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  symbols = {b: chr(b) for b in printable}
  others = (b for b in range(256) if b not in symbols)
  return symbols | {b: chr(256 + i) for i, b in enumerate(others)}


def _is_earlier_byte_tokenizer(path: pathlib.Path, content: bytes) -> bool:
  """Whether an export wrote it before the file itself put a BOS in front.

  The decoder beside it was trained with one.
  """
  config = path.parent / "tokenizer_config.json"
  if len(content) > 10_000 or not config.exists():
    return False
  earlier = json.loads(byte_tokenizer().to_str())
  # It was written by hand then: the decoder as the pre-tokenizer.
  earlier |= {"post_processor": None, "decoder": earlier["pre_tokenizer"]}
  try:
    same = json.loads(content) == earlier
  except ValueError:
    return False
  return same and read_json(config) == BYTE_CONFIG


def _parse(path: pathlib.Path, content: bytes) -> Any:
  import tokenizers as library

  try:
    return library.Tokenizer.from_str(content.decode("utf-8-sig"))
  except Exception as error:  # The library raises the bare class.
    raise errors.UserError(
      f"{path}: not a tokenizer.json that `tokenizers` reads "
      f"({errors.one_line(error, 120)}); download it again"
    ) from error


def _configured(tokenizer: Any) -> Any:
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True
  return tokenizer


def _surroundings(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Ids that the post-processor puts before and after each text."""
  for probe in _PROBES:
    text = tokenizer.encode(probe, add_special_tokens=False).ids
    if text:
      break
  else:
    probe = text = ""
  encoding = tokenizer.encode(probe, add_special_tokens=True)
  # Leading ones of the mask are the prefix; with no text all of them are.
  mask = [*encoding.special_tokens_mask, 0]
  before = mask.index(0)
  return (
    tuple(encoding.ids[:before]),
    tuple(encoding.ids[before + len(text) :]),
  )


def _named_tokens(
  directory: pathlib.Path, tokenizer: Any
) -> dict[str, str | int | None]:
  """Text or id of each special token; None for one that is not named."""
  named: dict[str, str | int | None] = {}
  for name in _NAMING:
    path = directory / name
    entries = read_json(path) if path.exists() else {}
    for special in _SPECIALS:
      if special in named:
        continue
      token = entries.get(f"{special}_token")
      if isinstance(token, dict):  # A serialised AddedToken.
        token = token.get("content")
      number = entries.get(f"{special}_token_id")
      if isinstance(number, list):  # Several eos: the text's first.
        number = number[0] if number else None
      if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
        named[special] = token
      elif isinstance(number, int) and number >= 0:  # -1 is none.
        named[special] = number
      elif f"{special}_token" in entries and token is None:
        named[special] = None  # An explicit null is an answer.
  return dict.fromkeys(_SPECIALS) | named


def _token_id(vocab: dict[str, int], token: str | int | None) -> int | None:
  return vocab.get(token) if isinstance(token, str) else token


def _tuple(number: int | None) -> tuple[int, ...]:
  return () if number is None else (number,)


def well_formed(text: str) -> str:
  """The text with '?' for each lone surrogate, which no UTF-8 has."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return text.encode(errors="replace").decode()
  return text


def read_bytes(path: pathlib.Path) -> bytes:
  """Content of a tokenizer's file; UserError if it cannot be read."""
  try:
    return path.read_bytes()
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot read the tokenizer ({error.strerror})"
    ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; UserError if it is none."""
  try:
    entries = json.loads(read_bytes(path).decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{path}: not JSON ({errors.one_line(error, 120)})"
    ) from error
  if not isinstance(entries, dict):
    raise errors.UserError(f"{path}: expected a JSON object")
  return entries


def write_json(path: pathlib.Path, entries: dict[str, Any]) -> None:
  """Writes a JSON object as people read it."""
  path.write_text(
    json.dumps(entries, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
  )


def digest(content: bytes) -> str:
  """Twelve characters that differ where the content does."""
  return hashlib.sha256(content).hexdigest()[:12]
