"""Latents at any step, for some sequences of a batch: against plain passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from test_generate import (
  PAD,
  N,
  embed,
  forward,
  model_and_params,
  naive,
  prompts,
  spec_of,
)
from tolerances import HIDDEN, close, far, make_coprocessor

from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference import padding
from cacheaug.inference.sampling import Sampling
from cacheaug.inference.session import InsertionSchedule, Session
from cacheaug.model import decode_rows, transformer
from cacheaug.model.static_cache import StaticCache

NEW = 6  # as in test_generate, whose functions these are


@functools.cache
def read():
  model, decoder = model_and_params()
  tokens, documents = padding.pad_left(prompts(), PAD)
  run = tolerances.jit(functools.partial(contexts.read, model))
  return run(decode_rows.unstack_layers(decoder), tokens, documents)


def coproc_of(spec):
  model, _ = model_and_params()
  params = make_coprocessor(model, spec_of("insert", spec.start))
  split = decode_rows.unstack_layers(params["transformer"])
  return {**params, "transformer": split}


def session(spec=None, **options):
  model, decoder = model_and_params()
  coproc = None if spec is None else coproc_of(spec)
  return Session(
    model,
    decode_rows.unstack_layers(decoder),
    read(),
    max_new_tokens=NEW,
    coproc=coproc,
    spec=spec,
    **options,
  )


def say(spec=None, **options):
  """Tokens [3, NEW], and the session at its end."""
  one = session(spec, **options)
  return one.run(NEW), one


def test_decoding_equals_forward_at_every_split():
  """A padded batch: one row at a time, and many rows at once."""
  model, decoder = model_and_params()
  tokens, documents = padding.pad_left(prompts(), PAD)
  segments = (documents >= 0).astype(np.int32)
  positions = np.arange(tokens.shape[1], dtype=np.int32)[None].repeat(3, 0)

  @tolerances.jit
  def whole(params):
    return transformer.prefill(model, params, tokens, segments=segments)

  @functools.partial(tolerances.jit, static_argnames=("split", "step"))
  def parts(params, split, step):
    _, cache = transformer.prefill(
      model, params, tokens[:, :split], segments=segments[:, :split]
    )
    cache, found = StaticCache.of(cache, 13, model.dtype), []
    for t in range(split, tokens.shape[1], step):
      rows = slice(t, t + step)
      hidden, cache = decode_rows.write_rows(
        model,
        params,
        cache,
        transformer.embed(model, params, tokens[:, rows]),
        positions[:, rows],
        segments=segments[:, rows],
        slot=t,
      )
      found.append(hidden)
    return jnp.concatenate(found, 1), cache.stacked()

  expected, kv = whole(decoder)
  apart = decode_rows.unstack_layers(decoder)
  for split, step, params in ((1, 1, apart), (4, 5, decoder), (6, 3, apart)):
    hidden, cache = parts(params, split, step)
    real = segments[:, split:, None]
    close(hidden * real, expected[:, split:] * real, HIDDEN)
    real = segments[None, :, :, None, None]
    close(cache.keys[:, :, :9] * real, kv.keys * real, HIDDEN)
    assert not np.asarray(cache.segments)[:, 9:].any()
  hidden, cache = whole(apart)
  close(hidden, expected, HIDDEN)
  close(cache.values, kv.values, HIDDEN)


@functools.cache
def coprocessor_over(start):
  """z [N, D] over any rows, padded at their end; see test_generate."""
  model, decoder = model_and_params()
  coproc = make_coprocessor(model, spec_of("insert", start))

  @tolerances.jit
  def run(x, positions, segments, copied, at):
    _, cache = transformer.prefill(model, decoder, x, positions, segments)
    rows = coproc["soft_tokens"][None]
    rows = rows + copied if start == "harmless" else rows
    z, _ = transformer.extend(model, coproc["transformer"], cache, rows, at)
    if start == "harmless":
      z = copied + z @ coproc["latent_projection"]
    return z[0]

  return run


def by_hand(prompt, spec, steps):
  """Each token, and each insertion, by whole passes over what is visible."""
  x, positions, text = embed(prompt), list(range(len(prompt))), list(prompt)
  longest = max(map(len, prompts())) + NEW + N * len(steps)
  out = []
  for step in range(NEW):
    if step in steps:
      shift = N if spec.positions == "insert" else 0
      first = positions[-1] + 1 - N + shift
      at, more = np.arange(first, first + N), longest - len(x)
      z = coprocessor_over(spec.start)(
        np.pad(x, ((0, more), (0, 0)))[None],
        np.pad(positions, (0, more)).astype(np.int32)[None],
        (np.arange(longest) < len(x)).astype(np.int32)[None],
        embed(text[-N:])[None],
        at[None],
      )
      keep = len(x) - (N if spec.positions == "replace" else 0)
      x = np.concatenate([x[:keep], z])
      positions = [*positions[:keep], *at.tolist()]
    out.append(int(plain_logits(x, positions, longest).argmax()))
    text.append(out[-1])
    x = np.concatenate([x, embed(out[-1:])])
    positions.append(positions[-1] + 1)
  return out


@functools.cache
def _plain():
  model, decoder = model_and_params()

  @tolerances.jit
  def run(x, positions, segments):
    hidden, _ = transformer.prefill(model, decoder, x, positions, segments)
    return transformer.logits(model, decoder, hidden)[0]

  return run


def plain_logits(x, positions, longest):
  more = longest - len(x)
  segments = (np.arange(longest) < len(x)).astype(np.int32)
  positions = np.pad(positions, (0, more)).astype(np.int32)
  x = np.pad(x, ((0, more), (0, 0)))
  return np.asarray(_plain()(x[None], positions[None], segments[None]))[
    sum(segments) - 1
  ]


@pytest.mark.parametrize(
  "scheme, start, every",
  (
    ("replace", "harmless", 4),
    ("replace", "harmless", 2),  # latents in place of earlier latents
    ("insert", "as_is", 2),
    ("insert", "harmless", 4),
  ),
)
def test_latents_every_few_tokens_as_by_hand(scheme, start, every):
  spec = spec_of(scheme, start)
  steps = list(range(0, NEW, every))
  said, done = say(spec, plan=InsertionSchedule(every=every))
  expected = [by_hand(p, spec, steps) for p in prompts()]
  assert said.tolist() == expected
  assert [x.step for x in done.insertions if x.sequence == 0] == steps
  slots = [x.slot for x in done.insertions if x.sequence == 0]
  assert slots == [9 + NEW + i * N for i in range(len(steps))]
  once, _ = say(spec)
  assert said.tolist() != once.tolist(), "later latents had no say"


def test_latents_later_only():
  spec = spec_of("replace")
  said, done = say(spec, plan=InsertionSchedule(at=(3,)))
  assert said.tolist() == [by_hand(p, spec, [3]) for p in prompts()]
  assert said[:, :3].tolist() == [naive(p)[:3] for p in prompts()]
  assert [x.position for x in done.insertions] == [
    len(p) + 3 - N for p in prompts()
  ]


def test_latents_after_a_token():
  """Only in the sequences that say it, and as often as there is room."""
  spec = spec_of("replace")
  free, _ = say()
  token = int(free[0, 1])
  said, done = say(spec, plan=InsertionSchedule(at=(), after=(token,), most=1))
  first = [
    row.index(token) + 1 if token in row else NEW for row in free.tolist()
  ]
  assert first[0] < NEW
  # Sequences of the first pause, which uses up the room.
  pause = min(first)
  for i, prompt in enumerate(prompts()):
    steps = [pause] if first[i] == pause else []
    assert said[i].tolist() == by_hand(prompt, spec, steps)
    assert [x.step for x in done.insertions if x.sequence == i] == steps
  assert any(step != pause for step in first), "no sequence goes without"


@pytest.mark.parametrize("scheme", ("insert", "overlay", "replace"))
def test_mixed_batch_equals_each_alone_bit_for_bit(scheme):
  """Also with no coprocessor at all: empty slots weigh exactly nothing."""
  spec, plan = spec_of(scheme), InsertionSchedule(every=2)
  on, off = np.array([True, False, True]), np.array([False, True, False])
  runs = {
    name: say(spec, plan=plan, on=mask, scored=True)
    for name, mask in (("mixed", on), ("all", on | True), ("none", on & False))
  } | {"absent": say(scored=True)}

  def bits(name, rows):
    said, done = runs[name]
    state = done.state
    logits = state.nll, state.hidden, state.position
    return [
      said[rows].tobytes(),
      *(np.asarray(x)[rows].tobytes() for x in logits),
    ]

  assert bits("mixed", on) == bits("all", on)
  assert bits("mixed", off) == bits("none", off)
  assert bits("none", on | True) == bits("absent", on | True)
  far(runs["all"][1].state.hidden, runs["none"][1].state.hidden)
  assert runs["none"][0].tolist() == [naive(p) for p in prompts()]
  assert {x.sequence for x in runs["mixed"][1].insertions} == {0, 2}
  assert not runs["none"][1].insertions


def test_a_token_at_a_time_is_the_same():
  spec, plan = spec_of("replace"), InsertionSchedule(every=3)
  whole, _ = say(spec, plan=plan)
  one = session(spec, plan=plan)
  parts = [one.run(1) for _ in range(NEW)]
  assert one.finished and one.run(1).shape == (3, 0)
  np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_nll_is_the_models_own():
  model, decoder = model_and_params()
  said, done = say(scored=True, sampling=Sampling(2.0, top_k=5), seed=3)
  for prompt, new, nll in zip(prompts(), said, done.nll(), strict=True):
    text = [*prompt, *new.tolist()]
    logits = forward()(embed(text), list(range(len(text))))
    lost = -jax.nn.log_softmax(logits)[np.arange(len(text) - 1), text[1:]]
    close(nll, lost[len(prompt) - 1 :], tolerances.NLL)


def test_draws_do_not_depend_on_the_batch():
  law = Sampling(1.5, top_k=20)
  said, _ = say(sampling=law, seed=1)
  np.testing.assert_array_equal(said, say(sampling=law, seed=1)[0])
  assert said.tolist() != say(sampling=law, seed=2)[0].tolist()
  latents, _ = say(
    spec_of("replace"), on=[False, True, True], sampling=law, seed=1
  )
  np.testing.assert_array_equal(latents[0], said[0])
  assert latents[1:].tolist() != said[1:].tolist()


def test_ended_sequences_leave_the_others_alone():
  free, _ = say()
  one = session()
  one.run(2)
  one.end(1)
  rest = one.run(NEW)
  np.testing.assert_array_equal(rest[[0, 2]], free[[0, 2], 2:])
  assert (rest[1] == -1).all() and one.done.tolist() == [False, True, False]
  one = session(stop_ids=(int(free[0, 0]),))
  one.run(1)
  for i in (1, 2):
    one.end(i)
  assert one.finished


@pytest.mark.parametrize(
  "changes, message",
  (
    (dict(at=(-1,)), "at="),
    (dict(every=-2), "every=-2 must be 0"),
    (dict(most=0), "most=0 must be at least 1"),
  ),
)
def test_plans_that_are_none(changes, message):
  with pytest.raises(UserError, match=message):
    InsertionSchedule(**changes)


def test_plan():
  assert InsertionSchedule().steps(5) == [0]
  assert InsertionSchedule(every=3).steps(7) == [0, 3, 6]
  assert InsertionSchedule(at=(5, 2), every=0).steps(5) == [2]
  assert InsertionSchedule(at=(), every=9).steps(5) == []
  assert InsertionSchedule(every=3, after=(7,), most=2).room(7) == 5


def test_bfloat16():
  """The cache has the model's type; rows join it without a promotion."""
  model, decoder = model_and_params()
  half = type(model)(model.config, dtype=jnp.bfloat16)
  context = read()
  context = context.replace(hidden=context.hidden.astype(jnp.bfloat16))
  spec = spec_of("replace")
  coproc = make_coprocessor(model, spec_of("insert"))
  one = Session(
    half, decoder, context, max_new_tokens=2, coproc=coproc, spec=spec
  )
  assert one.run(2).shape == (3, 2)
  assert {x.dtype.name for x in one.state.cache.keys} == {"bfloat16"}
