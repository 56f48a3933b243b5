"""Bytes on each device, by kind, from shapes and shardings alone.

The bytes of arguments and results (parameters, optimizer state, batch, cache,
gradients) are exact. Those that the backward pass keeps are exact before the
compiler's own savings; working memory is an estimate. Where a compiler was
asked, its figure for all temporaries together is the one that counts.
"""

import dataclasses
import functools
import json
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cacheaug import build, sharding, trainable
from cacheaug import config as configs
from cacheaug.augment import objective
from cacheaug.kernels import cross_entropy
from cacheaug.model import transformer
from cacheaug.model.config import LAYER_PATTERNS, ModelConfig

_MANY = 4096  # sequences

# Kinds of a step's arguments, and of its temporaries.
ARGUMENTS = (
  "frozen decoder",
  "trained parameters",
  "optimizer state",
  "averaged weights",
  "batch",
)
TEMPORARIES = (
  "gradients",
  "kv-cache",
  "kept for the backward pass",
  "working memory (estimate)",
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device, by the kinds above."""

  kinds: dict[str, float]

  def sum(self, names: tuple[str, ...]) -> float:
    """Bytes of several kinds together."""
    return sum(self.kinds[name] for name in names)

  @property
  def arguments(self) -> float:
    """Bytes that a device holds before a step begins."""
    return self.sum(ARGUMENTS)

  @property
  def temporaries(self) -> float:
    """Bytes that a step allocates and frees."""
    return self.sum(TEMPORARIES)

  @property
  def total(self) -> float:
    """Bytes that must fit."""
    return self.arguments + self.temporaries


def on_device(tree: Any) -> float:
  """Bytes of one device's shards of a tree of shapes with shardings."""
  return float(
    sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )
  )


def arithmetic(
  config: ConfigDict, model_config: ModelConfig, devices: int
) -> Memory:
  """Bytes on one device, by shapes and shardings.

  Raises:
    UserError: a mesh that does not divide devices or shapes.
  """
  mesh = sharding.abstract_mesh(config, devices)
  state, decoder, batch = build.abstract_arguments(config, model_config, mesh)
  params = on_device(state.params)
  sequences = micro_batch(config, mesh)
  kept = kept_per_sequence(config, model_config)
  cache = cache_per_sequence(config, model_config)
  accumulates = config.optimizer.accumulation > 1
  return Memory(
    {
      # And what else a LoRA adapts.
      "frozen decoder": on_device((decoder, state.frozen)),
      "trained parameters": params,
      "optimizer state": on_device(state.opt_state),
      "averaged weights": on_device(state.average),
      "batch": on_device(batch),
      # One micro-batch's are added to the sum of those before it.
      "gradients": params * (2 if accumulates else 1),
      "kv-cache": sequences * cache / mesh.shape["tensor"],
      "kept for the backward pass": sequences * max(kept - cache, 0.0),
      "working memory (estimate)": _working(
        config, model_config, mesh, decoder if decoder else state.params
      ),
    }
  )


def micro_batch(config: ConfigDict, mesh: sharding.AnyMesh) -> int:
  """Sequences that one device computes at once."""
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  return config.data.batch // parts // config.optimizer.accumulation


def cache_per_sequence(config: ConfigDict, model_config: ModelConfig) -> float:
  """Bytes of one sequence's keys and values in all layers."""
  if config.objective == "language_model":
    return 0.0
  c = model_config
  itemsize = jnp.dtype(config.precision.compute).itemsize
  return float(
    2 * c.layers * config.data.sequence * c.kv_heads * c.head_dim * itemsize
  )


