"""Tokenizers of GGUF files: the ids that `transformers` reads from them."""

import functools
import json
import pathlib
import pickle
import random
import warnings

import gguf_files
import numpy as np
import pytest
import tokenizers as library

from cacheaug.data import gguf_metadata, tokenizers
from cacheaug.errors import UserError
from cacheaug.model import config as model_config

gguf = pytest.importorskip("gguf", reason="pip install 'cacheaug[gguf]'")

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
PROSE = pathlib.Path(tokenizers.__file__).read_text() + " ".join(
  f"It's {i}, they'll; 12345 café Ünïcödé 漢字 don't" for i in range(20)
)


@functools.cache
def byte_level(words=300):
  """Entries, merges and kinds of a byte-level vocabulary, two special first."""
  trained = library.Tokenizer(library.models.BPE())
  trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  trainer = library.trainers.BpeTrainer(
    vocab_size=256 + words,
    special_tokens=["<|end|>", "<|start|>", "<think>"],
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  trained.train_from_iterator([PROSE], trainer)
  return entries_of(trained, [CONTROL, CONTROL, USER])


@functools.cache
def pieces(words=300):
  """The same of a vocabulary as SentencePiece's, with bytes after them."""
  trained = library.Tokenizer(library.models.BPE())
  special = ["<pad>", "<eos>", "<bos>", "<unk>", "<think>"]
  special += [f"<0x{b:02X}>" for b in range(256)]
  trainer = library.trainers.BpeTrainer(
    vocab_size=len(special) + words, special_tokens=special, show_progress=False
  )
  trained.train_from_iterator([PROSE.replace(" ", "\u2581")], trainer)
  kinds = [CONTROL, CONTROL, CONTROL, UNKNOWN, USER] + [BYTE] * 256
  return entries_of(trained, kinds)


def entries_of(trained, kinds):
  vocab = trained.get_vocab()
  tokens = sorted(vocab, key=vocab.get)
  merges = json.loads(trained.to_str())["model"]["merges"]
  merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
  return tokens, merges, kinds + [NORMAL] * (len(tokens) - len(kinds))


def write(path, family, model, *, pre=None, tokens=None, **fields):
  """A file of a decoder without tensors, and its tokenizer."""
  entries, merges, kinds = byte_level() if model == "gpt2" else pieces()
  tokens = tokens or entries
  config = model_config.make(family, vocab_size=len(tokens), layers=1)
  writer = gguf_files.start(path, config)
  writer.add_tokenizer_model(model)
  if pre is not None:
    writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  if model == "llama":
    # As SentencePiece's: what was merged first is best.
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
  if model == "gpt2" or fields.pop("merges", False):
    writer.add_token_merges(merges)
  for name, value in fields.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


def texts():
  rng = random.Random(0)
  chars = [
    lambda: chr(rng.randrange(32, 127)),
    lambda: chr(rng.choice([rng.randrange(0x80, 0x2FF), 0x6F22, 0x1F642])),
    lambda: rng.choice(" \n\t\r  \u2581"),
    lambda: str(rng.randrange(10)),
  ]
  made = [
    "".join(rng.choice(chars)() for _ in range(rng.randrange(40)))
    for _ in range(150)
  ]
  cut = rng.randrange
  made += [PROSE[i : i + 60] for i in (cut(len(PROSE)) for _ in range(60))]
  return made + ["", " ", "  a", "<think>b", "<|end|><eos> x", "\n\n\n  12 345"]


NAMED = dict(bos_token_id=2, eos_token_id=1, unk_token_id=3, pad_token_id=0)
CASES = {
  "smollm": ("llama", "gpt2", dict(pre="smollm", add_bos_token=False)),
  "llama3": ("llama", "gpt2", dict(pre="llama-bpe", add_bos_token=True)),
  "llama3 without a flag": ("llama", "gpt2", dict(pre="llama-bpe")),
  "qwen2": ("qwen2", "gpt2", dict(pre="qwen2", add_eos_token=True)),
  "qwen3": ("qwen3", "gpt2", dict(pre="qwen2", add_bos_token=False)),
  "mistral nemo": ("llama", "gpt2", dict(pre="tekken", add_bos_token=True)),
  "an unknown cut": ("llama", "gpt2", dict(pre="tomorrow")),
  "no cut": ("llama", "gpt2", {}),
  "llama2": ("llama", "llama", dict(pre="default")),
  "llama2 without a bos": ("llama", "llama", dict(add_bos_token=False)),
  "llama2 with both": (
    "llama",
    "llama",
    dict(add_bos_token=True, add_eos_token=True, add_space_prefix=True),
  ),
  "llama2 with merges": ("llama", "llama", dict(merges=True)),
  "gemma2": ("gemma2", "llama", dict(add_bos_token=True)),
  "gemma3": ("gemma3", "llama", dict(pre="default", add_space_prefix=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(tmp_path, case):
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra 'parity'"
  )
  family, model, fields = CASES[case]
  named = NAMED if model == "llama" else dict(bos_token_id=1, eos_token_id=0)
  path = write(tmp_path / "m.gguf", family, model, **named, **fields)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = transformers.AutoTokenizer.from_pretrained(
      tmp_path, gguf_file=path.name
    )
  ours = tokenizers.load(str(path))
  ours.save(tmp_path / "saved")
  saved = tokenizers.load(str(tmp_path / "saved"))
  assert ours.eos_id == theirs.eos_token_id
  assert ours.named_bos_id == theirs.bos_token_id
  for text in texts():
    whole = theirs(text, split_special_tokens=True)["input_ids"]
    plain = theirs(text, split_special_tokens=True, add_special_tokens=False)
    parsed = theirs(text, add_special_tokens=False)["input_ids"]
    for tokenizer in (ours, saved, pickle.loads(pickle.dumps(ours))):
      assert tokenizers.with_special(tokenizer, text) == whole
      assert tokenizer.encode(text) == plain["input_ids"]
      assert tokenizer.encode(text, parse_special=True) == parsed
      assert tokenizer.decode(whole) == theirs.decode(
        whole, skip_special_tokens=True
      )


def test_chat_templates_and_names(tmp_path):
  path = tmp_path / "m.gguf"
  template = [
    {"name": "default", "template": "{{ bos_token }}"},
    {"name": "tool_use", "template": "b"},
  ]
  write(
    path,
    "llama",
    "gpt2",
    bos_token_id=1,
    eos_token_id=0,
    chat_template=template,
  )
  ours = tokenizers.load(str(path))
  assert ours.chat_templates == {"default": "{{ bos_token }}", "tool_use": "b"}
  assert ours.special_tokens["bos_token"] == "<|start|>"
  again = tokenizers.load(str(path))
  assert again.name == ours.name
  write(path, "llama", "gpt2", bos_token_id=1, eos_token_id=1)
  assert tokenizers.load(str(path)).name != ours.name


def test_two_different_files_of_one_name(tmp_path):
  path = write(tmp_path / "m.gguf", "llama", "gpt2", bos_token_id=1)
  assert gguf_metadata.read(path)["tokenizer.ggml.bos_token_id"] == 1
  assert tokenizers.load(str(path)).prefix == ()


@pytest.mark.parametrize(
  "damage, words",
  [
    (lambda data: b"", "not a whole GGUF file"),
    (lambda data: b"GGUX" + data[4:], "not a whole GGUF file"),
    (lambda data: data[:1000], "not a whole GGUF file"),
    (lambda data: data[:4] + b"\x00\x00\x00\x03" + data[8:], "version"),
    (lambda data: data.replace(b"gpt2", b"what"), "of kind 'what'"),
    (lambda data: data.replace(b".merges", b".mergez"), "has no merges"),
    (lambda data: data.replace(b"\xc4\xa0 t", b"\xc4\xa0\x00t"), "not fit"),
  ],
)
def test_damaged_files_are_one_line(tmp_path, damage, words):
  path = write(tmp_path / "m.gguf", "llama", "gpt2", bos_token_id=1)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=words) as raised:
    tokenizers.load(str(path))
  assert "\n" not in str(raised.value)
  assert str(path) in str(raised.value)


def test_numbers_of_the_metadata(tmp_path):
  path = write(tmp_path / "m.gguf", "llama", "llama", **NAMED)
  metadata = gguf_metadata.read(path)
  reader = gguf.GGUFReader(path)
  for key, field in reader.fields.items():
    if not key.startswith("GGUF."):
      np.testing.assert_array_equal(metadata[key], field.contents())
