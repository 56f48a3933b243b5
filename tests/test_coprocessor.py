"""Where latents come from, what they depend on, and how they begin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import (
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import transformer

N, S = 3, 12
POINTS = np.array([[3, 5, 9]], np.int32)
DOCUMENTS = np.zeros((1, S), np.int32)


def setup(start):
  model = make_model(window=20)
  spec = Layout(N, 2, start=start)
  tokens = tokens_of(model, 1, S)
  return model, spec, make_params(model), tokens


@functools.cache
def fresh(start, source="decoder"):
  """As the trainer makes them, for the decoder of `setup`."""
  model, spec, decoder, _ = setup(start)

  @jit
  def make(key, decoder):
    return coprocessor.init(model, spec, key, decoder, source)

  return make(jax.random.key(0), decoder)


def latents(start, coproc):
  """(z, function of (soft, keys, copied) that gives z)."""
  model, spec, decoder, tokens = setup(start)
  laid = traces.layout_traces(tokens, DOCUMENTS, POINTS, spec)
  _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)
  copied = transformer.embed(model, decoder, laid.input_tokens)

  def z(soft, keys, copied):
    return coprocessor.latents(
      model.clone(attention=Kernel("plain")),  # for gradients of the context
      coproc | {"soft_tokens": soft},
      cache.replace(keys=keys),
      laid,
      copied,
    )[0]

  return z, (coproc["soft_tokens"], cache.keys, copied)


@pytest.mark.parametrize("start", traces.STARTS)
def test_starts_as_a_copy_of_the_decoder(start):
  _, _, decoder, _ = setup(start)
  coproc = fresh(start)
  names = {"transformer", "soft_tokens"}
  names |= {"latent_projection"} if start == "harmless" else set()
  assert set(coproc) == names
  assert set(coproc["transformer"]) == {"blocks", "final_norm"}
  copy = {k: decoder[k] for k in coproc["transformer"]}
  jax.tree.map(np.testing.assert_array_equal, coproc["transformer"], copy)
  assert np.asarray(coproc["soft_tokens"]).std() > 0
  if start == "harmless":
    assert not np.asarray(coproc["latent_projection"]).any()


def test_scratch_shares_nothing_with_the_decoder():
  decoder = setup("harmless")[2]
  body = fresh("harmless", "scratch")["transformer"]
  for x, y in zip(
    jax.tree.leaves(body["blocks"]),
    jax.tree.leaves(decoder["blocks"]),
    strict=True,
  ):
    far(x, y)


def test_the_copy_is_the_coprocessors_own():
  """Donating or overwriting it cannot reach the decoder's arrays."""
  decoder, made = setup("as_is")[2], fresh("as_is")
  for x, y in zip(
    jax.tree.leaves(made["transformer"]),
    jax.tree.leaves({k: decoder[k] for k in made["transformer"]}),
    strict=True,
  ):
    assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()


def test_unknown_source_is_refused():
  model, spec, decoder, _ = setup("as_is")
  with pytest.raises(UserError, match="coprocessor.init='noise'.*scratch"):
    coprocessor.init(model, spec, jax.random.key(0), decoder, "noise")


def test_harmless_latents_begin_as_the_context_repeated():
  @jit
  def run(coproc):
    z, args = latents("harmless", coproc)
    return z(*args), args[2][0]

  z, copied = run(fresh("harmless"))
  np.testing.assert_array_equal(z, copied)
  trained = fresh("harmless") | {"latent_projection": np.eye(16)}
  far(run(trained)[0], copied)


def test_as_is_latents_are_the_normed_hidden_states():
  @jit
  def run(coproc):
    z, args = latents("as_is", coproc)
    return z(*args)

  coproc = jax.tree.map(jnp.array, fresh("as_is"))
  coproc["transformer"]["final_norm"]["scale"] = jnp.zeros(16)
  z = np.asarray(run(coproc))
  assert z.shape == (3, N, 16)
  np.testing.assert_allclose((z**2).mean(-1), 1.0, rtol=1e-3)


@pytest.mark.parametrize("start", traces.STARTS)
def test_causality_by_gradient(start):
  """d z[m, i] is zero but for earlier soft tokens and the context up to p."""
  model, spec, _, _ = setup(start)
  coproc = make_coprocessor(model, spec)

  @jit
  def gradients():
    z, args = latents(start, coproc)
    return jax.vmap(
      lambda m, i: jax.grad(
        lambda *args: jnp.sin(z(*args))[m, i].sum(), (0, 1, 2)
      )(*args)
    )(jnp.repeat(jnp.arange(3), N), jnp.tile(jnp.arange(N), 3))

  soft, keys, copied = map(np.asarray, gradients())
  for row, (m, i) in enumerate(np.ndindex(3, N)):
    # Soft token j is the same in every trace: of this one, j <= i count.
    used = np.abs(soft[row]).max(-1) > 0
    assert used.tolist() == [j <= i for j in range(N)], (m, i)
    seen = np.abs(keys[row, :, 0]).max((0, 2, 3)) > 0  # of [L, S, K, E]
    assert seen.tolist() == [s <= POINTS[0, m] for s in range(S)], (m, i)
    expected = np.zeros((3, N), bool)
    expected[m, : i + 1] = start == "harmless"
    assert ((np.abs(copied[row, 0]).max(-1) > 0) == expected).all(), (m, i)


def test_fewer_latents_are_the_last_ones():
  model = make_model()
  spec = Layout(4, 3)
  params = make_coprocessor(model, spec)
  fewer, changed = coprocessor.fewer(params, spec, 3)
  np.testing.assert_array_equal(fewer["soft_tokens"], params["soft_tokens"][1:])
  assert fewer["transformer"] is params["transformer"]
  assert changed == dataclasses.replace(spec, latents=3)
  whole, same = coprocessor.fewer(params, spec, 4)
  np.testing.assert_array_equal(whole["soft_tokens"], params["soft_tokens"])
  assert same == spec
  for wrong in (0, 5):
    with pytest.raises(UserError, match=f"{wrong} latents.* trained for 4"):
      coprocessor.fewer(params, spec, wrong)
  spec = dataclasses.replace(spec, kind="prefix")
  params = make_coprocessor(model, spec)
  fewer, _ = coprocessor.fewer(params, spec, 1)
  for name in ("prefix_keys", "prefix_values"):
    np.testing.assert_array_equal(fewer[name], params[name][:, 3:])
