"""Faults that users of neighbouring projects met: tokens and special tokens.

Each test fails without its cure. The neighbours of a fault that were tried are
its parameters. Bytes on the command line that are no text (8) are in
test_generate_command.py, chat templates (39) in test_chat.py.
"""

import json
import pickle
import shutil

import pytest

from cacheaug.data import tokenizers
from cacheaug.errors import UserError
from cacheaug.weights import pretrained

NANO = pretrained.resolve("shipped:nano")


@pytest.fixture
def make_tokenizer(tmp_path):
  """Function: the shipped byte tokenizer with other entries, in a directory.

  `template` None leaves the post-processor out; files are dictionaries.
  """

  def make(template=None, *, added=(), **files):
    directory = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
    directory.mkdir()
    entries = json.loads((NANO / "tokenizer.json").read_text())
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for number, content, special in added:
      token = dict(id=number, content=content, special=special)
      entries["added_tokens"].append(token | dict.fromkeys(flags, False))
    entries["post_processor"] = template
    (directory / "tokenizer.json").write_text(json.dumps(entries))
    for name, content in files.items():
      (directory / f"{name}.json").write_text(json.dumps(content))
    return directory

  return make


def template_of(*parts):
  """A post-processor; 'A' stands for the text."""
  ids = {"<eos>": 1, "<bos>": 2}

  def piece(part):
    if part == "A":
      return {"Sequence": {"id": "A", "type_id": 0}}
    return {"SpecialToken": {"id": part, "type_id": 0}}

  return {
    "type": "TemplateProcessing",
    "single": [piece(part) for part in parts],
    "pair": [piece("A"), {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
      part: {"id": part, "ids": [ids[part]], "tokens": [part]}
      for part in parts
      if part != "A"
    },
  }


BOS = template_of("<bos>", "A")
BOTH = template_of("<bos>", "A", "<eos>")
CONFIG = {"model_type": "llama", "bos_token_id": 2, "eos_token_id": 1}
NAMED = {"bos_token": "<bos>", "eos_token": "<eos>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


# --- 2: a special token beyond the table ------------------------------------


def test_2_special_tokens_beyond_the_table_are_harmless(make_tokenizer):
  image = (260, "<image_soft_token>", True)
  tokenizer = tokenizers.load(str(make_tokenizer(BOS, added=[image])))
  assert tokenizer.vocab_size == 260
  text = "<image_soft_token>"
  assert max(tokenizer.encode(text)) < 260
  assert tokenizer.decode([101, 260, 102]) == "ab"
  # Neighbours: as padding, as EOS, with holes before it.
  for number, role in ((260, "pad"), (260, "eos"), (999, "pad")):
    directory = make_tokenizer(
      BOS,
      added=[(number, "<x>", True)],
      tokenizer_config=NAMED | {f"{role}_token": "<x>"},
    )
    tokenizer = tokenizers.load(str(directory))
    assert tokenizer.vocab_size == 260
    assert tokenizer.pad_id < 260


def test_2_entries_that_text_can_give_still_count(make_tokenizer):
  plain = (260, "<think>", False)
  tokenizer = tokenizers.load(str(make_tokenizer(BOS, added=[plain])))
  assert tokenizer.vocab_size == 261
  assert tokenizer.encode("a<think>") == [101, 260]


# --- 5 and 18: what stands before a text ------------------------------------

SURROUNDINGS = {
  "qwen": (None, {"bos_token": None, "eos_token": "<eos>"}, None),
  "smollm": (
    None,
    {"bos_token": "<eos>", "eos_token": "<eos>"}
    | {"tokenizer_class": "GPT2Tokenizer"},
    None,
  ),
  "flag without post-processor": (None, NAMED | {"add_bos_token": True}, None),
  "post-processor": (BOS, NAMED, 2),
  "post-processor against the flag": (
    BOS,
    NAMED | {"add_bos_token": False},
    2,
  ),
  "post-processor and null": (BOS, NAMED | {"bos_token": None}, None),
  "both ends": (BOTH, NAMED, 2),
  "only an end": (template_of("A", "<eos>"), NAMED, None),
  "another before it": (template_of("<eos>", "A"), NAMED, None),
}


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_5_the_post_processor_decides(make_tokenizer, case):
  template, config, bos_id = SURROUNDINGS[case]
  directory = make_tokenizer(
    template, config=CONFIG, tokenizer_config=FAST | config
  )
  tokenizer = tokenizers.load(str(directory))
  assert tokenizer.bos_id == bos_id
  names = [
    p.get("SpecialToken", {}).get("id") for p in (template or BOS)["single"]
  ]
  at = names.index(None)
  ids = {"<eos>": 1, "<bos>": 2}
  before = [ids[name] for name in names[:at]] if template else []
  after = [ids[name] for name in names[at + 1 :]] if template else []
  assert tokenizers.with_special(tokenizer, "ab") == [
    *before,
    101,
    102,
    *after,
  ]
  tokenizer.save(directory / "again")
  again = tokenizers.load(str(directory / "again"))
  for copy in (again, pickle.loads(pickle.dumps(tokenizer))):
    assert copy.name == tokenizer.name
    assert tokenizers.with_special(copy, "ab") == [*before, 101, 102, *after]
    assert (copy.bos_id, copy.named_bos_id) == (bos_id, tokenizer.named_bos_id)
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra 'parity'"
  )
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  for text in ("ab", "", " x\n", "<bos>"):
    want = theirs(text, split_special_tokens=True)["input_ids"]
    assert tokenizers.with_special(tokenizer, text) == want
    plain = theirs(text, split_special_tokens=True, add_special_tokens=False)
    assert tokenizer.encode(text) == plain["input_ids"]
    parsed = theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text, parse_special=True) == parsed


