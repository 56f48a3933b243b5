"""The tokenizer in a GGUF file's metadata, as `transformers` reads it.

  tokenizer.ggml.model = gpt2    byte-level BPE: entries and merges are in the
                                 file, `pre` names how text is cut into words
  tokenizer.ggml.model = llama   SentencePiece's BPE: there are no merges, they
                                 follow from the entries and their scores

Source: transformers 5.24, integrations/gguf/gguf_tokenizer_mapping.py, whose
ids these are for every text (tests/test_gguf_tokenizer.py).
"""

import pathlib
from typing import Any

from absl import logging

from cacheaug import errors
from cacheaug.data import chat, gguf_metadata
from cacheaug.data.tokenizer_json import (
  HuggingFaceTokenizer,
  byte_symbols,
)

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"  # SentencePiece's

_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> what a word is. Others are cut as GPT-2's.
_WORDS = (
  dict.fromkeys(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"),
    _LLAMA3,
  )
  | dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2)
  | {"tekken": _TEKKEN}
)
_GPT2 = ("", "default", "gpt-2", "olmo", "smollm")
_NAMES = {
  "bos": "bos_token_id",
  "eos": "eos_token_id",
  "pad": "padding_token_id",
  "unk": "unknown_token_id",
}


class GGUFTokenizer(HuggingFaceTokenizer):
  """The tokenizer of a GGUF file; see `tokenizers.Tokenizer`."""

  def __init__(self, path: str | pathlib.Path):
    """Reads the metadata.

    Args:
      path: the file.

    Raises:
      UserError: no GGUF file, or one without a tokenizer of a known kind.
    """
    path = pathlib.Path(path)
    metadata = gguf_metadata.read(path)
    fields = _fields(metadata, path)
    named = {s: _number(fields, name) for s, name in _NAMES.items()}
    architecture = metadata.get("general.architecture", "")
    try:
      tokenizer = _build(fields, architecture, named, path)
    except Exception as error:  # The library raises the bare class.
      raise errors.UserError(
        f"{path}: its tokenizer does not fit together "
        f"({errors.one_line(error, 120)}); download it again"
      ) from error
    self._set_up(tokenizer, path, named, _templates(metadata), _content(fields))
    self._replacement = None

  def _save_tokenizer(self, path: pathlib.Path) -> None:
    self._tokenizer.save(str(path))

  def _saved_config(self) -> dict[str, Any]:
    return {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      "model_max_length": 10**9,
    }


