"""Low-rank adaptation (Hu et al., arXiv 2106.09685) of a tree of blocks.

A kernel W [inputs, outputs] is read as W + alpha / rank * a b with a [inputs,
rank] and b [rank, outputs]; a is random and b zero at the start, so that an
adapted network begins as the plain one. `rank` and `alpha` are what peft calls
`r` and `lora_alpha` (with its default scaling, not `use_rslora`).

A LoRA tree has {lora_a, lora_b} for each adapted kernel, at its place: blocks'
{attention: {q: {kernel [L, D, H, E]}}} has {attention: {q: {lora_a [L, D,
rank], lora_b [L, rank, H, E]}}}.

While it trains it is kept separate from the kernels (`attach`):
y = x W + (x a) b, which forms neither a second copy of the weights nor their
gradients. `merge` makes plain weights for everything else.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer

# Kernel -> its module, and how many of its axes (L left out) are inputs.
_PLACES = {
  "q": ("attention", 1),
  "k": ("attention", 1),
  "v": ("attention", 1),
  "o": ("attention", 2),
  "gate": ("mlp", 1),
  "up": ("mlp", 1),
  "down": ("mlp", 1),
}
KERNELS = tuple(_PLACES)


def sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
  """(inputs, outputs) of one layer's kernels, by name."""
  c = model
  query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
  return {
    "q": (c.width, query),
    "k": (c.width, key),
    "v": (c.width, key),
    "o": (query, c.width),
    "gate": (c.width, c.mlp_width),
    "up": (c.width, c.mlp_width),
    "down": (c.mlp_width, c.width),
  }


def check(
  model: ModelConfig,
  rank: int,
  kernels: Sequence[str],
  *,
  label: str = "lora_rank",
) -> None:
  """Refuses kernels that no block has, and a rank beyond those chosen.

  Args:
    model: whose kernels.
    rank: 1 or more.
    kernels: of `KERNELS`, each once.
    label: the rank's config key, for the error.

  Raises:
    UserError: naming the key, the kernel and the numbers.
  """
  unknown = [name for name in kernels if name not in _PLACES]
  if unknown or not kernels or len(set(kernels)) < len(kernels):
    raise UserError(
      f"lora.kernels={tuple(kernels)}: give one or more of "
      f"{', '.join(KERNELS)}, each once"
    )
  if rank < 1:
    raise UserError(f"{label}={rank} must be at least 1 to make a LoRA")
  smallest = {name: min(sizes(model)[name]) for name in kernels}
  name = min(smallest, key=smallest.get)
  if rank > smallest[name]:
    raise UserError(
      f"{label}={rank} exceeds the {smallest[name]} of kernel {name!r}, which "
      "any change of it fits into: lower it, or leave that kernel out of "
      "lora.kernels"
    )


def init_boxed(
  model: Transformer, rank: int, kernels: Sequence[str], key: jax.Array
) -> Params:
  """A fresh LoRA tree, boxed with logical axes; see the module docstring.

  Raises:
    UserError: from `check`.
  """
  check(model.config, rank, kernels)
  # For shapes and axes alone; the numbers come of `key`.
  shapes = jax.eval_shape(partial(transformer.init, model), jax.random.key(0))
  tree: dict[str, Any] = {}
  parts = jax.random.split(key, len(kernels))
  for name, part in zip(kernels, parts, strict=True):
    module, inputs = _PLACES[name]
    box = shapes["blocks"][module][name]["kernel"]
    cut = 1 + inputs  # after L and the inputs
    shape, axes = box.value.shape, box.names
    a = nn.initializers.variance_scaling(
      1.0,
      "fan_in",
      "truncated_normal",
      in_axis=range(1, cut),
      out_axis=cut,
      batch_axis=0,
    )
    boxed = nn.with_logical_partitioning
    tree.setdefault(module, {})[name] = {
      "lora_a": boxed(a, (*axes[:cut], None))(
        part, (*shape[:cut], rank), model.param_dtype
      ),
      "lora_b": boxed(nn.initializers.zeros, ("L", None, *axes[cut:]))(
        part, (shape[0], rank, *shape[cut:]), model.param_dtype
      ),
    }
  return tree


def attach(blocks: Params, lora: Params, scale: float) -> Params:
  """Blocks that a Transformer runs with the LoRA beside their kernels.

  Args:
    blocks: plain, stacked over L.
    lora: of `init_boxed`, unboxed.
    scale: alpha / rank.
  """

  def one(leaves: Params) -> Params:
    return {"lora_a": leaves["lora_a"], "lora_b": scale * leaves["lora_b"]}

  return _with(blocks, lora, lambda kernel, own: {**kernel, **one(own)})


@jax.jit
def merge(blocks: Params, lora: Params, scale: float) -> Params:
  """Plain blocks of the same effect: kernels W + scale * a b.

  Adapted kernels are float32, whatever the base is stored in: bfloat16 would
  round a small change away.
  """

  def one(module: Params, own: Params) -> Params:
    kernel = module["kernel"].astype(jnp.float32)
    a, b = own["lora_a"], own["lora_b"]
    layers, rank = b.shape[:2]
    change = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
    return {**module, "kernel": kernel + scale * change.reshape(kernel.shape)}

  return _with(blocks, lora, one)


def parameters(model: ModelConfig, rank: int, kernels: Sequence[str]) -> int:
  """Numbers in a LoRA tree."""
  return model.layers * rank * sum(sum(sizes(model)[k]) for k in kernels)


def _with(blocks: Params, lora: Params, change: Any) -> Params:
  out = dict(blocks)
  for module, names in lora.items():
    out[module] = dict(blocks[module])
    for name, own in names.items():
      out[module][name] = change(blocks[module][name], own)
  return out