def test_18_shipped_and_exported_bytes_put_their_bos_everywhere(tmp_path):
  library = pytest.importorskip("tokenizers")
  expected = [2, 101, 102]
  tokenizers.ByteTokenizer().save(tmp_path)
  for directory in (tmp_path, NANO, pretrained.resolve("shipped:tiny")):
    file = str(directory / "tokenizer.json")
    assert library.Tokenizer.from_file(file).encode("ab").ids == expected
    tokenizer = tokenizers.load(str(directory))
    assert tokenizers.with_special(tokenizer, "ab") == expected


def test_18_exports_from_before_keep_their_bos(make_tokenizer):
  directory = make_tokenizer(None)
  shutil.copy(NANO / "tokenizer_config.json", directory)
  tokenizer = tokenizers.load(str(directory))
  assert tokenizers.with_special(tokenizer, "ab") == [2, 101, 102]
  tokenizer.save(directory / "again")
  again = json.loads((directory / "again" / "tokenizer.json").read_text())
  assert again["post_processor"]["type"] == "TemplateProcessing"
  assert tokenizers.load(str(directory / "again")).name == tokenizer.name


# --- 6: negative ids --------------------------------------------------------


@pytest.mark.parametrize("role", ["bos", "eos", "pad"])
@pytest.mark.parametrize("number", [-1, -100, [], [-1], None])
def test_6_negative_and_empty_ids_are_none(make_tokenizer, role, number):
  config = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
  directory = make_tokenizer(BOS, config=config | {f"{role}_token_id": number})
  tokenizer = tokenizers.load(str(directory))
  assert 0 <= tokenizer.pad_id < 260
  if role == "eos":
    assert tokenizer.eos_id is None
  assert tokenizer.prefix == (2,)


# --- 7: lone surrogates -----------------------------------------------------


@pytest.mark.parametrize(
  "text", ["a\ud83d b", "\udc97", "\ude00\ud83d", "\ud83d"]
)
def test_7_lone_surrogates_are_replaced(shared_data, text):
  expected = text.encode(errors="replace").decode()
  byte = tokenizers.load("byte")
  json_file = tokenizers.load(str(NANO))
  assert byte.encode(text) == json_file.encode(text) == byte.encode(expected)
  parsed = json_file.encode(text, parse_special=True)
  assert parsed == byte.encode(expected)
  path = shared_data("tokenizers", "sp_test_model_1000.model")
  pieces = tokenizers.load(f"sentencepiece:{path}")
  assert pieces.encode(text) == pieces.encode(expected)


def test_empty_lists_of_ids_are_no_index_error(make_tokenizer):
  directory = make_tokenizer(BOS, config={"eos_token_id": []})
  assert tokenizers.load(str(directory)).eos_id is None


def test_broken_files_are_one_line(make_tokenizer):
  directory = make_tokenizer(BOS)
  (directory / "tokenizer_config.json").write_text("[" * 100_000)
  with pytest.raises(UserError, match="tokenizer_config.json: not JSON"):
    tokenizers.load(str(directory))
