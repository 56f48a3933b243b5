"""FLOP counts: a published table, a compiler's count, and their own algebra."""

import dataclasses

import dense_flops
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import flops
from cacheaug.augment import coprocessor, kinds
from cacheaug.augment.traces import Layout
from cacheaug.flops import Sizes
from cacheaug.inference import context
from cacheaug.model import config as model_config
from cacheaug.model import decode_rows, transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Transformer
from cacheaug.run import machine
from cacheaug.weights import published

# Gemma-2 2B, S=2048, A=16, M=128, TFLOP a sequence: N -> naive, cached-dense
# (both with recomputation), structured with and without.
_TABLE = {
  8: (164, 86, 72, 56),
  16: (211, 130, 103, 78),
  32: (317, 229, 164, 122),
  64: (571, 469, 285, 211),
}


def _gemma():
  return configs.model_of(published.experiment("gemma2_2b"))


def _sizes(n=16, **changes):
  sizes = Sizes(batch=1, sequence=2048, traces=128, latents=n, ahead=16)
  return dataclasses.replace(sizes, **changes)


def test_units_of_gemma2_2b():
  model = _gemma()
  assert flops.body_per_row(model) == pytest.approx(4.05e9, rel=1e-3)
  assert flops.logits_per_row(model) == pytest.approx(1.18e9, rel=1e-3)
  assert flops.attention_per_pair(model) == 212_992


@pytest.mark.parametrize("n", _TABLE)
def test_totals_of_gemma2_2b(n):
  model, sizes = _gemma(), _sizes(n)
  found = (
    dense_flops.naive(model, sizes),
    dense_flops.cached_dense(model, sizes),
    flops.structured(model, sizes, remat=True),
    flops.useful(model, sizes),
  )
  found = [cost.total / 1e12 for cost in found]
  # The table is rounded to whole TFLOP.
  assert found == pytest.approx(_TABLE[n], abs=0.6)


def test_least_leaves_out_what_is_frozen():
  model, sizes = _gemma(), _sizes()
  useful, least = flops.useful(model, sizes), dense_flops.least(model, sizes)
  assert least.body == useful.body
  assert least.logits == useful.logits * 2 / 3
  assert 0.6 * useful.attention < least.attention < 0.8 * useful.attention


def test_batch_multiplies_everything():
  model = _gemma()
  for count in (
    flops.useful,
    dense_flops.naive,
    dense_flops.cached_dense,
    dense_flops.least,
  ):
    one, many = count(model, _sizes()), count(model, _sizes(batch=7))
    assert many == pytest.approx([7 * part for part in one])


def test_windows_count_only_pairs_within_them():
  # By enumeration: 20 context rows, window 6 in the first of two layers.
  model = model_config.make(
    "gemma2", layers=2, heads=2, kv_heads=1, head_dim=4, window=6
  )
  near = sum(q - k < 6 for q in range(20) for k in range(q + 1))
  sizes = Sizes(batch=1, sequence=20, traces=2, latents=3, ahead=2)
  # The last layer's attention is not run.
  assert flops.context_pass(model, sizes).attention == 4 * 2 * 4 * near
  own = 2 * (6 + 15)  # triangles of 3 and 5 rows, two traces
  rows = 2 * (3 + 5)
  per_row = (near + 210) / 20
  assert flops.useful(model, sizes).attention == pytest.approx(
    4 * 2 * 4 * (near + 3 * (rows * per_row + 2 * own))
  )


def _small(**changes):
  return model_config.make(
    "gemma2",
    vocab_size=512,
    width=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp_width=256,
    **changes,
  )


def test_forward_agrees_with_xla():
  """XLA's own count of a plain forward pass, whose mask it does not skip."""
  model = Transformer(_small())
  tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
  params = jax.eval_shape(
    lambda k: model.init(k, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0)
  )["params"]

  def forward(params, tokens):
    hidden, _ = transformer.prefill(model, params, tokens)
    return transformer.logits(model, params, hidden)

  counted = jax.jit(forward).lower(params, tokens).cost_analysis()["flops"]
  c = model.config
  ours = 64 * (flops.body_per_row(c) + flops.logits_per_row(c))
  ours += 64 * 64 * flops.attention_per_pair(c)
  # XLA adds norms, softmax, gelu and RoPE: a few per cent here.
  assert ours < counted < 1.1 * ours


def test_of_step_follows_the_objective():
  config = published.experiment("gemma2_2b")
  config.data.batch, config.traces.count = 1, 128
  model = _gemma()
  assert flops.of_step(config, model) == flops.useful(model, _sizes())
  config.objective = "language_model"
  cost = flops.of_step(config, model)
  assert cost.body == 3 * 2048 * flops.body_per_row(model)
  assert isinstance(config, ConfigDict)


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
  ],
)
def test_chip_of_a_device(kind, name):
  assert machine.of_device_kind(kind) is machine.CHIPS[name]


@pytest.mark.parametrize(
  "kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "Tesla V100", ""]
)
def test_no_peak_where_it_is_not_known(kind):
  assert machine.of_device_kind(kind) is None