def _working(
  config: ConfigDict, model_config: ModelConfig, mesh: Any, decoder: Any
) -> float:
  """A layer computed again, weights gathered for use, a chunk of logits."""
  c = model_config
  itemsize = jnp.dtype(config.precision.compute).itemsize
  tensor = mesh.shape["tensor"]
  again = 0.0
  if config.remat != "none":
    plain = _copy(config, remat="none")
    again = micro_batch(config, mesh) * (
      kept_per_sequence(plain, c) / c.layers / tensor
    )
  gathered = 0.0
  if mesh.shape["fsdp"] > 1:
    blocks = sum(x.size for x in jax.tree.leaves(decoder["blocks"]))
    # One layer's in use, the next one's under way; the embedding whole.
    gathered = 2 * blocks / c.layers + c.vocab_size * c.width
    gathered *= itemsize / tensor
  # A chunk's logits, their exponentials, their gradient.
  rows = max(
    cross_entropy.CHUNK_ROWS, cross_entropy.CHUNK_ELEMENTS // c.vocab_size
  )
  wanted = config.data.sequence
  if config.objective == "coprocessor":
    wanted = config.traces.count * configs.layout_of(config).tokens_predicted
  rows = min(rows, micro_batch(config, mesh) * wanted)
  logits = 3 * 4 * rows * c.vocab_size / tensor
  return again + gathered + logits


def kept_per_sequence(config: ConfigDict, model_config: ModelConfig) -> float:
  """Bytes that one sequence's forward pass leaves for the backward pass.

  What jax.vjp holds on to, the cache included, parameters not. Layers cost
  the same, so two small depths give every depth.
  """
  keys = (
    "objective",
    "remat",
    "attention",
    "traces",
    "coprocessor",
    "language_model",
    "lora",
    "precision",
  )
  chosen = {key: config[key] for key in keys}
  chosen["sequence"] = config.data.sequence
  text = json.dumps(
    chosen,
    sort_keys=True,
    default=lambda x: x.to_dict() if isinstance(x, ConfigDict) else str(x),
  )
  period = len(LAYER_PATTERNS[model_config.family])
  one, two = (
    _residuals(
      _Hashable(text, config),
      dataclasses.replace(model_config, layers=layers, layer_kinds=()),
    )
    for layers in (period, 2 * period)
  )
  return one + (two - one) * (model_config.layers - period) / period


class _Hashable:
  """A config as a key of the cache below: equal where `text` is."""

  def __init__(self, text: str, config: ConfigDict):
    self.text, self.config = text, config

  def __hash__(self):
    return hash(self.text)

  def __eq__(self, other):
    return self.text == other.text


@functools.cache
def _residuals(key: _Hashable, model_config: ModelConfig) -> float:
  config = key.config
  model = build.shapes_only(config, model_config)
  spec = configs.layout_of(config)
  mask = config.traces.mask_documents
  random = jax.random.key(0)
  decoder = jax.eval_shape(partial(transformer.init, model), random)
  trained, frozen = jax.eval_shape(
    lambda key: trainable.init(config, model, key, None, boxed=True), random
  )
  storage = jnp.dtype(config.precision.decoder)
  decoder = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, storage), nn.unbox(decoder)
  )

  def residuals(trained, frozen, decoder, batch, points):
    def loss(trained):
      whole = trainable.effective(config, trained, frozen, decoder)
      if config.objective == "language_model":
        sums = objective.language_model_loss(model, whole, batch, mask)
      else:
        sums = objective.coprocessor_loss(
          model, decoder, whole, batch, points, spec
        )
      return sums[0].sum()

    return jax.vjp(loss, trained)[1]

  def held(sequences: int) -> float:
    def rows(n):
      return jax.ShapeDtypeStruct((sequences, n), jnp.int32)

    s = config.data.sequence
    batch = {"tokens": rows(s), "documents": rows(s)}
    found = jax.eval_shape(
      residuals,
      nn.unbox(trained),
      nn.unbox(frozen),
      decoder,
      batch,
      rows(config.traces.count),
    )
    leaves = jax.tree.leaves(found)
    return float(sum(x.size * x.dtype.itemsize for x in leaves))

  # Parameters are among them once, so many sequences make them nothing; and
  # shapes cost the same for any number.
  return held(_MANY) / _MANY


def _copy(config: ConfigDict, **changes: Any) -> ConfigDict:
  config = ConfigDict(config.copy_and_resolve_references())
  config.update(changes)
  return config
