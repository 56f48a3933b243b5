"""Checksums of arrays that do not depend on how they are sharded."""

import jax
import jax.numpy as jnp


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
