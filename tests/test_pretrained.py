"""Directories of weights: config.json by hand, placement, memory, refusals."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
import safetensors.numpy

from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.model.config import GLOBAL, SLIDING
from cacheaug.weights import (
  config_json,
  huggingface,
  leaves,
  pretrained,
  safetensors_io,
)

LLAMA3 = {
  "factor": 32.0,
  "high_freq_factor": 4.0,
  "low_freq_factor": 1.0,
  "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}
# What the published config.json files say, cut to the keys that matter.
PUBLISHED = {
  "gemma-2-2b": (
    dict(
      model_type="gemma2",
      attn_logit_softcapping=50.0,
      final_logit_softcapping=30.0,
      head_dim=256,
      hidden_act="gelu_pytorch_tanh",
      hidden_activation="gelu_pytorch_tanh",
      hidden_size=2304,
      intermediate_size=9216,
      max_position_embeddings=8192,
      num_attention_heads=8,
      num_hidden_layers=26,
      num_key_value_heads=4,
      query_pre_attn_scalar=256,
      rms_norm_eps=1e-06,
      rope_theta=10000.0,
      sliding_window=4096,
      vocab_size=256000,
    ),
    model_config.make(
      "gemma2",
      vocab_size=256_000,
      width=2304,
      layers=26,
      heads=8,
      kv_heads=4,
      head_dim=256,
      mlp_width=9216,
    ),
  ),
  # An image-text model; everything else is transformers' default.
  "gemma-3-4b": (
    dict(
      model_type="gemma3",
      text_config=dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
      ),
    ),
    model_config.make(
      "gemma3",
      vocab_size=262_208,
      width=2560,
      layers=34,
      heads=8,
      kv_heads=4,
      head_dim=256,
      mlp_width=10240,
      max_positions=131_072,
      window=1024,
      rope_scaling=(("factor", 8.0), ("rope_type", "linear")),
    ),
  ),
  "Llama-3.2-1B": (
    dict(
      model_type="llama",
      attention_bias=False,
      head_dim=64,
      hidden_act="silu",
      hidden_size=2048,
      intermediate_size=8192,
      max_position_embeddings=131072,
      mlp_bias=False,
      num_attention_heads=32,
      num_hidden_layers=16,
      num_key_value_heads=8,
      rms_norm_eps=1e-05,
      rope_scaling=LLAMA3,
      rope_theta=500000.0,
      tie_word_embeddings=True,
      vocab_size=128256,
    ),
    model_config.make(
      "llama",
      vocab_size=128_256,
      width=2048,
      layers=16,
      heads=32,
      kv_heads=8,
      head_dim=64,
      mlp_width=8192,
      max_positions=131_072,
      rope_scaling=tuple(sorted(LLAMA3.items())),
    ),
  ),
  "Qwen3-0.6B": (
    dict(
      model_type="qwen3",
      attention_bias=False,
      head_dim=128,
      hidden_act="silu",
      hidden_size=1024,
      intermediate_size=3072,
      max_position_embeddings=40960,
      max_window_layers=28,
      num_attention_heads=16,
      num_hidden_layers=28,
      num_key_value_heads=8,
      rms_norm_eps=1e-06,
      rope_scaling=None,
      rope_theta=1000000,
      sliding_window=None,
      tie_word_embeddings=True,
      use_sliding_window=False,
      vocab_size=151936,
    ),
    model_config.make(
      "qwen3",
      vocab_size=151_936,
      width=1024,
      layers=28,
      heads=16,
      kv_heads=8,
      head_dim=128,
      mlp_width=3072,
      max_positions=40_960,
    ),
  ),
}


def write_config(directory, entries):
  (directory / "config.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name, tmp_path):
  entries, expected = PUBLISHED[name]
  write_config(tmp_path, entries)
  assert pretrained.read_config(tmp_path) == expected


def test_old_and_new_keys_agree(tmp_path):
  """Gemma-3 as transformers 5 writes it, and as it was before."""
  shutil.copy(make_golden.GOLDEN / "gemma3" / "config.json", tmp_path)
  new = json.loads((tmp_path / "config.json").read_text())
  rope = new.pop("rope_parameters")
  old = new | {
    "rope_theta": rope["full_attention"]["rope_theta"],
    "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "sliding_window_pattern": 6,
  }
  del old["layer_types"]
  config = pretrained.read_config(tmp_path)
  write_config(tmp_path, old)
  assert pretrained.read_config(tmp_path) == config
  assert config.layer_kinds == (SLIDING,) * 5 + (GLOBAL, SLIDING)
  assert config.query_scale == 24**-0.5


# --- placement --------------------------------------------------------------


@pytest.fixture
def golden(tmp_path):
  """A writable copy of a tiny Llama with its own head."""
  directory = tmp_path / "llama"
  shutil.copytree(make_golden.GOLDEN / "llama", directory)
  return directory


def load(directory, **changes):
  kwargs = {"dtype": jnp.float32} | changes
  return pretrained.load(directory, pretrained.read_config(directory), **kwargs)


def test_shardings_dtype_and_fingerprint(golden):
  """Each shard holds its part of the tensors, whatever the mesh and dtype."""
  params = load(golden)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  split = {
    "embedder/embedding": ("b", "a"),
    "blocks/attention/q/kernel": (None, "a", "b", None),
    "blocks/attention/o/kernel": (None, "b", None, "a"),
    "blocks/mlp/down/kernel": (None, ("a", "b"), None),
    "head/kernel": ("a", "b"),
  }

  def sharding(path, _):
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = jax.sharding.PartitionSpec(*split.get(path, ()))
    return jax.sharding.NamedSharding(mesh, spec)

  shardings = jax.tree_util.tree_map_with_path(sharding, params)
  for dtype in (jnp.float32, jnp.bfloat16):
    placed = load(golden, dtype=dtype, shardings=shardings)
    # The stored weights are bfloat16: both dtypes hold them exactly.
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    assert all(x.dtype == dtype for x in jax.tree.leaves(placed))
    assert leaves.fingerprint(placed) == leaves.fingerprint(params)
  q = params["blocks"]["attention"]["q"]
  q["kernel"] = q["kernel"].at[1, 2, 3, 4].add(0.01)
  assert leaves.fingerprint(placed) != leaves.fingerprint(params)


class Tokenizer:
  bos_id, eos_id, pad_id = 5, 6, None

  def save(self, directory):
    (directory / "tokenizer.json").write_text("{}")


def test_save_round_trip(golden, tmp_path):
  config, params = pretrained.read_config(golden), load(golden)
  for name in "ab":
    huggingface.save(tmp_path / name, config, params, tokenizer=Tokenizer())
  a, b = tmp_path / "a", tmp_path / "b"
  assert sorted(p.name for p in a.iterdir()) == [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  for file in a.iterdir():
    assert file.read_bytes() == (b / file.name).read_bytes()
  assert pretrained.read_config(a) == config
  assert pretrained.stop_ids(a) == (6,)
  jax.tree.map(np.testing.assert_array_equal, load(a), params)
  theirs = safetensors.numpy.load_file(golden / "model.safetensors")
  ours = safetensors.numpy.load_file(a / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(tensor.astype(np.float32), ours[name])


def test_save_bfloat16(golden, tmp_path):
  config, params = pretrained.read_config(golden), load(golden)
  huggingface.save(tmp_path / "a", config, params, dtype="bfloat16")
  found = safetensors_io.headers([tmp_path / "a" / "model.safetensors"])
  assert {code for _, code in found.values()} == {"BF16"}
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a"), params)


def test_failed_save_leaves_the_old_file(golden):
  before = (golden / "model.safetensors").read_bytes()
  config, params = pretrained.read_config(golden), load(golden)
  params["head"]["kernel"] = params["head"]["kernel"][:, :5]
  with pytest.raises(ValueError, match="reshape"):
    huggingface.save(golden, config, params)
  assert (golden / "model.safetensors").read_bytes() == before
  assert not list(golden.glob(".*"))


def test_save_refuses_what_the_family_cannot_say(tmp_path):
  config = model_config.make("llama", final_softcap=30.0)
  with pytest.raises(UserError, match="final_softcap=30.0 cannot be written"):
    huggingface.save(tmp_path, config, {})


# --- memory -----------------------------------------------------------------

CHILD = """
import pathlib, re, sys
import jax, jax.numpy as jnp
from cacheaug.weights import config_json, families, leaves, pretrained

