"""Faults that users of neighbouring projects reported, of decoders' files.

Each test has the number that it has in the list of faults which were tried.
"""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
import safetensors.numpy

import cacheaug
from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.weights import config_json, huggingface, pretrained

_OLD = ("rope_theta", "rope_scaling", "rope_local_base_freq")


def refuses(message):
  return pytest.raises(UserError, match=re.escape(message))


@pytest.fixture
def llama(tmp_path):
  """A writable copy of a tiny Llama with a head of its own."""
  directory = tmp_path / "llama"
  shutil.copytree(make_golden.GOLDEN / "llama", directory)
  return directory


def edit(directory, **changes):
  path = directory / "config.json"
  entries = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(entries))
  return path


def load(directory):
  config = pretrained.read_config(directory)
  return pretrained.load(directory, config, dtype=jnp.float32)


def tensors(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(directory, named):
  safetensors.numpy.save_file(named, directory / "model.safetensors")


# --- 4: RoPE in both spellings ----------------------------------------------


@pytest.mark.parametrize("case", make_golden.GOLDEN_CASES)
def test_4_exports_say_rope_in_both_spellings(case):
  """Either spelling alone gives the same decoder."""
  config = pretrained.read_config(make_golden.GOLDEN / case)
  entries = config_json.config_entries(config)
  path = make_golden.GOLDEN / "config.json"
  old = {k: v for k, v in entries.items() if k != "rope_parameters"}
  new = {k: v for k, v in entries.items() if k not in _OLD}
  for part in (entries, old, new):
    assert config_json.config_from_entries(part, path) == config
  if case in ("llama", "qwen2"):  # scaled
    assert old["rope_scaling"]["rope_type"] in ("llama3", "yarn")
  control = {k: v for k, v in old.items() if k not in _OLD}
  if case in ("llama", "qwen2", "olmo2"):
    assert config_json.config_from_entries(control, path) != config


def test_4_published_bases():
  for family, base in (("llama", 500_000.0), ("qwen3", 1_000_000.0)):
    entries = config_json.config_entries(model_config.make(family))
    assert entries["rope_theta"] == base
  entries = config_json.config_entries(model_config.make("gemma3", layers=6))
  assert entries["rope_local_base_freq"] == 10_000.0


# --- 16: rope_scaling beside rope_parameters --------------------------------


def test_16_rope_scaling_by_hand_is_heeded(tmp_path):
  """Qwen3's own instruction for long texts, on a transformers-5 config."""
  directory = tmp_path / "qwen3"
  shutil.copytree(make_golden.GOLDEN / "qwen3", directory)
  plain = pretrained.read_config(directory)
  yarn = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
  }
  path = edit(directory, rope_scaling=yarn)
  config = pretrained.read_config(directory)
  assert dict(config.rope_scaling) == yarn
  assert config.rope_base == plain.rope_base
  assert config.longest_context == 4 * 32768
  # The word before, and beside a rope_parameters that says 'default'.
  edit(directory, rope_scaling={"type": "linear", "factor": 2.0})
  assert dict(pretrained.read_config(directory).rope_scaling) == {
    "rope_type": "linear",
    "factor": 2.0,
  }
  # Beside another scaling: its kind is replaced too, not its numbers alone.
  edit(directory, rope_parameters=yarn | {"rope_theta": 10_000.0})
  assert dict(pretrained.read_config(directory).rope_scaling) == {
    "rope_type": "linear",
    "factor": 2.0,
  }
  for scaling, message in (
    ({"rope_type": "longrope"}, "rope_type 'longrope' is not supported"),
    ({"rope_type": "linear", "factor": None}, "has no 'factor'"),
    ({"rope_type": ["x"]}, "rope_type ['x'] is not supported"),
    ({"rope_type": "linear", "factor": "2.0"}, "factor '2.0' is not a number"),
    ({"rope_type": "yarn", "factor": 0}, "factor 0 must be above 0"),
    ({"rope_type": "yarn", "factor": True}, "factor True is not a number"),
    (
      {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"},
      "beta_fast 'x' is not a number",
    ),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary"),
  ):
    edit(directory, rope_scaling=scaling)
    with refuses(f"{path}: {message}"):
      pretrained.read_config(directory)


# --- 17: stop tokens and the chat template ----------------------------------


def test_17_exports_keep_stop_tokens_and_template(tmp_path):
  source, out = tmp_path / "m", tmp_path / "o"
  shutil.copytree(pretrained.resolve("shipped:nano"), source)
  (source / "generation_config.json").write_text(
    '{"eos_token_id": [1, 3], "bos_token_id": 2}'
  )
  (source / "chat_template.jinja").write_text("x")
  lm = cacheaug.load(source)
  assert lm.stop_ids == (1, 3)
  huggingface.save(out, lm.model.config, lm.decoder, tokenizer=lm.tokenizer)
  assert cacheaug.load(out).stop_ids == (1, 3)
  assert (out / "chat_template.jinja").read_text() == "x"
  # Those given are kept too, and one alone is no list.
  huggingface.save(
    out, lm.model.config, lm.decoder, tokenizer=lm.tokenizer, stops=(1,)
  )
  entries = json.loads((out / "generation_config.json").read_text())
  assert entries["eos_token_id"] == 1


@pytest.mark.parametrize(
  "value, expected", (([], ()), (7, (7,)), ([7, 9], (7, 9)), (None, ()))
)
def test_17_stop_ids_as_they_are_written(value, expected, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
  assert huggingface.stop_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ("</s>", [1, None], True, 1.5, {}))
def test_17_stop_ids_that_are_none(value, tmp_path):
  path = tmp_path / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": value}))
  with refuses(f"{path}: eos_token_id"):
    huggingface.stop_ids(tmp_path)


# --- 19: a head beside a tied embedding -------------------------------------


def test_19_another_head_under_tied_weights_is_refused(llama):
  edit(llama, tie_word_embeddings=True)
  with refuses("lm_head.weight is not the embedding, though config.json has"):
    load(llama)
  named = tensors(llama)
  named["lm_head.weight"] = named["model.embed_tokens.weight"].copy()
  rewrite(llama, named)
  params = load(llama)  # an equal copy, as Qwen3-0.6B has it
  assert "head" not in params
  # The same name twice removed: the embedding is found under the head's.
  del named["model.embed_tokens.weight"]
  rewrite(llama, named)
  jax.tree.map(np.testing.assert_array_equal, load(llama), params)


def test_19_heads_of_another_shape_or_type(llama):
  edit(llama, tie_word_embeddings=True)
  named = tensors(llama)
  table = named["model.embed_tokens.weight"]
  rewrite(llama, named | {"lm_head.weight": table[:-1]})
  with refuses("lm_head.weight is not the embedding"):
    load(llama)
  rewrite(llama, named | {"lm_head.weight": table.astype(np.float32)})
  load(llama)  # the same values, stored as another type
  changed = table.copy()
  changed[-1, -1] += 1  # the very last row is compared too
  rewrite(llama, named | {"lm_head.weight": changed})
  with refuses("lm_head.weight is not the embedding"):
    load(llama)


# --- 29: an index that names the wrong shard --------------------------------


def test_29_the_index_names_a_shard_without_the_tensor(llama):
  named = tensors(llama)
  keys = sorted(named)
  first, second = keys[:3], keys[3:]
  for name, part in (("a", first), ("b", second)):
    safetensors.numpy.save_file(
      {k: named[k] for k in part}, llama / f"{name}.safetensors"
    )
  (llama / "model.safetensors").unlink()
  shards = dict.fromkeys(first, "a.safetensors")
  shards |= dict.fromkeys(second, "b.safetensors")
  index = llama / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": shards}))
  load(llama)
  for wrong, message in (
    ("a.safetensors", f"{llama}/a.safetensors: has no tensor {keys[4]}, thou"),
    ("c.safetensors", f"{llama}/c.safetensors: missing, though"),
    (None, f"{llama}/None: missing, though"),
    ([1], f"{llama}/[1]: missing, though"),
  ):
    index.write_text(json.dumps({"weight_map": shards | {keys[4]: wrong}}))
    with refuses(message):
      load(llama)


# --- 30: prefixes ------------------------------------------------------------


def renamed(directory, change):
  rewrite(directory, {change(k): v for k, v in tensors(directory).items()})


@pytest.mark.parametrize("case", ("llama", "qwen3", "gemma3"))
def test_30_bare_names_are_read(case, tmp_path):
  """As Qwen3-Embedding has them."""
  directory = tmp_path / case
  shutil.copytree(make_golden.GOLDEN / case, directory)
  params = load(directory)
  renamed(directory, lambda name: name.removeprefix("model."))
  jax.tree.map(np.testing.assert_array_equal, load(directory), params)


@pytest.mark.parametrize(
  "prefix",
  ("base_model.model.", "_orig_mod.", "module.", "transformer.", "decoder."),
)
def test_30_a_wrappers_prefix_is_named(prefix, llama):
  renamed(llama, lambda name: prefix + name)
  with refuses(f"begin with '{prefix}"):
    load(llama)


def test_30_control_other_names_are_still_refused(llama):
  renamed(llama, lambda name: name.replace("q_proj", "query"))
  with refuses("has no tensor model.layers.0.self_attn.q_proj.weight"):
    load(llama)


# --- 31: config.json of other tools ------------------------------------------

BAD = (
  (dict(layer_types=["sliding_attention"] * 3), "has sliding layers (layer_t"),
  (dict(layer_types=["full_attention"]), "layer_types must be a list of 3"),
  (dict(layer_types="full_attention"), "layer_types must be a list of 3"),
  (dict(layer_types=[1, 2, 3]), "layer_types 1 is not supported"),
  (dict(layer_types=[["x"]] * 3), "layer_types ['x'] is not supported"),
  (dict(layer_types=7), "layer_types must be a list"),
  (dict(sliding_window_pattern=2), "has sliding layers (layer_types, sliding"),
  (dict(sliding_window_pattern="2"), "sliding_window_pattern '2' is not of"),
  (dict(sliding_window_pattern=-1), "sliding_window_pattern -1 must be 1 or"),
  (dict(use_sliding_window=True), "has sliding layers (layer_types, sliding"),
  (
    dict(rope_parameters={"rope_type": "default", "rope_theta": None}),
    "rope_theta None is not a number",
  ),
  (dict(rope_parameters={"rope_theta": "1e4"}), "rope_theta '1e4' is not a n"),
  (dict(rope_parameters={"rope_theta": -1.0}), "rope_theta -1.0 must be above"),
  (dict(rope_parameters=[1]), "rope_parameters [1] is not a JSON object"),
  (
    dict(rope_parameters={"full_attention": 3}),
    "full_attention 3 is not a JSON object",
  ),
  (dict(rope_scaling=[1]), "rope_scaling [1] is not a JSON object"),
  (dict(rope_scaling="linear"), "rope_scaling 'linear' is not a JSON object"),
  (dict(rope_scaling={"type": ["x"]}), "rope_type ['x'] is not supported"),
  (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar 0 must be above 0"),
  (dict(query_pre_attn_scalar="8"), "query_pre_attn_scalar '8' is not a num"),
  (dict(hidden_act=["silu"]), "hidden_act ['silu'] is not supported"),
  (dict(hidden_size=True), "hidden_size True is not of type int"),
  (dict(rms_norm_eps=False), "rms_norm_eps False is not of type float"),
  (dict(tie_word_embeddings=1), "tie_word_embeddings 1 is not of type bool"),
  (dict(model_type=["llama"]), "model_type ['llama'] is not supported"),
  (dict(num_key_value_heads=3), "heads=4 is not a multiple of kv_heads=3"),
  (dict(head_dim=7), "head_dim=7 must be even"),
  (dict(model_type="gemma3", text_config=[1]), "text_config [1] is not a JSON"),
  (dict(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers must be a"),
  (dict(model_type="smollm3", no_rope_layers="101"), "no_rope_layers must be"),
  (
    dict(model_type="smollm3", no_rope_layer_interval=0),
    "no_rope_layer_interval 0 must be 1 or more",
  ),
  (
    dict(model_type="smollm3", use_sliding_window=True, sliding_window=4),
    "has sliding layers (layer_types, sliding",
  ),
  (dict(model_type="qwen2", use_sliding_window=True, max_window_layers="1"),
   "max_window_layers '1' is not a number"),
  (dict(model_type="mistral", sliding_window="4096"), "sliding_window '4096'"),
  (dict(rope_scaling=dict(rope_type="yarn", factor=2.0), model_type="mistral",
        sliding_window=8), "rope scaling with sliding layers is not supported"),
)  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD, ids=range(len(BAD)))
def test_31_a_config_that_cannot_be_is_one_line(changes, message, llama):
  path = edit(llama, **changes)
  with refuses(f"{path}: ") as error:
    pretrained.read_config(llama)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_31_harmless_keys_stay_harmless(llama):
  config = pretrained.read_config(llama)
  edit(
    llama,
    layer_types=["full_attention"] * 3,
    sliding_window_pattern=None,
    sliding_window=None,
    use_sliding_window=False,
    query_pre_attn_scalar=None,
    rope_scaling=None,
    partial_rotary_factor=None,
  )
  assert pretrained.read_config(llama) == config
