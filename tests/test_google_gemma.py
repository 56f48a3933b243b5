"""Google's Gemma-2 checkpoints, written here by hand in the library's layout.

The weights are transformers'; what they should become is what the Hugging Face
directory of the same model gives.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import orbax.checkpoint as ocp
import pytest
import test_parity
from test_parity import TOLERANCE, torch  # noqa: F401
from test_pretrained import PUBLISHED

from cacheaug.data import tokenizers
from cacheaug.errors import UserError
from cacheaug.model.transformer import Transformer
from cacheaug.weights import config_json, google_gemma, leaves, pretrained

H, K, E = 4, 2, 8  # of make_golden's shapes


def google_tree(reference, turned):
  """The flat tree of a release; `turned` is 9B's and 27B's gating_einsum."""
  t = {k: v.numpy() for k, v in reference.state_dict().items()}
  tree = {
    "transformer/embedder": {"input_embedding": t["model.embed_tokens.weight"]},
    "transformer/final_norm": {"scale": t["model.norm.weight"]},
  }
  norms = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
  }
  for i in range(reference.config.num_hidden_layers):
    ours, theirs = f"transformer/layer_{i}", f"model.layers.{i}"

    def heads(name, n, theirs=theirs):
      """torch's [n * E, D] -> [n, D, E]."""
      w = t[f"{theirs}.self_attn.{name}_proj.weight"]
      return np.stack([w[j * E : (j + 1) * E].T for j in range(n)])

    o = t[f"{theirs}.self_attn.o_proj.weight"]  # [D, H * E]
    gate_up = [t[f"{theirs}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
    arrays = {
      "attn/q_einsum": heads("q", H),
      "attn/kv_einsum": np.stack([heads("k", K), heads("v", K)]),
      "attn/attn_vec_einsum": np.stack(
        [o[:, j * E : (j + 1) * E].T for j in range(H)]
      ),
      "mlp/gating_einsum": np.stack(
        gate_up if turned else [w.T for w in gate_up]
      ),
      "mlp/linear": t[f"{theirs}.mlp.down_proj.weight"].T,
    }
    tree |= {f"{ours}/{k}": {"w": v} for k, v in arrays.items()}
    tree |= {
      f"{ours}/{k}": {"scale": t[f"{theirs}.{v}.weight"]}
      for k, v in norms.items()
    }
  return tree


def nested(tree):
  """The tree as the library's modules have it: no 'w' in mlp."""
  flat = {}
  for name, module in tree.items():
    for leaf, array in module.items():
      path = f"{name.removeprefix('transformer/')}/{leaf}"
      flat[re.sub(r"(/mlp/.*)/w", r"\1", path)] = array
  return leaves.nest(flat)


def save(directory, tree, **options):
  handler = ocp.PyTreeCheckpointHandler(**options)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(directory, tree)


def load(directory, **changes):
  config = pretrained.read_config(directory)
  return config, pretrained.load(
    directory, config, **{"dtype": jnp.float32} | changes
  )


@pytest.fixture(scope="module")
def reference(torch):  # noqa: F811
  """transformers' model, with the scale and window that shapes imply."""
  del torch
  return make_golden.build(
    "gemma2", query_pre_attn_scalar=E, sliding_window=4096,
    max_position_embeddings=8192,
  )  # fmt: skip


@pytest.fixture(scope="module")
def expected(reference, tmp_path_factory):
  """(config, params) of the same model's Hugging Face directory."""
  directory = tmp_path_factory.mktemp("hf")
  reference.save_pretrained(directory)
  return load(directory)


@pytest.fixture
def plain(reference, tmp_path):
  """A checkpoint of plain files, to be damaged."""
  save(tmp_path / "c", google_tree(reference, False), use_ocdbt=False)
  return tmp_path / "c"


LAYOUTS = {
  "released": (False, False, dict(use_ocdbt=True)),
  "released_turned": (True, False, dict(use_ocdbt=True)),
  "plain_files": (True, False, dict(use_ocdbt=False)),
  "nested": (True, True, dict(use_ocdbt=True)),
  "nested_zarr3": (False, True, dict(use_ocdbt=True, use_zarr3=True)),
}


def logits_of(config, params, reference):
  tokens, mask = make_golden.batch(config.vocab_size)
  theirs = make_golden.reference(reference, tokens, mask)[0]
  model = Transformer(config, keep_hidden=True)
  ours = test_parity.run(model, params, tokens, mask)[0]
  return ours[mask > 0], theirs[mask > 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_hugging_face(layout, reference, expected, tmp_path):
  """The same config, the same bits, and so transformers' logits."""
  turned, nest, options = LAYOUTS[layout]
  tree = google_tree(reference, turned)
  save(tmp_path / "c", nested(tree) if nest else tree, **options)
  assert (tmp_path / "c" / "manifest.ocdbt").exists() == options["use_ocdbt"]
  config, params = load(tmp_path / "c")
  assert config == expected[0]
  assert jax.tree.structure(params) == jax.tree.structure(expected[1])
  jax.tree.map(np.testing.assert_array_equal, params, expected[1])
  # One level up, as it is downloaded.
  assert pretrained.read_config(tmp_path) == config


def test_logits(reference, plain):
  ours, theirs = logits_of(*load(plain), reference)
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_negative_controls(reference, expected, tmp_path):
  """Two halves of one array swapped: other parameters, other logits."""
  for kind in ("mlp/gating_einsum", "attn/kv_einsum"):
    tree = google_tree(reference, True)
    leaf = tree[f"transformer/layer_1/{kind}"]
    leaf["w"] = leaf["w"][::-1].copy()
    directory = tmp_path / kind
    save(directory, tree)
    config, params = load(directory)
    same = jax.tree.map(np.array_equal, params, expected[1])
    assert sum(not x for x in jax.tree.leaves(same)) == 2
    ours, theirs = logits_of(config, params, reference)
    assert np.abs(ours - theirs).max() > 100 * TOLERANCE


def test_dtype_and_shardings(reference, expected, tmp_path):
  """bfloat16, as released, onto a mesh."""
  tree = google_tree(reference, False)
  save(tmp_path / "c", jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree))
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  split = {
    "embedder/embedding": ("b", "a"),
    "blocks/attention/k/kernel": (None, "b", "a", None),
    "blocks/mlp/up/kernel": (None, "a", "b"),
  }

  def sharding(path, _):
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = jax.sharding.PartitionSpec(*split.get(path, ()))
    return jax.sharding.NamedSharding(mesh, spec)

  shardings = jax.tree_util.tree_map_with_path(sharding, expected[1])
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected[1])
  for dtype in (jnp.bfloat16, jnp.float32):
    _, params = load(tmp_path / "c", dtype=dtype, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))


