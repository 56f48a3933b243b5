"""LoRA: it begins as nothing, is its merged weights, and can be any change."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from tolerances import jit

from cacheaug.errors import UserError
from cacheaug.model import lora, transformer

RANK, SCALE = 3, 0.7
MODEL = tolerances.make_model()
TOKENS = tolerances.tokens_of(MODEL, 2, 9)


def _tree(kernels=lora.KERNELS, rank=RANK, shaken=True):
  make = partial(lora.init_boxed, MODEL, rank, kernels)
  tree = nn.unbox(jit(make)(jax.random.key(1)))
  return tolerances.shaken(tree, 2) if shaken else tree


def _hidden(blocks, remat="none"):
  decoder = {**tolerances.make_params(MODEL), "blocks": blocks}
  model = MODEL.clone(remat=remat)
  segments = np.ones_like(TOKENS)
  return transformer.train_pass(model, decoder, TOKENS, segments)


def test_a_fresh_lora_changes_nothing():
  blocks = tolerances.make_params(MODEL)["blocks"]
  run = jit(
    lambda tree: (_hidden(blocks), _hidden(lora.attach(blocks, tree, SCALE)))
  )
  np.testing.assert_array_equal(*run(_tree(shaken=False)))
  tolerances.far(*run(_tree()))


@pytest.mark.parametrize("kernels", [lora.KERNELS, ("o",), ("q", "down")])
def test_apart_equals_merged_gradients_too(kernels):
  blocks = tolerances.make_params(MODEL)["blocks"]
  direction = np.random.default_rng(3).normal(size=(*TOKENS.shape, 16))

  def loss(tree, how, remat):
    hidden = _hidden(how(blocks, tree, SCALE), remat)
    return (hidden * direction.astype(np.float32)).sum(), hidden

  @jit
  def both(tree):
    grad = partial(jax.grad, has_aux=True)
    return (
      grad(partial(loss, how=lora.attach, remat="lean"))(tree),
      grad(partial(loss, how=lora.merge, remat="none"))(tree),
    )

  (apart, hidden), (merged, same) = both(_tree(kernels))
  tolerances.close(hidden, same, tolerances.HIDDEN)
  tolerances.close_trees(apart, merged)
  assert {n for names in apart.values() for n in names} == set(kernels)


def test_full_rank_is_any_change():
  """By the singular values of random changes of every kernel."""
  blocks = tolerances.make_params(MODEL)["blocks"]
  wanted = tolerances.shaken(blocks, 7)
  rank = min(min(pair) for pair in lora.sizes(MODEL.config).values())
  assert rank == 16
  tree = _tree(rank=rank)
  for module, names in tree.items():
    for name, own in names.items():
      old, new = (
        np.asarray(b[module][name]["kernel"], np.float64)
        for b in (blocks, wanted)
      )
      layers = old.shape[0]
      inputs = np.prod(own["lora_a"].shape[1:-1], dtype=int)
      change = ((new - old) / SCALE).reshape(layers, inputs, -1)
      u, s, v = np.linalg.svd(change, full_matrices=False)
      own["lora_a"] = (u * s[:, None]).reshape(own["lora_a"].shape)
      own["lora_b"] = v.reshape(own["lora_b"].shape)
  tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  found = lora.merge(blocks, tree, SCALE)
  for module, names in tree.items():
    for name in names:
      kernel = wanted[module][name]["kernel"]
      tolerances.close(found[module][name]["kernel"], kernel, tolerances.LOSS)
      # Control: one rank less leaves something out.
  last = jax.tree.map(lambda x: x, tree)
  last["mlp"]["up"]["lora_b"] = tree["mlp"]["up"]["lora_b"].at[:, -1].set(0.0)
  less = lora.merge(blocks, last, SCALE)["mlp"]["up"]["kernel"]
  tolerances.far(less, wanted["mlp"]["up"]["kernel"])


def test_merged_kernels_are_float32_and_the_rest_is_as_it_was():
  blocks = tolerances.make_params(MODEL)["blocks"]
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), blocks)
  merged = lora.merge(half, _tree(("q",)), SCALE)
  assert merged["attention"]["q"]["kernel"].dtype == jnp.float32
  assert merged["attention"]["k"]["kernel"].dtype == jnp.bfloat16
  assert set(merged["attention"]["q"]) == {"kernel"}
  assert "lora_a" not in half["attention"]["q"]  # the argument is untouched


def test_lean_remat_keeps_the_narrow_product_alone():
  """Neither a merged kernel nor a layer's wide outputs a second time."""
  blocks = tolerances.make_params(MODEL)["blocks"]

  def kept(kernels, remat):
    def residuals(tree):
      def run(tree):
        return _hidden(lora.attach(blocks, tree, SCALE), remat)

      return jax.vjp(run, tree)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, _tree(kernels)))
    return sum(x.size for x in leaves)

  layers, rows = MODEL.config.layers, TOKENS.size
  more = kept(("q", "up"), "lean") - kept(("q",), "lean")
  numbers = lora.parameters(MODEL.config, RANK, ("up",))
  # The LoRA itself (scaled, and as it is), what comes out of its first half,
  # and what goes in, which q alone does not need of the MLP.
  width = MODEL.config.width
  assert more <= layers * rows * (RANK + width) + 3 * numbers
  # Control: kept whole, the second half's output is there too.
  every = kept(("q", "up"), "none") - kept(("q",), "none")
  assert every > more


def test_counts_are_those_of_the_tree():
  for kernels in (lora.KERNELS, ("k", "o")):
    counted = sum(x.size for x in jax.tree.leaves(_tree(kernels)))
    assert counted == lora.parameters(MODEL.config, RANK, kernels)


@pytest.mark.parametrize(
  "rank, kernels, words",
  [
    (0, ("q",), ("lora_rank=0", "at least 1")),
    (-1, ("q",), ("lora_rank=-1",)),
    (17, ("up", "k"), ("lora_rank=17", "16", "lora.kernels")),
    (2, (), ("lora.kernels=()", "gate")),
    (2, ("q", "q"), ("lora.kernels", "once")),
    (2, ("query",), ("query", "down")),
  ],
)
def test_impossible_loras_are_refused(rank, kernels, words):
  with pytest.raises(UserError) as caught:
    lora.init_boxed(MODEL, rank, kernels, jax.random.key(0))
  assert [w for w in words if w not in str(caught.value)] == []
