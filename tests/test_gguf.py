"""GGUF files: against transformers bit for bit, and every family's own."""

import dataclasses
import re
import warnings

import gguf_files
import jax
import make_golden
import numpy as np
import pytest

from cacheaug import build
from cacheaug import config as configs
from cacheaug.data import gguf_metadata
from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.model import rope_scaling
from cacheaug.weights import (
  gguf_io,
  leaves,
  pretrained,
  transformers_files,
)

gguf = pytest.importorskip("gguf", reason="pip install 'cacheaug[gguf]'")

KINDS = (
  *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"),
  *("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"),
)
# Rows of 256, as the K quantisations want them.
SHAPE = dict(
  vocab_size=32, width=256, layers=2, heads=4, kv_heads=2, head_dim=64,
  mlp_width=256, max_positions=64,
)  # fmt: skip


@pytest.mark.parametrize(
  "family", ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
)
def test_weights_are_transformers_bit_for_bit(family, tmp_path):
  """Every quantisation, and what each family's converter changes."""
  transformers = pytest.importorskip("transformers", reason="cacheaug[parity]")
  changes = dict(tied_head=False) if family in ("llama", "qwen3") else {}
  # Sizes that transformers takes for granted and does not read.
  changes |= {"gemma3": dict(head_dim=256), "qwen3": dict(head_dim=128)}.get(
    family, {}
  )
  config = model_config.make(family, **SHAPE | changes)
  path = tmp_path / "m.gguf"
  gguf_files.write_random(path, config, KINDS)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, gguf_file="m.gguf", dtype="float32"
    ).state_dict()
  ours = pretrained.read_config(path)
  assert _alike(ours, config)
  flat = leaves.flatten(pretrained.load(path, ours, dtype="float32"))
  compared = 0
  for leaf in leaves.leaves_of(config):
    array = np.asarray(flat[leaf.path])
    for name, part in zip(
      leaf.names, array if leaf.stacked else array[None], strict=True
    ):
      want = theirs[name].numpy()
      assert np.isfinite(want).all() and want.std() > 0.01
      np.testing.assert_array_equal(leaf.theirs(part), want, err_msg=name)
      compared += 1
  assert compared == len(theirs) - (config.tied_head)
  assert set(pretrained.quantisation(path).split(", ")) <= set(KINDS[3:])


def _alike(ours, config):
  """Equal, but for the window of a decoder that has no sliding layers."""
  return dataclasses.replace(ours, window=config.window) == config


@pytest.mark.parametrize("case", make_golden.GOLDEN_CASES)
@pytest.mark.parametrize("kind", ("F32", "BF16"))
def test_every_family_comes_back(case, kind, tmp_path):
  """A Hugging Face directory as llama.cpp would convert it, read again."""
  path = tmp_path / "m.gguf"
  config, params = gguf_files.write_plain(
    path, make_golden.GOLDEN / case, kind=kind
  )
  pattern = model_config.make(config.family, layers=config.layers).layer_kinds
  if config.family == "mistral":  # is a llama there, and without a window
    config = dataclasses.replace(
      config, family="llama", window=0, layer_kinds=("global",) * config.layers
    )
  elif config.family == "gemma3":  # transformers' golden one has another scale
    config = dataclasses.replace(config, query_scale=0.0)
  elif config.family == "gemma2":
    config = dataclasses.replace(config, query_scale=0.0)
  elif config.family == "smollm3":  # whose pattern llama.cpp holds fixed
    config = dataclasses.replace(config, layer_kinds=pattern)
  elif dict(config.rope_scaling).get("rope_type") == "llama3":
    config = dataclasses.replace(config, rope_scaling=())
  assert _alike(gguf_io.read_config(path), config)
  ours = gguf_io.load(path, config, dtype="float32")
  jax.tree.map(_equal_to_float32, ours, params)
  assert gguf_io.quantisation(path) == ""


def _equal_to_float32(ours, theirs):
  # One was added to Gemma's norms and is taken away again: a rounding.
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-23)


def test_control_without_the_permutation(tmp_path, monkeypatch):
  """What is undone matters: without it other weights come."""
  monkeypatch.setattr(gguf_io, "_undo", lambda *args: None)
  for case in ("llama", "gemma"):
    path = tmp_path / f"{case}.gguf"
    config, params = gguf_files.write_plain(path, make_golden.GOLDEN / case)
    ours = gguf_io.load(path, config, dtype="float32")
    with pytest.raises(AssertionError):
      jax.tree.map(_equal_to_float32, ours, params)


def test_metadata_is_that_of_the_library(tmp_path):
  """Our reader, which is fast, against gguf's, which is not."""
  path = tmp_path / "m.gguf"
  texts = ["a", "\u00e4\u00f6", ""]

  def change(writer):
    writer.add_token_list(texts)
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_add_bos_token(False)
    writer.add_custom_alignment(64)

  gguf_files.write_plain(
    path, make_golden.GOLDEN / "qwen3", kind="F16", change=change
  )
  metadata, entries = gguf_metadata.read_all(path)
  reader = gguf.GGUFReader(path)
  for key, value in metadata.items():
    theirs = reader.fields[key].contents()
    np.testing.assert_array_equal(value, theirs, err_msg=key)
  assert metadata["tokenizer.ggml.tokens"] == texts
  assert [*entries] == [tensor.name for tensor in reader.tensors]
  for tensor in reader.tensors:
    entry = entries[tensor.name]
    assert entry.shape == tuple(reversed(tensor.shape.tolist()))
    assert entry.kind == tensor.tensor_type
    assert entry.offset == tensor.data_offset


