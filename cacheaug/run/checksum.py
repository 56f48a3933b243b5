"""A tree's leaves by name, and checksums that do not depend on sharding."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaf_name(path: Sequence[Any]) -> str:
  """'a/b/c' of a path that jax.tree_util gives."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
  """{'a/b/c': leaf} of any pytree, in the order of its leaves.

  Raises:
    ValueError: two leaves have the same name.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {leaf_name(path): leaf for path, leaf in leaves}
  if len(named) != len(leaves):
    raise ValueError("two leaves of the tree have the same path")
  return named


def checksums(leaves: Iterable[jax.Array], dtype: Any = None) -> np.ndarray:
  """uint32 [number of leaves], each of `leaf_checksum`.

  Args:
    leaves: arrays of any shapes, which every process has.
    dtype: to which each is rounded first; None for its own.
  """
  return np.asarray(jax.device_get(_checksums(list(leaves), dtype=dtype)))


def batch_checksum(batch: Mapping[str, jax.Array]) -> str:
  """8 hexadecimal digits of a step's rows and of their order.

  Two runs, or the parts of a resumed one, that log the same for a step have
  read the same data, on whatever devices and processes.
  """
  return f"{int(np.bitwise_xor.reduce(checksums(batch.values()))):08x}"


@functools.partial(jax.jit, static_argnames="dtype")
def _checksums(leaves: list[jax.Array], *, dtype: Any) -> jax.Array:
  return jnp.stack([leaf_checksum(x.astype(dtype or x.dtype)) for x in leaves])


def leaf_checksum(x: jax.Array) -> jax.Array:
  """uint32 [] of the bits of an array of any shape, the same on any mesh.

  A sum, modulo 2**32, of the words times odd weights that depend on the
  place: any change of one word changes it, and so do swapped words.
  """
  if x.dtype == jnp.bool_:
    words = x.astype(jnp.uint32)
  else:
    bits = min(x.dtype.itemsize, 4) * 8
    # Eight-byte types become two words in a new last dimension.
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    words = words.astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for dimension, size in enumerate(words.shape):
    # Wraps beyond 2**32 elements, which only repeats weights.
    place = place * jnp.uint32(size % 2**32)
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
  weights = (place * jnp.uint32(2654435761)) ^ (place >> 15)
  return jnp.sum(words * (2 * weights + 1), dtype=jnp.uint32)