# --- kinds of coprocessor -----------------------------------------------------


def test_steps_of_kinds_by_their_rows():
  """Of one sequence; u is what the last layer's kv do without."""
  model = _small(window=16)
  b, s, m, n, a = flops.body_per_row(model), 32, 5, 3, 4
  u = b / 2 - 4 * 128 * 32 * 2
  wanted = {
    "coprocessor": s * (b - u) + m * (3 * n + 2 * (n + a)) * b,
    "pause": s * (b - u) + m * 2 * (n + a) * b,
    "prefix": s * (b - u) + m * 2 * a * b,
    "handover": s * (b - u) + m * (3 * n * (b - u) + 2 * a * b),
    "activations": s * b + 3 * s * (b - u) + m * (5 * n + 2 * a) * b,
  }
  costs = {}
  for kind, body in wanted.items():
    sizes = Sizes(1, s, m, n, a, kinds.Kind(kind))
    costs[kind] = flops.useful(model, sizes)
    assert costs[kind].body == pytest.approx(body)
    assert dense_flops.least(model, sizes).total < costs[kind].total
  assert len({cost.logits for cost in costs.values()}) == 1
  # A row sees 528 / 32 slots on average, the window's 392 / 32 of layer one.
  near, far = 392 / 32, 528 / 32
  pair, first = 4 * 4 * 32, 392 + 0  # the context's last layer asks nothing
  rows = m * a * (near + far) + m * 2 * (a * n + 6)
  assert costs["prefix"].attention == pytest.approx(pair * (first + 3 * rows))
  rows += m * n * near + m * 6
  assert costs["handover"].attention == pytest.approx(pair * (first + 3 * rows))


@pytest.mark.parametrize("kind", kinds.Kind)
def test_augmentation_agrees_with_xla(kind):
  """XLA's count of the compiled program, where nothing unused is left."""
  config, s, n = _small(window=16), 64, 8
  config = dataclasses.replace(config, window=s + n, layer_kinds=())
  model = Transformer(config, remat="none")
  spec = Layout(n, 1, "overlay", "as_is", kind=kind)
  key = jax.random.key(0)

  def make(function):
    shapes = nn.unbox(jax.eval_shape(function, key))
    body = shapes.get("transformer", shapes)
    if "blocks" in body:
      body = jax.eval_shape(decode_rows.unstack_layers, body)
    return shapes | ({"transformer": body} if "transformer" in shapes else body)

  decoder = make(lambda k: transformer.init(model, k))
  coproc = make(lambda k: coprocessor.init_boxed(model, spec, k))

  def augment(decoder, coproc, cache, tokens, states):
    documents = jnp.zeros_like(tokens)
    args = model, decoder, coproc, cache, tokens, documents, spec
    return context.augment(*args, states=states)

  kv = jax.ShapeDtypeStruct((2, 1, s, 2, 32), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, s), jnp.int32)
  states = jax.ShapeDtypeStruct((1, s, 128), jnp.float32)
  args = decoder, coproc, KVCache(kv, kv, tokens, tokens), tokens, states
  counted = jax.jit(augment).lower(*args).compile().cost_analysis()["flops"]
  sizes = Sizes(1, s, 1, n, 1, kind)
  ours = flops.augmentation(config, sizes).total
  if kind == "activations":  # the decoder's own part comes with the states
    ours -= s * 2 * (128 * 32 * 8 + 3 * 128 * 256)
    ours -= sum(flops._context_attention(config, s)[-1:])
    # Masked pairs are computed too.
    ours += flops.attention_per_pair(config) / 2 * (s * s - s * (s + 1) / 2)
  # Norms, softmax, gelu, RoPE and masked pairs of small blocks. One row's
  # products are sums for XLA, of an addition less each.
  assert 0.99 * ours < counted < 1.2 * ours, counted / ours


def test_tokens_see_latents_and_parameters_are_counted():
  model = _small(window=16)
  sizes = Sizes(1, 64, 1, 8, 1)
  frozen = flops.token(model, dataclasses.replace(sizes, latents=0))
  more = flops.token(model, sizes).attention - frozen.attention
  assert more == 8 * flops.attention_per_pair(model) / 2  # not by the window
  config = published.experiment("gemma2_2b")
  one = {}
  for kind in kinds.Kind:
    config.coprocessor.kind = kind
    one[kind] = flops.parameters(config, model)
  layer = 128 * 32 * 12 + 3 * 128 * 256 + 4 * 128
  n = config.coprocessor.latents
  whole = 2 * layer + 128
  assert one["coprocessor"].decoder == whole + 512 * 128
  assert one["coprocessor"].trained == whole + n * 128 + 128 * 128
  assert one["activations"] == one["coprocessor"]
  assert one["pause"].trained == n * 128
  assert one["prefix"].trained == 2 * 2 * n * 2 * 32
  assert one["handover"].trained == 2 * layer + n * 128
  assert one["pause"].total == whole + 512 * 128 + n * 128