def _fields(metadata: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """The entries `tokenizer.ggml.*` without that prefix."""
  prefix = "tokenizer.ggml."
  fields = {
    key.removeprefix(prefix): value
    for key, value in metadata.items()
    if key.startswith(prefix)
  }
  kind = fields.get("model")
  if kind not in ("gpt2", "llama") or not fields.get("tokens"):
    raise errors.UserError(
      f"{path}: its tokenizer is of kind {kind!r}; those of GGUF files that "
      "can be read are gpt2 and llama: put tokenizer.json into a directory and "
      "give hf:DIRECTORY"
    )
  needed = "scores" if kind == "llama" else "merges"
  if needed not in fields and "merges" not in fields:
    raise errors.UserError(
      f"{path}: its tokenizer has no {needed}; download it again"
    )
  return fields


def _number(fields: dict[str, Any], name: str) -> int | None:
  number = fields.get(name)
  known = number is not None and 0 <= number < len(fields["tokens"])
  return int(number) if known else None


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
  """Chat templates by name: tokenizer.chat_template[.NAME]."""
  prefix = "tokenizer.chat_template"
  named = {
    key.removeprefix(prefix).removeprefix(".") or "default": value
    for key, value in metadata.items()
    if key == prefix or key.startswith(prefix + ".")
  }
  return chat.parse_entry({k: v for k, v in named.items() if v})


def _content(fields: dict[str, Any]) -> bytes:
  """What the tokenizer is made of, as bytes."""
  parts = []
  for key, value in sorted(fields.items()):
    text = "\n".join(value) if isinstance(value, list) else repr(value)
    data = value.tobytes() if hasattr(value, "tobytes") else text.encode()
    parts += [key.encode(), data]
  return b"\0".join(parts)


def _build(
  fields: dict[str, Any],
  architecture: str,
  named: dict[str, int | None],
  path: pathlib.Path,
) -> Any:
  """A `tokenizers.Tokenizer`."""
  import tokenizers as library

  if fields["model"] == "gpt2":
    tokenizer, tokens = _byte_level(fields, path)
  elif architecture.startswith("gemma"):
    tokenizer, tokens = _gemma(fields, named)
  else:
    tokenizer, tokens = _llama(fields)
  kinds = fields.get("token_type", ())
  control = [i for i, kind in enumerate(kinds) if kind == _CONTROL]
  if fields["model"] == "gpt2":  # Others are entries that were mislabelled.
    spelled = set(byte_symbols().values())
    control = [i for i in control if set(fields["tokens"][i]) <= spelled]
  control += [i for i in named.values() if i is not None]
  plain = [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
  known = frozenset(control)
  for ids, special in ((control, True), (plain, False)):
    tokenizer.add_tokens(
      [
        library.AddedToken(tokens[i], normalized=False, special=special)
        for i in dict.fromkeys(ids)
        if special or i not in known
      ]
    )
  tokenizer.post_processor = _template(fields, tokens, named)
  return tokenizer


def _template(
  fields: dict[str, Any], tokens: list[str], named: dict[str, int | None]
) -> Any:
  """The post-processor: BOS and EOS where the file asks for them."""
  import tokenizers as library

  flags = {
    # Older files do not say, and SentencePiece's vocabularies have one.
    "bos": fields.get("add_bos_token", fields["model"] == "llama"),
    "eos": fields.get("add_eos_token", False),
  }
  added = {
    special: tokens[named[special]]
    for special, flag in flags.items()
    if flag and named[special] is not None
  }
  around = [added.get("bos"), "$A", added.get("eos")]
  return library.processors.TemplateProcessing(
    single=[part for part in around if part],
    special_tokens=[(text, named[key]) for key, text in added.items()],
  )


def _byte_level(
  fields: dict[str, Any], path: pathlib.Path
) -> tuple[Any, list[str]]:
  """Byte-level BPE, and its entries in order."""
  import tokenizers as library

  symbols = byte_symbols()
  spelled = set(symbols.values())
  tokens = [
    token
    if set(token) <= spelled
    else "".join(symbols[b] for b in token.encode())
    for token in fields["tokens"]
  ]
  tokenizer = library.Tokenizer(
    library.models.BPE(
      {token: i for i, token in enumerate(tokens)},
      [tuple(merge.split(" ")) for merge in fields["merges"]],
      continuing_subword_prefix="",
      end_of_word_suffix="",
      fuse_unk=False,
    )
  )
  words = _WORDS.get(fields.get("pre", ""))
  if words is None and fields.get("pre", "") not in _GPT2:
    logging.warning(
      "%s: tokenizer.ggml.pre=%r is not known; words are cut as GPT-2's, as "
      "transformers does",
      path,
      fields["pre"],
    )
  pre = library.pre_tokenizers
  if words is None:
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
  else:
    tokenizer.pre_tokenizer = pre.Sequence(
      [
        pre.Split(library.Regex(words), behavior="isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  tokenizer.decoder = library.decoders.ByteLevel()
  return tokenizer, tokens


def _llama(fields: dict[str, Any]) -> tuple[Any, list[str]]:
  """SentencePiece's BPE with a space before each text, and its entries."""
  import tokenizers as library

  tokens = fields["tokens"]
  tokenizer = library.Tokenizer(
    library.models.BPE(
      {token: i for i, token in enumerate(tokens)},
      _merges(fields, tokens, fields.get("scores")),
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(
    replacement=_SPACE, prepend_scheme="first", split=False
  )
  decoders = library.decoders
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(content=" ", left=1),
    ]
  )
  return tokenizer, tokens


def _gemma(
  fields: dict[str, Any], named: dict[str, int | None]
) -> tuple[Any, list[str]]:
  """SentencePiece's BPE as Gemma has it, and its entries in order.

  The file spells entries of several spaces as spaces. Gemma's merges go by the
  order of the entries, not by their scores.
  """
  import tokenizers as library

  tokens = [
    token.replace(" ", _SPACE) if " " in token and not token.strip() else token
    for token in fields["tokens"]
  ]
  unk = named["unk"]
  tokenizer = library.Tokenizer(
    library.models.BPE(
      {token: i for i, token in enumerate(tokens)},
      _merges(fields, tokens, range(0, -len(tokens), -1)),
      fuse_unk=True,
      unk_token=None if unk is None else tokens[unk],
      byte_fallback=True,
    )
  )
  tokenizer.normalizer = library.normalizers.Replace(" ", _SPACE)
  tokenizer.pre_tokenizer = library.pre_tokenizers.Split(
    pattern=" ", behavior="merged_with_previous"
  )
  decoders = library.decoders
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  return tokenizer, tokens


def _merges(
  fields: dict[str, Any], tokens: list[str], scores: Any
) -> list[tuple[str, str]]:
  """The file's merges, or all pairs of entries that make up a third one.

  Pairs go by the score of what they make, the best first; among equals by the
  longer first part, then the longer second; then in the entries' order, and
  by the ids of the parts.
  """
  if "merges" in fields:
    return [tuple(merge.split(" ")) for merge in fields["merges"]]
  ids = {token: i for i, token in enumerate(tokens)}
  best = dict(zip(tokens, scores, strict=True))
  pairs = []
  for token, score in best.items():
    parts = [
      (token[:cut], token[cut:])
      for cut in range(1, len(token))
      if token[:cut] in ids and token[cut:] in ids
    ]
    parts.sort(key=lambda part: (ids[part[0]], ids[part[1]]))
    pairs += [(score, part) for part in parts]
  pairs.sort(
    key=lambda pair: (pair[0], len(pair[1][0]), len(pair[1][1])), reverse=True
  )
  return [part for _, part in pairs]
