"""Greedy generation against loops of full forward passes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import jit, make_coprocessor, make_model, make_params, tokens_of

from cacheaug.augment import traces
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context, padding
from cacheaug.model import transformer

N, NEW, PAD = 3, 6, 36
LENGTHS = (9, 4, 6)  # of the batch's prompts; the window is 5


def model_and_params():
  # With a tied head, random models say their input again, whatever they see.
  model = make_model(tied_head=False)
  return model, make_params(model)


def prompts():
  model, _ = model_and_params()
  return [tokens_of(model, n, seed=n).tolist() for n in LENGTHS]


def spec_of(scheme, start="harmless"):
  return Layout(N, 2, scheme, start)


def greedy(prompts, spec=None, stop_id=-1, length=None):
  model, decoder = model_and_params()
  coproc = None
  if spec is not None:
    coproc = make_coprocessor(model, Layout(N, 2, "insert", spec.start))
  tokens, documents = padding.pad_left(prompts, PAD, length)
  run = compiled(spec, stop_id)
  return np.asarray(run(decoder, coproc, tokens, documents)).tolist()


@functools.cache
def compiled(spec, stop_id):
  model, _ = model_and_params()
  return jit(
    functools.partial(
      context.greedy, model, spec=spec, max_new_tokens=NEW, stop_id=stop_id
    )
  )


@functools.cache
def forward():
  """Logits of all rows [T, V] and z, one prompt, padded at its end."""
  model, decoder = model_and_params()
  longest = max(LENGTHS) + N + NEW

  @jit
  def run(x, positions, segments):
    hidden, _ = transformer.prefill(model, decoder, x, positions, segments)
    return transformer.logits(model, decoder, hidden)[0]

  def padded(x, positions):
    """Rows of embeddings [T, D]: no cache is used, and none kept."""
    t = len(x)
    grow = lambda a: np.pad(  # noqa: E731
      a, [(0, longest - t)] + [(0, 0)] * (a.ndim - 1)
    )
    segments = grow(np.ones(t, np.int32))
    where = grow(np.asarray(positions, np.int32))
    return np.asarray(
      run(grow(np.asarray(x))[None], where[None], segments[None])
    )[:t]

  return padded


def embed(ids):
  model, decoder = model_and_params()
  table = np.asarray(decoder["embedder"]["embedding"])
  return table[np.asarray(ids)] * np.float32(model.config.embedding_scale)


@functools.cache
def coprocessor_alone(start, length):
  """z [N, D] of one unpadded prompt, soft tokens at the given positions."""
  model, decoder = model_and_params()
  coproc = make_coprocessor(model, Layout(N, 2, "insert", start))

  @jit
  def run(prompt, copied, positions):
    _, cache = transformer.prefill(model, decoder, prompt)
    soft = coproc["soft_tokens"][None]
    x = soft + copied if start == "harmless" else soft
    z, _ = transformer.extend(model, coproc["transformer"], cache, x, positions)
    if start == "harmless":
      z = copied + z @ coproc["latent_projection"]
    return z[0]

  return run


def naive(prompt, spec=None):
  return list(_naive(tuple(prompt), spec))


@functools.cache
def _naive(prompt, spec):
  """One prompt, each token by a whole pass over [context | z | new]."""
  t = len(prompt)
  x, positions, after = embed(list(prompt)), list(range(t)), t
  if spec is not None:
    insert = spec.positions == "insert"
    first = t if insert else t - N
    at = list(range(first, first + N))
    z = coprocessor_alone(spec.start, t)(
      np.array([prompt]), embed(list(prompt[-N:]))[None], np.array([at])
    )
    assert spec.positions in ("insert", "replace")
    keep = t if insert else t - N
    x = np.concatenate([x[:keep], z])
    positions, after = positions[:keep] + at, at[-1] + 1
  out, margins = [], []
  for _ in range(NEW):
    logits = forward()(x, positions)[-1]
    top = np.sort(logits)[-2:]
    out.append(int(logits.argmax()))
    margins.append(float(top[1] - top[0]))
    x = np.concatenate([x, embed(out[-1:])])
    positions.append(after)
    after += 1
  # A tie would be broken by rounding; these seeds have none.
  assert min(margins) > 1e-3
  return out


def naive_overlay(prompt, spec):
  """Overlay: latents see the whole context, whatever their positions.

  A plain pass is causal by position, so the context's rows come from a cache.
  """
  model, decoder = model_and_params()
  t = len(prompt)
  at = np.arange(t - N, t)
  z = coprocessor_alone(spec.start, t)(
    np.array([prompt]), embed(prompt[-N:])[None], at[None]
  )

  @jit
  def run(x, positions, segments):
    _, cache = transformer.prefill(model, decoder, np.array([prompt]))
    hidden, _ = transformer.extend(
      model, decoder, cache, x, positions, segments
    )
    return transformer.logits(model, decoder, hidden)[0]

  x = np.zeros((1, N + NEW, model.config.width), np.float32)
  x[0, :N] = z
  positions = np.concatenate([at, np.arange(t, t + NEW)])[None]
  out = []
  for i in range(NEW):
    known = (np.arange(N + NEW) < N + i).astype(np.int32)[None]
    logits = np.asarray(run(x, positions, known))[N + i - 1]
    out.append(int(logits.argmax()))
    x[0, N + i] = embed(out[-1])
  return out


def test_without_latents_it_is_a_loop_of_forward_passes():
  """Ragged prompts in one batch, each as if it were alone."""
  expected = [naive(p) for p in prompts()]
  assert greedy(prompts()) == expected
  assert len({tuple(x) for x in expected}) == 3


@pytest.mark.parametrize(
  "scheme, start",
  [
    ("insert", "as_is"),
    ("insert", "harmless"),
    ("replace", "harmless"),
    ("overlay", "harmless"),
  ],
)
def test_with_latents_it_is_a_loop_too(scheme, start):
  spec = spec_of(scheme, start)
  one = naive_overlay if scheme == "overlay" else naive
  expected = [one(p, spec) for p in prompts()]
  assert greedy(prompts(), spec) == expected
  # The latents have their say.
  assert expected != [naive(p) for p in prompts()]


def test_more_padding_changes_nothing():
  spec = spec_of("replace")
  longer = greedy(prompts(), spec, length=12)
  assert longer == [naive(p, spec) for p in prompts()]


def test_a_prompt_of_n_tokens_may_be_replaced_whole():
  spec = spec_of("replace")
  short = prompts()[0][:N]
  context.check_prompts([short], spec)
  assert greedy([short], spec, length=9) == [naive(short, spec)]


def test_stop_token_ends_a_sequence_and_not_the_others():
  free = greedy(prompts())
  stop = free[0][2]
  stopped = greedy(prompts(), stop_id=stop)
  for before, after in zip(free, stopped, strict=True):
    end = before.index(stop) if stop in before else NEW
    assert after == before[:end] + [stop] * (NEW - end)
  assert any(stop not in x for x in free), "all sequences stop"


def test_pad_left():
  tokens, documents = padding.pad_left([[5, 6, 7], [8]], 9, 4)
  assert tokens.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
  assert documents.tolist() == [[-1, 0, 0, 0], [-1, -1, -1, 0]]
  assert tokens.dtype == documents.dtype == np.int32


def test_prompts_that_cannot_be_used_are_refused():
  with pytest.raises(UserError, match="prompt 1 is empty"):
    padding.pad_left([[1], []], PAD)
  with pytest.raises(UserError, match="3 tokens, room for 2"):
    padding.pad_left([[1, 2, 3]], PAD, 2)


@pytest.mark.parametrize("scheme", traces.POSITIONS)
@pytest.mark.parametrize("start", traces.STARTS)
def test_prompts_shorter_than_the_latents_are_refused(scheme, start):
  spec = spec_of(scheme, start)
  context.check_prompts([[1] * N, [1] * 9], spec)
  if (scheme, start) == ("insert", "as_is"):  # stands on no context token
    return context.check_prompts([[1]], spec)
  message = f"prompt 1 has 2 tokens: with latents=3 .*'{scheme}'.*at least 3"
  with pytest.raises(UserError, match=message):
    context.check_prompts([[1] * N, [1, 2]], spec)


def test_last_latent_predicts_and_next_position_follows():
  model, decoder = model_and_params()
  for scheme, expected in (("insert", 9 + N), ("overlay", 9), ("replace", 9)):
    spec = spec_of(scheme)
    coproc = make_coprocessor(model, spec_of("insert"))
    tokens, documents = padding.pad_left(prompts(), PAD)

    @jit
    def run(tokens, spec=spec, documents=documents, coproc=coproc):
      segments = traces.segments_of(documents, True)
      _, cache = transformer.prefill(model, decoder, tokens, segments=segments)
      return context.augment(
        model, decoder, coproc, cache, tokens, documents, spec
      )

    last, cache, position = run(jnp.asarray(tokens))
    assert last.shape == (3, model.config.width)
    assert position.tolist() == [expected] * 3
    filled = np.asarray(cache.segments).astype(bool).sum(1)
    stand_in = 0 if scheme == "replace" else N
    assert filled.tolist() == [n + stand_in for n in LENGTHS]
