"""Exported coprocessors: round trip, refusals, and an oracle in torch."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
import safetensors.numpy

from cacheaug import export
from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.traces import TraceSpec
from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.model import pretrained
from cacheaug.model.transformer import Transformer

# Float32 rounding through three passes; a row that sees one token too many or
# stands one position off gives 1e-2 and more.
TOLERANCE = 1e-4
WHY_TORCH = "needs torch and transformers: pip install 'cacheaug[parity]'"

SPEC = TraceSpec(latents=3, ahead=4)


def random_params(model, spec):
  """A coprocessor's parameters, no leaf zero or like a decoder's."""
  shapes = nn.unbox(
    jax.eval_shape(
      lambda key: coprocessor.init_boxed(model, spec, key), jax.random.key(0)
    )
  )
  leaves, structure = jax.tree.flatten(shapes)
  rng = np.random.default_rng(1)
  values = [
    jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves
  ]
  return jax.tree.unflatten(structure, values)


def make(spec, directory, dtype=jnp.float32):
  """A random exported coprocessor; returns (config, params)."""
  config = model_config.make("qwen3", width=16, heads=2, kv_heads=1, head_dim=4)
  model = Transformer(config, param_dtype=dtype)
  params = random_params(model, spec)
  export.save_coprocessor(
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
  spec = TraceSpec(latents=3, ahead=4, scheme="insert", start=start)
  config, params = make(spec, tmp_path, jnp.dtype(dtype))
  got = export.load_coprocessor(tmp_path, dtype=dtype)
  assert got[:2] == (config, spec)
  assert got[3] == {
    "family": "qwen3",
    "variant": "embeddings",
    "decoder_fingerprint": "0123456789ab",
    "source": "shipped:tiny",
  }
  assert jax.tree.structure(got[2]) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, got[2], params)


def test_files_are_as_documented(tmp_path):
  _, params = make(SPEC, tmp_path)
  entries = json.loads((tmp_path / "config.json").read_text())
  assert entries["latents"] == 3
  assert entries["positions"] == SPEC.scheme
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
  got = export.load_coprocessor(tmp_path, shardings=shardings)[2]
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
    export.load_coprocessor(tmp_path)


def test_missing_files(tmp_path):
  with pytest.raises(UserError, match="config.json: missing"):
    export.load_coprocessor(tmp_path)
  make(SPEC, tmp_path)
  (tmp_path / "coprocessor.safetensors").unlink()
  with pytest.raises(UserError, match="coprocessor.safetensors: missing"):
    export.load_coprocessor(tmp_path)


# --- the oracle -------------------------------------------------------------


def oracle(decoder, coproc, extra, tokens, point, spec):
  """nll [A] of one trace, from transformers' own models and caches.

  Reads only exported files and the paper's description: the coprocessor's
  rows see the context up to the point and, causally, each other; then the
  decoder reads [z | ahead tokens] likewise.
  """
  import torch

  n, p = spec.latents, point
  context = torch.tensor(tokens[: p + 1])[None].long()
  ahead = torch.tensor(tokens[p + 1 : p + 1 + spec.ahead])[None].long()
  shift = n if spec.scheme == "insert" else 0

  def past(entries):
    """The decoder's cache of the first tokens, made afresh."""
    if not entries:
      return None
    return decoder(context[:, :entries], use_cache=True).past_key_values

  def read(model, entries, x, first):
    """Rows x at positions first.. over that many entries of context."""
    rows = x.shape[1]
    return model(
      inputs_embeds=x,
      past_key_values=past(entries),
      position_ids=torch.arange(first, first + rows)[None],
      # Without it transformers takes a jump of positions for a new document.
      attention_mask=torch.ones(1, entries + rows, dtype=torch.long),
    )

  embed = decoder.get_input_embeddings()
  soft = torch.tensor(extra["soft_tokens"])[None]
  first = p - n + 1 + shift
  copied = embed(context[:, p - n + 1 :]) if spec.start == "harmless" else 0
  z = read(coproc, p + 1, soft + copied, first).last_hidden_state
  if spec.start == "harmless":
    z = copied + z @ torch.tensor(extra["latent_projection"])
  entries = p - n + 1 if spec.scheme == "replace" else p + 1
  x = torch.cat([z, embed(ahead[:, :-1])], dim=1)
  logits = read(decoder, entries, x, first).logits[:, n - 1 :]
  return torch.nn.functional.cross_entropy(
    logits[0], ahead[0], reduction="none"
  ).numpy()


@pytest.fixture(scope="module", params=("gemma2", "llama", "qwen3"))
def decoders(request, tmp_path_factory):
  """(ours, its parameters, transformers', directory) of a family."""
  pytest.importorskip("torch", reason=WHY_TORCH)
  pytest.importorskip("transformers", reason=WHY_TORCH)
  directory = tmp_path_factory.mktemp(request.param)
  # transformers' windows count indices, ours positions: none binds here.
  changes = {"sliding_window": 64} if request.param == "gemma2" else {}
  reference = make_golden.build(request.param, **changes)
  reference.save_pretrained(directory)
  config = pretrained.read_config(directory)
  params = pretrained.load(directory, config, dtype=jnp.float32)
  return Transformer(config), params, reference, directory


# Layouts are data: one compilation serves every scheme.
context_pass = jax.jit(objective.context_pass, static_argnums=(0, 4))
traces_nll = jax.jit(objective.traces_nll, static_argnums=0)


@pytest.mark.parametrize("start", traces.STARTS)
@pytest.mark.parametrize("scheme", traces.SCHEMES)
def test_oracle(scheme, start, decoders, tmp_path):
  """All traces at once equal transformers' one at a time."""
  import torch
  import transformers

  model, params, reference, directory = decoders
  spec = TraceSpec(latents=3, ahead=4, scheme=scheme, start=start)
  coproc = random_params(model, spec)
  export.save_coprocessor(
    tmp_path,
    model_config=model.config,
    spec=spec,
    params=coproc,
    decoder_fingerprint=pretrained.fingerprint(params),
    source=str(directory),
  )
  tokens = np.random.default_rng(3).integers(
    0, model.config.vocab_size, (2, 20)
  )
  points = np.array([[2, 7, 15], [4, 5, 11]])

  tokens = jnp.asarray(tokens, jnp.int32)
  documents = jnp.zeros_like(tokens)
  _, cache = context_pass(model, params, tokens, documents, spec)
  laid = traces.lay_out(tokens, documents, jnp.asarray(points), spec)
  got = traces_nll(model, params, coproc, cache, laid)

  extra = safetensors.numpy.load_file(tmp_path / "coprocessor.safetensors")
  theirs = transformers.AutoModel.from_config(
    reference.config, attn_implementation="eager"
  ).eval()
  state = {
    name.removeprefix("model."): torch.tensor(value)
    for name, value in extra.items()
    if name.startswith("model.")
  }
  lacking = theirs.load_state_dict(state, strict=False)
  assert lacking.missing_keys == ["embed_tokens.weight"]
  assert not lacking.unexpected_keys
  tokens = np.asarray(tokens)
  with torch.no_grad():
    want = [
      [oracle(reference, theirs, extra, row, p, spec) for p in at]
      for row, at in zip(tokens, points, strict=True)
    ]
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
