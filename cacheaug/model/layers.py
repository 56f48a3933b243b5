"""The layers that model/transformer.py stacks, as Linen modules."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import attention, placement
from cacheaug.model.cache import KVCache
from cacheaug.model.config import SLIDING, ModelConfig
from cacheaug.model.rope import Rope, rotate
from cacheaug.model.static_cache import CacheWrite, LayerCache

KV = tuple[jax.Array, jax.Array]  # keys, values [..., K, E]

ACTIVATIONS = {
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
}


def _param(module, name, init, shape, axes):
  return module.param(
    name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype
  )


def _fan_in(in_axes, out_axes, scale=1.0):
  return nn.initializers.variance_scaling(
    scale, "fan_in", "truncated_normal", in_axis=in_axes, out_axis=out_axes
  )


class RMSNorm(nn.Module):
  """x / rms(x) * (offset + scale) over the last axis, in float32."""

  eps: float
  offset: float
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    init = nn.initializers.constant(1.0 - self.offset)
    scale = _param(self, "scale", init, (x.shape[-1],), (None,))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    scale = self.offset + scale.astype(jnp.float32)
    return (y * scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


class Linear(nn.Module):
  """x [..., inputs] -> [..., outputs] by one weight (and bias)."""

  inputs: dict[str, int]  # contracted axes of x, its last: letter -> size
  outputs: dict[str, int]
  use_bias: bool = False
  init_scale: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., inputs] -> [..., outputs], one matrix product."""
    ins, outs = tuple(self.inputs.values()), tuple(self.outputs.values())
    axes = range(len(ins) + len(outs))
    init = _fan_in(axes[: len(ins)], axes[len(ins) :], self.init_scale)
    letters = (*self.inputs, *self.outputs)
    kernel = _param(self, "kernel", init, ins + outs, letters)
    lead = x.shape[: x.ndim - len(ins)]
    # One plain matrix product: with the batch's axes kept separate, XLA's CPU
    # compiler picks layouts that made a training step 3.5 times slower.
    flat = x.reshape(-1, math.prod(ins)).astype(self.dtype)
    kernel = placement.for_use(kernel.astype(self.dtype), letters)
    y = flat @ kernel.reshape(math.prod(ins), -1)
    if self.has_variable("params", "lora_a"):
      y += self._low_rank(flat, letters, len(ins))
    if self.use_bias:
      zeros, rest = nn.initializers.zeros, (None,) * len(outs)
      bias = _param(self, "bias", zeros, outs, rest)
      y += bias.astype(self.dtype).reshape(1, -1)
    return y.reshape(*lead, *outs)

  def _low_rank(self, flat, letters, inputs):
    """(x a) b of lora.attach, [T, inputs] -> [T, outputs]."""
    a, b = (
      self.get_variable("params", name).astype(self.dtype)
      for name in ("lora_a", "lora_b")
    )
    a = placement.for_use(a, (*letters[:inputs], None))
    b = placement.for_use(b, (None, *letters[inputs:]))
    narrow = flat @ a.reshape(-1, a.shape[-1])
    # A batch axis of one: remat's lean policy keeps plain products, and this
    # one, as large as the layer's own, costs little to make again.
    b = b.reshape(1, b.shape[0], -1)
    return jax.lax.batch_matmul(narrow[None], b)[0]