def peak():
  # Not getrusage: its maximum is inherited from the process that forked.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search("VmHWM:\\s+(\\d+)", status)[1]) * 1024

config = pretrained.read_config(sys.argv[1])
leaves.leaves_of(config)
jnp.zeros(8).block_until_ready()
before = peak()
params = pretrained.load(sys.argv[1], config, dtype=jnp.float32)
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(
  not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
@pytest.mark.parametrize(
  "layers, width",
  (
    (12, 512),  # 0.2 GB
    pytest.param(16, 1024, marks=pytest.mark.slow),  # 1 GB
  ),
)
def test_no_second_copy_on_the_host(layers, width, tmp_path):
  """Peak memory of a fresh process, over what it had before loading."""
  config = model_config.make(
    "qwen3", width=width, layers=layers, heads=8, head_dim=width // 8,
    kv_heads=8, mlp_width=4 * width, vocab_size=8000,
  )  # fmt: skip
  wanted = leaves.leaves_of(config)
  shapes = {
    name: (leaf.tensor_shape, np.dtype(np.float32))
    for leaf in wanted
    for name in leaf.names
  }
  tensors = (np.ones(shape, dtype) for shape, dtype in shapes.values())
  safetensors_io.write(tmp_path / "model.safetensors", shapes, tensors)
  entries = config_json.config_entries(config)
  write_config(tmp_path, entries)
  child = subprocess.run(
    [sys.executable, "-c", CHILD, str(tmp_path)],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).resolve().parent.parent,
  )
  peak, size = map(int, child.stdout.split())
  assert size > 0.9 * (tmp_path / "model.safetensors").stat().st_size
  print(f"peak {peak / size:.2f} times the checkpoint")
  assert peak < 1.3 * size, f"{peak / size:.2f} times the checkpoint"