def test_padding_of_the_embedding(reference, expected, tmp_path, monkeypatch):
  """Rows without a token are not read."""
  tree = google_tree(reference, True)
  leaf = tree["transformer/embedder"]
  full = leaf["input_embedding"]
  rows = len(full)
  leaf["input_embedding"] = np.pad(full, ((0, 8), (0, 0)), constant_values=7)
  save(tmp_path / "c", tree)
  assert load(tmp_path / "c")[0].vocab_size == rows + 8
  monkeypatch.setitem(google_gemma._TOKENS, rows + 8, rows)
  config, params = load(tmp_path / "c")
  assert config == expected[0]
  jax.tree.map(np.testing.assert_array_equal, params, expected[1])


# (L, D, H, K, E, F) and query_pre_attn_scalar of the releases.
SIZES = {
  "gemma-2-2b": (26, 2304, 8, 4, 256, 9216, 256),
  "gemma-2-9b": (42, 3584, 16, 8, 256, 14_336, 256),
  "gemma-2-27b": (46, 4608, 32, 16, 128, 36_864, 144),
}


@pytest.mark.parametrize("size", SIZES)
def test_config_of_the_releases(size):
  """What their config.json on Hugging Face gives."""
  n, d, h, k, e, f, scalar = SIZES[size]
  entries = PUBLISHED["gemma-2-2b"][0] | dict(
    num_hidden_layers=n, hidden_size=d, num_attention_heads=h,
    num_key_value_heads=k, head_dim=e, intermediate_size=f,
    query_pre_attn_scalar=scalar,
  )  # fmt: skip
  shapes = {"embedder/input_embedding": (256_128, d)}
  for i in range(n):
    shapes[f"layer_{i}/attn/q_einsum"] = (h, d, e)
    shapes[f"layer_{i}/attn/kv_einsum"] = (2, k, d, e)
    shapes[f"layer_{i}/mlp/linear"] = (f, d)
  config = google_gemma.config_of(shapes, size)
  path = pathlib.Path("config.json")
  assert config == config_json.config_from_entries(entries, path)


def refuses(message):
  return pytest.raises(UserError, match=f"^.*{re.escape(message)}.*$")


@pytest.mark.parametrize("damage", ("absent", "cut", "metadata"))
def test_damaged_array(damage, plain):
  array = plain / "transformer/layer_1/mlp/linear.w"
  chunk = array / "0.0"
  if damage == "absent":
    chunk.unlink()
  elif damage == "cut":
    chunk.write_bytes(chunk.read_bytes()[:20])
  else:
    (array / ".zarray").write_text("{")
  with refuses("array layer_1/mlp/linear cannot be read, incomplete or dam"):
    load(plain)


def test_refused_arrays(reference, tmp_path):
  name = "transformer/layer_1/attn/q_einsum"
  tree = google_tree(reference, False)
  w = tree.pop(name)["w"]
  scale = {"scale": np.zeros(E, np.float32)}
  cases = {
    "has no array layer_1/attn/q_einsum:": {},
    "unexpected array layer_0/attn/_key_norm/scale:": {
      name: {"w": w},
      "transformer/layer_0/attn/_key_norm": scale,
    },
    "array layer_1/attn/q_einsum is [3, 24, 8], not [4, 24, 8]": {
      name: {"w": w[1:]}
    },
    "array layer_1/attn/q_einsum is int8: quantised": {
      name: {"w": w.astype(np.int8)}
    },
  }
  for i, (message, changes) in enumerate(cases.items()):
    save(tmp_path / str(i), tree | changes)
    with refuses(message):
      load(tmp_path / str(i))
  with refuses("has no array embedder/input_embedding [V, D]"):
    del tree["transformer/embedder"]
    save(tmp_path / "headless", tree)
    load(tmp_path / "headless")


def test_damaged_store(plain):
  (plain / "manifest.ocdbt").write_bytes(b"no manifest")
  with refuses("the list of arrays cannot be read"):
    load(plain)


def test_tokenizer_beside(plain):
  """Beside a checkpoint it is taken, beside a Hugging Face model not."""
  (plain.parent / "tokenizer.model").write_bytes(b"not one")
  with refuses(f"{plain.parent / 'tokenizer.model'}: not a SentencePiece"):
    tokenizers.load(str(plain))
  (plain / "config.json").write_text("{}")
  with refuses("no tokenizer.json or tokenizer.model in it"):
    tokenizers.load(str(plain))