class Attention(nn.Module):
  """Grouped-query attention with RoPE; gives the rows' own kv as well."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any
  kernel: Kernel

  @nn.compact
  def __call__(
    self,
    x: jax.Array,  # [B, M, R, D]
    rows: attention.QueryLayout | None,  # None where a LayerCache has its own
    cache: KVCache | LayerCache | None,
    window: jax.Array | None,  # [] tokens
    rope: Rope,  # [B, M, R, E/2]
    first_output_row: int,
    past_kv: KV | None = None,  # [B, M, G, K, E]
  ) -> tuple[jax.Array, KV]:  # [B, M, R - first_output_row, D], [B, M, R, K, E]
    """Rows from `first_output_row` on, and the keys and values of all.

    With a LayerCache, its keys and values in place of the rows' own. `past_kv`
    has those of the G rows of the block before these; its third array, if there
    is one, is the bias [B, M, G, K] of attention to them.
    """
    c = self.config
    d, h, k, e = c.width, c.heads, c.kv_heads, c.head_dim
    kw = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    qkv = kw | dict(use_bias=c.attention_bias or c.qkv_bias)
    query_rows = x[:, :, first_output_row:]
    query = Linear({"D": d}, {"H": h, "E": e}, name="q", **qkv)(query_rows)
    key = Linear({"D": d}, {"K": k, "E": e}, name="k", **qkv)(x)
    value = Linear({"D": d}, {"K": k, "E": e}, name="v", **qkv)(x)
    if c.qk_norm:
      query = self._norm("q_norm", query)
      key = self._norm("k_norm", key)
    query = rotate(query, [t[:, :, first_output_row:] for t in rope])
    query *= jnp.asarray(c.attention_scale, self.dtype)
    key = rotate(key, rope)
    new_kv, bias = (key, value), None
    if past_kv is not None:
      key, value = (
        jnp.concatenate([first.astype(last.dtype), last], 2)
        for first, last in zip(past_kv[:2], new_kv, strict=True)
      )
      if len(past_kv) > 2:
        after = ((0, 0), (0, 0), (0, x.shape[2]), (0, 0))
        bias = jnp.pad(past_kv[2].astype(jnp.float32), after)
    if isinstance(cache, LayerCache):
      out, new_kv = cache.attend(query, key, value, c.attention_softcap)
    else:
      out = attention.attend(
        query,
        key,
        value,
        rows,
        cache,
        window=window,
        softcap=c.attention_softcap,
        kernel=self.kernel,
        bias=bias,
      )
    out = Linear(
      {"H": h, "E": e},
      {"D": d},
      init_scale=0.5 / c.layers,  # residual branches add up over 2 L of them
      use_bias=c.attention_bias,
      name="o",
      **kw,
    )(out)
    return out, new_kv

  def _norm(self, name, x):
    """RMSNorm of queries or keys [..., heads, E], over E or both axes."""
    c = self.config
    norm = RMSNorm(c.norm_eps, c.norm_offset, self.param_dtype, name=name)
    if not c.qk_norm_joint:
      return norm(x)
    return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class MLP(nn.Module):
  """Gated feed-forward: down(activation(gate(x)) * up(x))."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    c = self.config
    d, f = c.width, c.mlp_width
    kw = dict(
      dtype=self.dtype, param_dtype=self.param_dtype, use_bias=c.mlp_bias
    )
    gate = Linear({"D": d}, {"F": f}, name="gate", **kw)(x)
    up = Linear({"D": d}, {"F": f}, name="up", **kw)(x)
    x = ACTIVATIONS[c.activation](gate) * up
    scale = 0.5 / c.layers
    return Linear({"F": f}, {"D": d}, init_scale=scale, name="down", **kw)(x)


class Block(nn.Module):
  """One layer."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any
  kernel: Kernel

  @nn.compact
  def __call__(
    self,
    x: jax.Array,  # [B, M, R, D]
    layer: tuple[jax.Array, KV | None],
    rows: attention.QueryLayout | None,
    context: tuple[jax.Array, jax.Array] | CacheWrite | None,
    ropes: Sequence[Rope],
    first_output_row: int = 0,
    past_kv: KV | None = None,  # [B, M, G, K, E]
  ) -> tuple[jax.Array, KV]:  # [B, M, R - first_output_row, D], [B, M, R, K, E]
    """Rows from `first_output_row` on, and the keys and values of all.

    `layer` says whether it is another than a global one, and has the context's
    keys and values, `context` the context's positions and segments [B, S];
    `ropes` are of global layers and, where theirs differ, of the others.
    """
    c = self.config
    kw = dict(config=c, dtype=self.dtype, param_dtype=self.param_dtype)

    def norm(name, y):
      return RMSNorm(
        c.norm_eps, c.norm_offset, self.param_dtype, name=f"{name}_norm"
      )(y)

    other, kv = layer
    window = None
    if SLIDING in c.layer_kinds and not isinstance(context, CacheWrite):
      window = jnp.where(other, c.window, attention.NO_LIMIT)
    rope = ropes[0]
    if len(ropes) > 1:
      rope = jax.tree.map(lambda g, s: jnp.where(other, s, g), *ropes)
    cache = None
    if isinstance(context, CacheWrite):
      cache = LayerCache(*kv, context, other)
    elif context is not None:
      cache = KVCache(kv[0], kv[1], *context)
    y, new_kv = Attention(name="attention", kernel=self.kernel, **kw)(
      norm("attention", x) if c.pre_norms else x,
      rows,
      cache,
      window,
      rope,
      first_output_row,
      past_kv,
    )
    x = x[:, :, first_output_row:]
    x += norm("attention_post", y) if c.post_norms else y
    y = MLP(name="mlp", **kw)(norm("mlp", x) if c.pre_norms else x)
    x += norm("mlp_post", y) if c.post_norms else y
    return placement.rows(x), new_kv


class Embedder(nn.Module):
  """The token embedding [V, D], read both ways."""

  config: ModelConfig
  dtype: Any
  param_dtype: Any

  def setup(self) -> None:
    """One parameter."""
    c = self.config
    self.embedding = _param(
      self,
      "embedding",
      nn.initializers.normal(c.width**-0.5),
      (c.vocab_size, c.width),
      ("V", "D"),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Tokens [...] -> [..., D], scaled where the family does."""
    x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
    x = placement.rows(x)
    # The multiplier is rounded to the activations' type first, as Gemma does.
    return x * jnp.asarray(self.config.embedding_scale, self.dtype)

  def attend(self, hidden: jax.Array) -> jax.Array:
    """Hidden [..., D] -> tied logits [..., V], before any soft cap."""
    flat = jnp.einsum(
      "td,vd->tv",
      hidden.reshape(-1, hidden.shape[-1]),
      placement.for_use(self.embedding.astype(self.dtype), ("V", "D")),
      preferred_element_type=jnp.float32,
    )
    return flat.reshape(*hidden.shape[:-1], -1)
