"""Tokenizers: exact round trips, no special token in or out of a text."""

import json
import pickle
import random

import pytest

from cacheaug import errors
from cacheaug.data import tokenizers

_TEXTS = [
  "",
  " ",
  "Hello, world",
  "  two  spaces\n\n\tand tabs \r\n",
  "café Ω 漢字 🙂",
  "\x00\x01\x7f\x80ÿ",
  "<bos>not special<eos><pad><unk>",
]


def _random_texts(count: int) -> list[str]:
  rng = random.Random(0)
  return [
    "".join(
      chr(rng.choice([rng.randrange(1, 128), rng.randrange(1, 0xD7FF)]))
      for _ in range(rng.randrange(40))
    )
    for _ in range(count)
  ]


def test_bytes_are_shifted_by_four():
  tokenizer = tokenizers.load("byte")
  assert tokenizer.encode("aé\n") == [101, 199, 173, 14]
  assert tokenizer.decode([2, 101, 199, 173, 0, 14, 1]) == "aé\n"
  special = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id)
  assert special == (0, 1, 2)
  assert tokenizer.vocab_size == 260
  assert max(tokenizer.encode("".join(_TEXTS))) < tokenizer.vocab_size


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
  directory = tmp_path_factory.mktemp("byte")
  tokenizers.ByteTokenizer().save(directory)
  return directory


@pytest.mark.parametrize("pickled", [False, True])
def test_saved_bytes_are_a_hugging_face_tokenizer(saved_bytes, pickled):
  expected = tokenizers.ByteTokenizer()
  found = tokenizers.load(str(saved_bytes))
  assert isinstance(found, tokenizers.HuggingFaceTokenizer)
  if pickled:  # Packing sends tokenizers to its workers.
    found = pickle.loads(pickle.dumps(found))
  for name in ("vocab_size", "pad_id", "bos_id", "eos_id"):
    assert getattr(found, name) == getattr(expected, name)
  rng = random.Random(1)
  for text in _TEXTS + _random_texts(300):
    ids = expected.encode(text)
    assert found.encode(text) == ids
    assert expected.decode(ids) == found.decode(ids) == text
    noise = [rng.randrange(300) for _ in range(20)]
    assert found.decode(noise) == expected.decode(noise)


def test_transformers_reads_saved_bytes(saved_bytes):
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra 'parity'"
  )
  found = transformers.PreTrainedTokenizerFast.from_pretrained(saved_bytes)
  assert found.bos_token_id == 2
  ids = found("café 12", add_special_tokens=False)["input_ids"]
  assert ids == tokenizers.ByteTokenizer().encode("café 12")


def test_partial_characters_do_not_raise(shared_data):
  byte = tokenizers.ByteTokenizer()
  assert byte.decode(byte.encode("é")[:1]) == "\ufffd"
  spec = f"sentencepiece:{shared_data('tokenizers', _T5)}"
  assert isinstance(tokenizers.load(spec).decode([-1, 10**6, 2]), str)


_T5 = "t5_cc_all.32000.100extra.model"


def test_sentencepiece(shared_data, tmp_path):
  path = shared_data("tokenizers", _T5)
  tokenizer = tokenizers.load(f"sentencepiece:{path}")
  assert tokenizer.vocab_size == 32101
  special = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id)
  assert special == (0, 1, 2)
  ids = tokenizer.encode("Ann has 7 pens.")
  assert not {0, 1, 2} & set(ids)
  assert tokenizer.decode([2, *ids, 1, 0]) == "Ann has 7 pens."
  tokenizer.save(tmp_path)
  again = tokenizers.load(str(tmp_path))
  assert again.name == tokenizer.name
  assert pickle.loads(pickle.dumps(again)).encode("Ann has 7 pens.") == ids


def test_sentencepiece_without_pad_fills_with_eos(shared_data):
  path = shared_data("tokenizers", "sp_test_model_1000.model")
  tokenizer = tokenizers.load(f"sentencepiece:{path}")
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
  assert tokenizer.vocab_size == 1000


def test_hugging_face(shared_data, tmp_path):
  tokenizer = tokenizers.load(str(shared_data("tinystories656K")))
  special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
  assert special == (0, 1, 2)
  assert tokenizer.vocab_size == 2048
  ids = tokenizer.encode("Once upon a time")
  # Its post-processor would add <|start_story|>.
  assert not {0, 1, 2} & set(ids)
  assert tokenizer.decode([1, *ids, 2, 0]).strip() == "Once upon a time"
  assert 2 not in tokenizer.encode("the <|end_story|> token")
  tokenizer.save(tmp_path)
  again = tokenizers.load(f"hf:{tmp_path / 'tokenizer.json'}")
  assert again.name == tokenizer.name
  assert again.encode("Once upon a time") == ids


def test_specials_fall_back_to_config_ids(saved_bytes, tmp_path):
  content = (saved_bytes / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(content)
  config = {"bos_token_id": 2, "eos_token_id": [1, 3]}
  (tmp_path / "config.json").write_text(json.dumps(config))
  tokenizer = tokenizers.load(str(tmp_path))
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 1)
  # Another bos gives other rows, so another cache.
  assert tokenizer.name != tokenizers.load(str(saved_bytes)).name


def test_no_bos_where_the_tokenizer_adds_none(saved_bytes, tmp_path):
  """Qwen's files: a bos in config.json, and add_bos_token false."""
  content = (saved_bytes / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(content)
  own = {"add_bos_token": False, "bos_token": None, "eos_token": "<eos>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
  (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 2}))
  tokenizer = tokenizers.load(str(tmp_path))
  assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_name_follows_the_content(saved_bytes, tmp_path):
  content = (saved_bytes / "tokenizer.json").read_text()
  changed = content.replace('"use_regex": false', '"use_regex": true')
  assert changed != content
  for name, text in (("a", content), ("b", content), ("c", changed)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer.json").write_text(text)
  a, b, c = (tokenizers.load(str(tmp_path / n)).name for n in "abc")
  assert a == b != c


@pytest.mark.parametrize("spec", ["bytes", "sentencepiece:", "unigram:x"])
def test_unknown_spec(spec):
  with pytest.raises(errors.UserError, match=spec.split(":")[0]):
    tokenizers.load(spec)


def test_missing_and_corrupt_files(tmp_path):
  with pytest.raises(errors.UserError, match="no tokenizer.json"):
    tokenizers.load(str(tmp_path))
  for kind in ("hf", "sentencepiece"):
    with pytest.raises(errors.UserError, match="absent"):
      tokenizers.load(f"{kind}:{tmp_path / 'absent'}")
    for content in (b"", b"\xff not a tokenizer", b"{}"):
      path = tmp_path / "corrupt"
      path.write_bytes(content)
      with pytest.raises(errors.UserError, match="corrupt") as raised:
        tokenizers.load(f"{kind}:{path}")
      assert "\n" not in str(raised.value)
