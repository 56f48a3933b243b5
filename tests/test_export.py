"""Exported coprocessors: round trip, refusals, and an oracle in torch."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import safetensors.numpy
from oracle import FAMILIES, TOLERANCE, WHY_TORCH, random_params

from cacheaug.augment import objective, traces
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.model.transformer import Transformer
from cacheaug.weights import coprocessor_files, leaves

SPEC = Layout(latents=3, ahead=4)


def make(spec, directory, dtype=jnp.float32):
  """A random exported coprocessor; returns (config, params)."""
  config = model_config.make("qwen3", width=16, heads=2, kv_heads=1, head_dim=4)
  model = Transformer(config, param_dtype=dtype)
  params = random_params(model, spec)
  coprocessor_files.save_coprocessor(
    directory,
    model_config=config,
    spec=spec,
    params=params,
    decoder_fingerprint="0123456789ab",
    source="shipped:tiny",
  )
  return config, params


@pytest.mark.parametrize("start", traces.STARTS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_round_trip_is_bit_identical(start, dtype, tmp_path):
  spec = Layout(latents=3, ahead=4, positions="insert", start=start)
  config, params = make(spec, tmp_path, jnp.dtype(dtype))
  got = coprocessor_files.load_coprocessor(tmp_path, dtype=dtype)
  assert got[:2] == (config, spec)
  assert got[3] == {
    "family": "qwen3",
    "variant": "embeddings",
    "decoder_fingerprint": "0123456789ab",
    "source": "shipped:tiny",
    "draw": Draw(),
  }
  assert jax.tree.structure(got[2]) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, got[2], params)


def test_files_are_as_documented(tmp_path):
  _, params = make(SPEC, tmp_path)
  entries = json.loads((tmp_path / "config.json").read_text())
  assert entries["latents"] == 3
  assert entries["positions"] == SPEC.positions
  assert entries["start"] == "harmless"
  assert entries["model"]["model_type"] == "qwen3"
  stored = safetensors.numpy.load_file(tmp_path / "coprocessor.safetensors")
  assert {name for name in stored if not name.startswith("model.layers.")} == {
    "soft_tokens",
    "latent_projection",
    "model.norm.weight",
  }
  kernel = params["transformer"]["blocks"]["mlp"]["down"]["kernel"][1]
  np.testing.assert_array_equal(
    stored["model.layers.1.mlp.down_proj.weight"], kernel.T
  )
  np.testing.assert_array_equal(
    stored["latent_projection"], params["latent_projection"]
  )


def test_same_bytes_every_time(tmp_path):
  for name in "ab":
    make(SPEC, tmp_path / name)
  for file in ("config.json", "coprocessor.safetensors"):
    assert (tmp_path / "a" / file).read_bytes() == (
      tmp_path / "b" / file
    ).read_bytes()


def test_shardings(tmp_path):
  _, params = make(SPEC, tmp_path)
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
  spec = jax.sharding.PartitionSpec
  shardings = jax.tree.map(
    lambda x: jax.sharding.NamedSharding(mesh, spec(*[None] * (x.ndim - 1))),
    params,
  )
  projection = jax.sharding.NamedSharding(mesh, spec("x"))
  shardings["latent_projection"] = projection
  got = coprocessor_files.load_coprocessor(tmp_path, shardings=shardings)[2]
  assert got["latent_projection"].sharding == projection
  jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize(
  "change, message",
  (
    (lambda e: e.pop("format"), "config.json: format None"),
    (lambda e: e.pop("start"), "config.json: has no 'start'"),
    (lambda e: e.update(variant="cache"), "config.json: variant 'cache'"),
    (lambda e: e.update(latents=5), "soft_tokens is [3, 16], config.json"),
    (lambda e: e.update(start="as_is"), "unexpected tensor latent_projection"),
    (lambda e: e["model"].update(model_type="x"), "model_type 'x'"),
  ),
)
def test_refusals(change, message, tmp_path):
  make(SPEC, tmp_path)
  path = tmp_path / "config.json"
  entries = json.loads(path.read_text())
  change(entries)
  path.write_text(json.dumps(entries))
  with pytest.raises(UserError, match=re.escape(message)):
    coprocessor_files.load_coprocessor(tmp_path)


def test_missing_files(tmp_path):
  with pytest.raises(UserError, match="config.json: missing"):
    coprocessor_files.load_coprocessor(tmp_path)
  make(SPEC, tmp_path)
  (tmp_path / "coprocessor.safetensors").unlink()
  with pytest.raises(UserError, match="coprocessor.safetensors: missing"):
    coprocessor_files.load_coprocessor(tmp_path)


# --- the oracle -------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def decoders(request, tmp_path_factory):
  """(ours, its parameters, transformers', directory) of a family."""
  pytest.importorskip("torch", reason=WHY_TORCH)
  pytest.importorskip("transformers", reason=WHY_TORCH)
  directory = tmp_path_factory.mktemp(request.param)
  return *oracle.make_decoder(request.param, directory), directory


# Layouts are data: one compilation serves every scheme.
context_pass = jax.jit(objective.context_pass, static_argnums=(0, 4))
traces_nll = jax.jit(objective.traces_nll, static_argnums=0)


@pytest.mark.parametrize("start", traces.STARTS)
@pytest.mark.parametrize("scheme", traces.POSITIONS)
def test_oracle(scheme, start, decoders, tmp_path):
  """All traces at once equal transformers' one at a time."""
  model, params, reference, directory = decoders
  spec = Layout(latents=3, ahead=4, positions=scheme, start=start)
  coproc = random_params(model, spec)
  coprocessor_files.save_coprocessor(
    tmp_path,
    model_config=model.config,
    spec=spec,
    params=coproc,
    decoder_fingerprint=leaves.fingerprint(params),
    source=str(directory),
  )
  tokens = np.random.default_rng(3).integers(
    0, model.config.vocab_size, (2, 20)
  )
  points = np.array([[2, 7, 15], [4, 5, 11]])

  tokens = jnp.asarray(tokens, jnp.int32)
  documents = jnp.zeros_like(tokens)
  _, cache = context_pass(model, params, tokens, documents, spec)
  laid = traces.layout_traces(tokens, documents, jnp.asarray(points), spec)
  got = traces_nll(model, params, coproc, cache, laid)

  want = oracle.traces_nll(
    reference, tmp_path, np.asarray(tokens), points, spec
  )
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
