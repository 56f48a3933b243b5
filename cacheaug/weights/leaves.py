"""A decoder's parameters as leaves, and the tensors that each is made of.

Every file format builds on this module: it says which leaves a decoder has,
reads them tensor by tensor into their shardings, and names a decoder by its
weights.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run.checksum import checksums, named_leaves
from cacheaug.weights import families

Where = Mapping[str, tuple]  # tensor's name -> arguments of its reader


@functools.lru_cache(maxsize=8)
def _decoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Leaf path ('blocks/mlp/up/kernel') -> shape, in a fixed order."""
  model = Transformer(config)
  boxed = jax.eval_shape(
    lambda k: transformer.init(model, k), jax.random.key(0)
  )
  return {name: x.shape for name, x in flatten(nn.unbox(boxed)).items()}


def flatten(tree: Params) -> dict[str, Any]:
  """Nested dictionaries -> {'a/b/c': leaf}, sorted."""
  return named_leaves(tree)


def nest(flat: Mapping[str, Any]) -> dict:
  """{'a/b/c': leaf} -> nested dictionaries."""
  tree: dict = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of our tree and the tensors it is made of."""

  path: str
  shape: tuple[int, ...]  # with L first in blocks
  names: tuple[str, ...]  # L of them in blocks, else one

  @property
  def stacked(self) -> bool:
    """Whether the leaf has L in front."""
    return self.path.startswith("blocks/")

  @property
  def part(self) -> tuple[int, ...]:
    """Shape of one layer's part."""
    return self.shape[1:] if self.stacked else self.shape

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each tensor."""
    return families.tensor_shape(self.path, self.part)

  def ours(self, tensor: np.ndarray) -> np.ndarray:
    """A tensor -> one layer's part, without a copy."""
    if self.path.endswith("/kernel"):
      tensor = tensor.T
    return tensor.reshape(self.part)

  def theirs(self, part: np.ndarray) -> np.ndarray:
    """One layer's part -> a tensor."""
    if self.path.endswith("/kernel"):
      return part.reshape(self.tensor_shape[::-1]).T
    return part.reshape(self.tensor_shape)


def leaves_of(config: ModelConfig) -> list[Leaf]:
  """Every leaf of a decoder, in a fixed order."""
  leaves = []
  for path, shape in _decoder_shapes(config).items():
    count = config.layers if path.startswith("blocks/") else 1
    name = families.tensor_name(path, families.TABLE[config.family])
    names = tuple(name.format(i) for i in range(count))
    leaves.append(Leaf(path, shape, names))
  return leaves


# --- reading ----------------------------------------------------------------


def check_shapes(
  source: pathlib.Path | str,
  wanted: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...]],
  *,
  labels: Mapping[str, str] = types.MappingProxyType({}),
  wants: str = "config.json wants",
  hint: str = "do config.json and the weights belong together?",
) -> None:
  """Compares all tensors' names and shapes before any is read.

  Args:
    source: file or directory, for messages.
    wanted: name -> shape that the decoder needs.
    found: name -> shape that is stored.
    labels: name -> file and name in it, where messages should have them.
    wants: whose shape it is that a tensor lacks.
    hint: the question that ends a message.

  Raises:
    UserError: a tensor that is missing, unexpected or of another shape.
  """
  for problem, names in (
    ("has no", [n for n in wanted if n not in found]),
    ("has an unexpected", [n for n in found if n not in wanted]),
  ):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(f"{source}: {problem} tensor {names[0]}{more}: {hint}")
  for name, shape in wanted.items():
    if tuple(found[name]) != tuple(shape):
      raise UserError(
        f"{labels.get(name, f'{source}: {name}')} is {list(found[name])}, "
        f"{wants} {list(shape)}: {hint}"
      )


def read_leaves(
  leaves: list[Leaf],
  where: Mapping[str, tuple],
  dtype: Any,
  shardings: Params | None,
  read: Callable[..., np.ndarray],
) -> Params:
  """The tree of `leaves`, of tensors `read(*where[name])`; see `load`."""
  flat = None if shardings is None else flatten(shardings)
  tree = {}
  for leaf in leaves:
    sharding = None if flat is None else flat[leaf.path]
    tree[leaf.path] = _read_leaf(leaf, where, dtype, sharding, read)
  return nest(tree)


def _read_leaf(
  leaf: Leaf,
  where: Mapping[str, tuple],
  dtype: Any,
  sharding: Sharding | None,
  read: Callable[..., np.ndarray],
) -> jax.Array:
  """Fills this process's shards layer by layer, then hands them over."""
  if sharding is None:
    sharding = SingleDeviceSharding(jnp.zeros(()).devices().pop())
  shape = (len(leaf.names), *leaf.part)  # one that is not stacked has L = 1

  def bounds(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    index = index if leaf.stacked else (slice(None), *index)
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))

  places = sharding.addressable_devices_indices_map(leaf.shape).values()
  shards = {
    place: np.empty([stop - start for start, stop in place], jnp.dtype(dtype))
    for place in map(bounds, places)
  }
  for layer, name in enumerate(leaf.names):
    part = leaf.ours(read(*where[name]))
    for ((first, last), *rest), shard in shards.items():
      if first <= layer < last:
        shard[layer - first] = part[tuple(slice(*s) for s in rest)]

  def shard_of(index: tuple[slice, ...]) -> np.ndarray:
    shard = shards[bounds(index)]
    return shard if leaf.stacked else shard[0]

  array = jax.make_array_from_callback(leaf.shape, sharding, shard_of)
  # Transfers run on by themselves: without waiting, the host would hold the
  # shards of every leaf at once.
  return array.block_until_ready()


# --- identity ---------------------------------------------------------------


def fingerprint(params: Params) -> str:
  """12 hexadecimal digits that tell a decoder from another.

  Of the names, shapes and weights rounded to bfloat16, so that it is the same
  whether they were loaded as float32 or bfloat16; the same on any mesh.
  """
  flat = flatten(params)
  sums = checksums(flat.values(), jnp.bfloat16)
  shapes = [[name, *leaf.shape] for name, leaf in flat.items()]
  text = json.dumps([shapes, sums.tolist()])
  return hashlib.sha256(text.encode()).hexdigest()[:12]
