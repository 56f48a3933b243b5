"""The numeric tests' tiny models, and the tolerances that hold for them.

All tests run in float32 at highest matmul precision. Two orders of the same
additions differ by about 1e-7 of the largest term; a wrong mask, position or
cap changes these sharp little models by far more than `MATTERS`. Each
tolerance lies between the two, with room for other processors.
"""

import functools

import compiling
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cacheaug.augment import coprocessor
from cacheaug.model import config as model_config
from cacheaug.model import decode_rows, transformer
from cacheaug.model.transformer import Transformer
from cacheaug.weights import coprocessor_files

# Mean nll in nats, itself of order 3: the project's own bound. Seen: 1e-6.
LOSS = 1e-5
# One token's nll, where no mean evens out the rounding. Seen: 6e-6.
NLL = 3e-5
# Norm of a gradient leaf's difference over the leaf's norm: the project's own
# bound. Seen: 1.2e-5.
GRADIENT = 1e-4
# Hidden states after the final norm, of order one. Seen: 1.4e-6.
HIDDEN = 3e-5
# One attention layer against float64. Seen: 4e-7.
ATTENTION = 1e-5
# The least by which a changed switch must change an output for the comparison
# under it to mean something: at least 30 times the tolerances above.
MATTERS = 1e-3

jit = compiling.jit


def make_model(**changes) -> Transformer:
  """Sliding then global, both soft caps low enough to bend, GQA."""
  shapes = dict(
    vocab_size=37,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=24,
    window=5,
    attention_softcap=2.0,
    final_softcap=5.0,
  )
  family = changes.pop("family", "gemma2")
  remat = changes.pop("remat", "none")
  config = model_config.make(family, **(shapes | changes))
  return Transformer(config, remat=remat)


def shaken(tree, seed: int):
  """Random everywhere: no zero or one of an initializer hides a term."""
  rng = np.random.default_rng(seed)

  def shake(path, x):
    name = jax.tree_util.keystr(path)
    # Sharp attention and lively embeddings, so that what is seen matters.
    size = 0.2 if "norm" in name else 1.0 if "embed" in name else 0.4
    return jnp.asarray(x + size * rng.standard_normal(x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(shake, tree)


@functools.cache
def make_params(model: Transformer, seed: int = 0):
  """A decoder's parameters."""
  init = jit(lambda key: nn.unbox(transformer.init(model, key)))
  return shaken(init(jax.random.key(0)), seed)


@functools.cache
def make_coprocessor(model: Transformer, spec, seed: int = 1):
  """A coprocessor's parameters, unlike the decoder's in every leaf."""
  init = jit(lambda key: nn.unbox(coprocessor.init_boxed(model, spec, key)))
  return shaken(init(jax.random.key(0)), seed)


def save_coprocessor(directory, model: Transformer, spec, **options):
  """Exports `make_coprocessor`'s parameters; returns them."""

  params = make_coprocessor(model, spec)
  coprocessor_files.save_coprocessor(
    directory,
    model_config=model.config,
    spec=spec,
    params=params,
    decoder_fingerprint="0123456789ab",
    source="",
    **options,
  )
  return params


def tokens_of(model: Transformer, *shape: int, seed: int = 0) -> np.ndarray:
  """Random tokens."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, model.config.vocab_size, shape).astype(np.int32)


def write_token(model, params, cache, token, position, slot):
  """Hidden [B, D] of one more token a sequence [B], and the cache with it."""
  x = transformer.embed(model, params, token[:, None])
  seen = jnp.ones_like(position)[:, None]
  hidden, cache = decode_rows.write_rows(
    model, params, cache, x, position[:, None], segments=seen, slot=slot
  )
  return hidden[:, 0], cache


def close(a, b, tolerance: float) -> float:
  """Asserts |a - b| <= tolerance everywhere; returns the largest."""
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape, (a.shape, b.shape)
  assert np.isfinite(a).all() and np.isfinite(b).all()
  worst = float(np.abs(a - b).max(initial=0.0))
  assert worst <= tolerance, f"{worst:.3g} exceeds {tolerance:.3g}"
  return worst


def far(a, b) -> None:
  """Asserts that a and b differ by more than any tolerance above."""
  worst = float(np.abs(np.asarray(a) - np.asarray(b)).max())
  assert worst > MATTERS, f"only {worst:.3g} apart: the test shows nothing"


def close_trees(a, b, tolerance: float = GRADIENT) -> float:
  """Asserts that each leaf's difference is small beside the leaf."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  worst = 0.0
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    x, y = np.asarray(x), np.asarray(y)
    name, norm = jax.tree_util.keystr(path), np.linalg.norm(y)
    # A leaf without gradient would be equal to anything's.
    assert norm > 1e-6, f"{name} has no gradient: the test shows nothing"
    error = float(np.linalg.norm(x - y) / norm)
    assert error <= tolerance, f"{name}: {error:.3g} exceeds {tolerance:.3g}"
    worst = max(worst, error)
  return worst