# --- refusals ---------------------------------------------------------------


def refuses(message):
  return pytest.raises(UserError, match=re.escape(message))


def test_resolve(tmp_path):
  assert pretrained.resolve(str(tmp_path)) == tmp_path
  with refuses(f"{tmp_path}/absent: no such directory"):
    pretrained.resolve(f"{tmp_path}/absent")
  with refuses("shipped:absent: no such decoder in the package ("):
    pretrained.resolve("shipped:absent")


@pytest.mark.parametrize(
  "changes, message",
  (
    (dict(model_type="gpt2"), "model_type 'gpt2' is not supported (supported:"),
    (dict(quantization_config={"bits": 4}), "quantization_config is not"),
    (dict(rope_parameters={"rope_type": "yarn"}), "has no 'factor'"),
    (
      dict(rope_parameters={"rope_type": "longrope"}),
      "rope_type 'longrope' is not",
    ),
    (dict(hidden_act="relu"), "hidden_act 'relu' is not supported (silu"),
    (dict(hidden_size="24"), "hidden_size '24' is not of type int"),
    (dict(num_attention_heads=0), "num_attention_heads 0 must be 1 or more"),
    (dict(num_hidden_layers=None), "has no 'num_hidden_layers'"),
    (dict(layer_types=["chunked_attention"] * 3), "layer_types 'chunked"),
  ),
)
def test_refused_configs(changes, message, golden):
  entries = json.loads((golden / "config.json").read_text())
  write_config(golden, entries | changes)
  with refuses(f"{golden / 'config.json'}: {message}"):
    pretrained.read_config(golden)


def test_no_config_and_no_json(tmp_path):
  with refuses("config.json: missing"):
    pretrained.read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with refuses("config.json: cannot be read as JSON"):
    pretrained.read_config(tmp_path)


def edit_tensors(directory, change):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  "change, message",
  (
    (lambda t: t.pop(UP), f"has no tensor {UP}:"),
    (lambda t: t.pop("lm_head.weight"), "has no tensor lm_head.weight"),
    (lambda t: t.update(a=t[UP], b=t[UP]), "has an unexpected tensor"),
    (
      lambda t: t.update({UP: t[UP][:, :5]}),
      f"model.safetensors: {UP} is [32, 5], config.json wants [32, 24]",
    ),
    (
      lambda t: t.update({UP: np.zeros((32, 24), np.int8)}),
      f"model.safetensors: {UP} is I8: quantised",
    ),
  ),
)
def test_refused_tensors(change, message, golden):
  edit_tensors(golden, change)
  with refuses(message):
    load(golden)


def test_another_family(golden):
  """A Llama's weights under a Qwen3 config: the first missing name."""
  config = pretrained.read_config(make_golden.GOLDEN / "qwen3")
  with refuses("has no tensor model.layers.0.self_attn.k_norm.weight and"):
    pretrained.load(golden, config, dtype=jnp.float32)


@pytest.mark.parametrize("keep", (5, 1000, -1))
def test_truncated(keep, golden):
  path = golden / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with refuses(f"{path}: cannot be read as safetensors, truncated"):
    load(golden)


def test_index(golden):
  path = golden / "model.safetensors"
  names = safetensors_io.headers([path])
  path.rename(golden / "model-1.safetensors")
  index = golden / "model.safetensors.index.json"
  weights = dict.fromkeys(names, "model-1.safetensors")
  index.write_text(json.dumps({"weight_map": weights}))
  load(golden)

  weights[UP] = "model-2.safetensors"
  index.write_text(json.dumps({"weight_map": weights}))
  with refuses("model-2.safetensors: missing, though"):
    load(golden)
  other = {UP + "x": np.zeros(1, np.float32)}
  safetensors.numpy.save_file(other, golden / "model-2.safetensors")
  edited = dict(safetensors.numpy.load_file(golden / "model-1.safetensors"))
  del edited[UP]
  safetensors.numpy.save_file(edited, golden / "model-1.safetensors")
  with refuses(f"model-2.safetensors: has no tensor {UP}"):
    load(golden)
  index.write_text("{}")
  with refuses("index.json: has no weight_map"):
    load(golden)


def test_pickle_only(golden):
  (golden / "model.safetensors").rename(golden / "pytorch_model.bin")
  with refuses("pytorch_model.bin: a pickle"):
    load(golden)
  (golden / "pytorch_model.bin").unlink()
  with refuses("holds neither model.safetensors nor"):
    load(golden)


def test_torch_is_never_imported():
  code = "import sys, cacheaug.export; print('torch' in sys.modules)"
  child = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).resolve().parent.parent,
  )
  assert child.stdout.strip() == "False"