def test_llama3_scaling_from_its_divisors(tmp_path):
  """A file of Llama 3.2 holds what frequencies are divided by."""
  golden = make_golden.GOLDEN / "llama"
  config, _ = gguf_files.write_plain(tmp_path / "a.gguf", golden)
  scaling = dict(config.rope_scaling) | {
    "factor": 32.0,
    "original_max_position_embeddings": 8192,
  }
  scaled = dataclasses.replace(
    config, rope_scaling=tuple(sorted(scaling.items()))
  )
  plain = dataclasses.replace(config, rope_scaling=())
  divisors = rope_scaling.frequencies(plain) / rope_scaling.frequencies(scaled)
  assert divisors.max() > 5

  def add(tensor):
    return lambda writer: writer.add_tensor("rope_freqs.weight", tensor)

  gguf_files.write_plain(tmp_path / "b.gguf", golden, change=add(divisors))
  assert gguf_io.read_config(tmp_path / "b.gguf") == scaled
  gguf_io.load(tmp_path / "b.gguf", scaled, dtype="float32")
  gguf_files.write_plain(tmp_path / "c.gguf", golden, change=add(divisors * 2))
  with refuses("c.gguf: rope_freqs.weight holds RoPE divisors that are not"):
    gguf_io.read_config(tmp_path / "c.gguf")


def test_stop_ids(tmp_path):
  def change(writer):
    writer.add_eos_token_id(7)
    writer.add_eot_token_id(3)

  path = tmp_path / "m.gguf"
  gguf_files.write_plain(path, make_golden.GOLDEN / "qwen3", change=change)
  assert pretrained.stop_ids(path) == (3, 7)


def test_reports_and_cards_say_quantised(tmp_path):
  """And which licence the file names."""
  path = tmp_path / "m.gguf"
  config = model_config.make("llama", **SHAPE)
  gguf_files.write_random(path, config, ("Q8_0", "F32", "Q4_0"))
  run = configs.base()
  run.decoder.path = str(path)
  name = build.name_decoder(run, "123456789abc")
  assert name == f"{path} (123456789abc, dequantised from Q8_0, Q4_0)"
  entries = dict(source=str(path), family="llama", kind="pause", latents=2)
  entries |= dict(decoder_fingerprint="", positions="replace", start="as_is")
  card = transformers_files.model_card(entries)
  assert "(family llama, dequantised from Q8_0, Q4_0)" in card
  assert "license: apache-2.0" in card
  gguf_files.write_random(path, config, ("BF16",))
  assert "dequantised" not in transformers_files.model_card(entries)
  assert "dequantised" not in build.name_decoder(run, "123456789abc")


# --- refusals ---------------------------------------------------------------


def refuses(message):
  return pytest.raises(UserError, match=re.escape(message))


@pytest.fixture
def plain(tmp_path):
  path = tmp_path / "m.gguf"
  config, _ = gguf_files.write_plain(path, make_golden.GOLDEN / "qwen3")
  return path, config


@pytest.mark.parametrize("keep", (0, 3, 40, 400, -2000))
def test_cut_off(plain, keep):
  path, config = plain
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*ownload"):
    gguf_io.load(path, config, dtype="float32")


def test_missing_and_no_gguf(tmp_path):
  with refuses("absent.gguf: no such file of weights"):
    pretrained.resolve(str(tmp_path / "absent.gguf"))
  (tmp_path / "a.gguf").write_text("x" * 100)
  with refuses("a.gguf: not a whole GGUF file"):
    pretrained.read_config(tmp_path / "a.gguf")


@pytest.mark.parametrize(
  "changes, message",
  (
    ({"general.architecture": "mamba"}, "architecture 'mamba' is not support"),
    ({"split.count": 3}, "one part of 3: join them first"),
    ({"qwen3.expert_count": 8}, "mixtures of experts"),
    ({"qwen3.attention.head_count_kv": [2, 1, 2]}, "differs by layer"),
    ({"qwen3.rope.dimension_count": 4}, "RoPE of 4 of 8 dimensions"),
    ({"qwen3.rope.scaling.type": "longrope"}, "rope_type 'longrope' is not"),
    ({"qwen3.embedding_length": "x"}, "qwen3.embedding_length 'x' is not a"),
    ({"qwen3.block_count": 2}, "has an unexpected tensor blk.2."),
    ({"qwen3.feed_forward_length": 16}, "ffn_down.weight is [24, 32], the met"),
  ),
)
def test_refused(plain, changes, message, monkeypatch):
  path, _ = plain
  metadata, tensors = gguf_metadata.read_all(path)
  monkeypatch.setattr(
    gguf_metadata, "read_all", lambda path: (metadata | changes, tensors)
  )
  with refuses(f"{path}: ") as error:
    gguf_io.load(path, gguf_io.read_config(path), dtype="float32")
  assert message in str(error.value)


def test_unknown_quantisation(plain, monkeypatch):
  path, config = plain
  metadata, tensors = gguf_metadata.read_all(path)
  entry = dataclasses.replace(tensors["blk.0.attn_q.weight"], kind=999)
  changed = tensors | {"blk.0.attn_q.weight": entry}
  monkeypatch.setattr(
    gguf_metadata, "read_all", lambda path: (metadata, changed)
  )
  with refuses("blk.0.attn_q.weight is of type 999, which the gguf library"):
    gguf_io.load(path, config, dtype="float32")


def test_yarn(tmp_path):
  """The scaling of a long-context file, as transformers' keys have it."""
  path = tmp_path / "m.gguf"
  config, _ = gguf_files.write_plain(path, make_golden.GOLDEN / "qwen2")
  scaling = dict(config.rope_scaling)
  assert scaling["rope_type"] == "yarn"
  assert gguf_io.read_config(path).rope_scaling == config.rope_scaling
