"""Traces of several rounds: in parallel = by the passes one by one = decoding.

Sequences and model are those of packed.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from cases import slow_but
from packed import DOCUMENTS, STARTS_AT, S, note
from tolerances import (
  GRADIENT,
  LOSS,
  NLL,
  close,
  close_trees,
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug import config as configs
from cacheaug import flops, step, validate
from cacheaug.augment import objective, rounds
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference import engine, padding
from cacheaug.inference.session import InsertionSchedule, Session
from cacheaug.model import transformer
from cacheaug.projects.background.worker import Worker
from cacheaug.projects.speed import dense_reference

N, A = 3, 3
# Of the trace after 8 three tokens are left in its document, the first round's
# alone where k >= 3. Prefixes of 9, 4, 6 and 5 tokens.
POINTS = np.array([[-1, 8, 15], [5, 19, -1]], np.int32)
CASES = [  # scheme, start, rounds, stride
  ("insert", "harmless", 2, 2),
  ("overlay", "harmless", 2, 2),
  ("replace", "harmless", 3, 2),  # later latents replace earlier ones
  ("replace", "harmless", 2, 5),  # and only tokens
  ("replace", "as_is", 2, 0),
  ("insert", "as_is", 2, 0),
]
cases = pytest.mark.parametrize(
  "scheme, start, count, stride", slow_but(CASES, quick=(0, 2, 4))
)


@functools.cache
def setup(scheme, start, count, stride):
  spec = Layout(N, A, scheme, start, rounds=count, stride=stride)
  model = make_model()
  coproc = make_coprocessor(model, Layout(N, A, "insert", start))
  return model, spec, make_params(model), coproc, tokens_of(model, 2, S)


def loss_of(nll, weights):
  return (nll * weights).sum() / weights.sum()


@functools.cache
def parallel(*case):
  """(nll [B, M, T], weights), loss and gradients, the way training goes."""
  model, spec, decoder, coproc, tokens = setup(*case)

  @jit
  def run(coproc):
    laid = rounds.layout_traces(tokens, DOCUMENTS, POINTS, spec)

    def loss(coproc):
      _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)
      nll = objective.traces_nll(model, decoder, coproc, cache, laid)
      return loss_of(nll, laid.weights), (nll, laid.weights)

    return jax.value_and_grad(loss, has_aux=True)(coproc)

  (loss, found), grads = run(coproc)
  return jax.device_get((found, loss, grads))


@functools.cache
def prompts(reach):
  """Every trace as a prompt of its own [b m], and what comes after it."""
  tokens, found, after = tokens_of(make_model(), 2, S), [], []
  for b, m in np.argwhere(POINTS >= 0):
    p = POINTS[b, m]
    found.append(tokens[b, STARTS_AT[DOCUMENTS[b, p]] : p + 1].tolist())
    after.append(np.resize(tokens[b, p + 1 : p + 1 + reach], reach))
  return (*padding.pad_left(found, 0), np.stack(after))


def in_order(x):
  """[B, M, T] -> [b m, T], as `prompts`."""
  return np.asarray(x)[POINTS >= 0]


@functools.cache
def one_by_one(*case):
  """nll, loss and gradients by plain passes, each over a cache of its own."""
  model, spec, decoder, _, _ = setup(*case)
  tokens, documents, after = prompts(spec.tokens_predicted)
  weights = in_order(parallel(*case)[0][1])
  b, s = tokens.shape

  def hide(cache, alive):
    seen = jnp.asarray(alive, jnp.int32)[None]
    return cache.replace(segments=cache.segments * seen)

  def loss(coproc):
    positions = np.broadcast_to(np.arange(s, dtype=np.int32)[None], (b, s))
    segments = (documents >= 0).astype(np.int32)
    _, cache = transformer.prefill(model, decoder, tokens, positions, segments)
    alive, text, nll = [True] * s, tokens, []
    at = list(range(s))  # the position of each slot
    for i in range(spec.rounds):
      first = len(text[0]) - N
      if case[0] == "insert":
        first += N * (i + 1)
      here = np.arange(first, first + N, dtype=np.int32)
      places = np.broadcast_to(here[None], (b, N))
      copied = transformer.embed(model, decoder, text[:, -N:])
      soft = coproc["soft_tokens"][None]
      harmless = case[1] == "harmless"
      x = soft + copied if harmless else jnp.broadcast_to(soft, copied.shape)
      z, _ = transformer.extend(
        model, coproc["transformer"], hide(cache, alive), x, places
      )
      if harmless:
        z = copied + z @ coproc["latent_projection"]
      if case[0] == "replace":
        alive = [y and p < first for y, p in zip(alive, at, strict=True)]
      last = i == spec.rounds - 1
      told = spec.stride * i
      new = after[:, told : told + (spec.ahead if last else spec.stride)]
      fed = transformer.embed(model, decoder, new[:, : -1 if last else None])
      x = jnp.concatenate([z, fed], 1)
      here = np.arange(first, first + x.shape[1], dtype=np.int32)
      hidden, own = transformer.extend(
        model,
        decoder,
        hide(cache, alive),
        x,
        np.broadcast_to(here[None], (b, len(here))),
      )
      cache, alive = cache.concat(own), alive + [True] * len(here)
      at += here.tolist()
      if new.size:
        hidden = hidden[:, N - 1 : N - 1 + new.shape[1]]
        logp = jax.nn.log_softmax(transformer.logits(model, decoder, hidden))
        nll.append(-jnp.take_along_axis(logp, new[..., None], -1)[..., 0])
      text = np.concatenate([text, new], 1)
    nll = jnp.concatenate(nll, 1)
    return loss_of(nll, weights), nll

  (value, nll), grads = jit(jax.value_and_grad(loss, has_aux=True))(
    setup(*case)[3]
  )
  return jax.device_get((nll, value, grads))


def decoded(*case, every=None, forced_suffix=None):
  """nll [b m, T], tokens forced, latents as a schedule of every=k puts them."""
  model, spec, decoder, coproc, _ = setup(*case)
  tokens, documents, after = prompts(spec.tokens_predicted)
  after = after if forced_suffix is None else forced_suffix
  b, count = len(tokens), 0
  context = jit(lambda: contexts.read(model, decoder, tokens, documents))()
  state = engine.start(
    model,
    context,
    jax.random.split(jax.random.key(0), b),
    max_new_tokens=spec.tokens_predicted,
    latents=N * spec.rounds,
  )
  stride = spec.stride if every is None else every
  for i in range(spec.rounds):
    state = engine.decode(
      model, decoder, state, stride * i, scored=True, forced=after
    )
    on = np.ones(b, bool)
    state = engine.insert_latents(
      model, decoder, coproc, state, count, on, spec
    )
    count += 1
  state = engine.decode(
    model, decoder, state, spec.tokens_predicted, scored=True, forced=after
  )
  np.testing.assert_array_equal(state.generated, after)
  return np.asarray(state.nll)


@cases
def test_training_is_one_round_after_another(scheme, start, count, stride):
  case = scheme, start, count, stride
  (nll, weights), loss, grads = parallel(*case)
  expected, whole, expected_grads = one_by_one(*case)
  spec = setup(*case)[1]
  assert nll.shape == (2, 3, spec.tokens_predicted)
  left = np.array([3, 12, 9, 7])  # tokens of each one's document
  inside = np.arange(spec.tokens_predicted)[None] < left[:, None]
  np.testing.assert_array_equal(in_order(weights), inside)
  there = in_order(weights) > 0
  note("nll", close(in_order(nll)[there], expected[there], NLL))
  note("loss", close(loss, whole, LOSS))
  note("gradients", close_trees(grads, expected_grads, GRADIENT))


@cases
def test_training_is_what_decoding_does(scheme, start, count, stride):
  """every=stride: latents at p, p + k .. while the text is forced."""
  case = scheme, start, count, stride
  (nll, weights), _, _ = parallel(*case)
  there = in_order(weights) > 0
  expected = decoded(*case)
  note("nll", close(in_order(nll)[there], expected[there], NLL))
  # One token later is something else: the equality shows something.
  far(decoded(*case, every=stride + 1)[there], expected[there])


def test_later_rounds_read_the_earlier_latents():
  """Gradient into z of round 1 by way of round 2 alone."""
  case = ("replace", "harmless", 2, 0)
  model, spec, decoder, coproc, tokens = setup(*case)

  @jit
  def gradient(coproc):
    laid = rounds.layout_traces(tokens, DOCUMENTS, POINTS, spec)
    # Of the first round's rows the decoder's second pass sees none.
    assert not rounds.masks(spec, 1)[1][N:, :N].any()
    assert rounds.masks(spec, 1)[0][N:, :N].all()
    _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)

    def nll(extra):
      first = laid.rounds[0]
      moved = laid.replace(
        rounds=(first.replace(input_tokens=extra), laid.rounds[1])
      )
      return objective.traces_nll(model, decoder, coproc, cache, moved)

    other = (laid.rounds[0].input_tokens + 1) % model.config.vocab_size
    return nll(laid.rounds[0].input_tokens), nll(other)

  same, other = gradient(coproc)
  far(same, other)


# --- the layout -------------------------------------------------------------


def picture(spec, i, reading):
  """A mask of round i over a context `a b c d`, the point being b."""
  labels = []
  for j in range(i + 1):
    word = "bcd"[spec.stride * j]
    labels += [
      f"{word}'",
      *"cdef"[spec.stride * j :][: rounds.tokens_fed(spec, j)],
    ]
  order = rounds.masks(spec, i)[not reading]
  hides = spec.positions == "replace" and (i or not reading)
  context = np.tile(np.arange(4) < (1 if hides else 2), (len(order), 1))
  q = order.shape[0] - 1 if reading else 0
  labels = [*labels[: len(order) - 1], str(i + 1)] if reading else labels
  mask = np.concatenate([context, order], 1)[q:]
  cells = [["#" if seen else "" for seen in row] for row in mask]
  rows = [[a, *row] for a, row in zip(labels[q:], cells, strict=True)]
  return ["", *"abcd", *labels], rows


def test_docstring_draws_the_masks():
  """Marks of each picture, row by row, are those of the masks."""
  drawn = [
    part.splitlines()
    for part in rounds.__doc__.split("\n\n")
    if part.strip().startswith("a b c d |")
  ]
  assert len(drawn) == 3

  def marks(line):
    name, rest = line.split()[0], line[line.index(line.split()[0]) + 2 :]
    return name, rest.count("#")

  for part, scheme in zip(drawn[:2], ("insert", "replace"), strict=True):
    spec = Layout(1, 2, scheme, rounds=2, stride=1)
    _, rows = picture(spec, 1, False)
    # Each round's own: the first one's rows are in its own pass.
    _, first = picture(spec, 0, False)
    expected = [(r[0], r.count("#")) for r in first[:2] + rows[2:]]
    assert [marks(line) for line in part[1:]] == expected
    assert part[0].split() == [
      "a",
      "b",
      "c",
      "d",
      "|",
      "b'",
      "c",
      "|",
      "c'",
      "d",
    ]
  spec = Layout(1, 2, "replace", rounds=2, stride=1)
  rows = [picture(spec, i, True)[1][-1] for i in range(2)]
  assert [marks(x) for x in drawn[2][1:]] == [
    (r[0], r.count("#")) for r in rows
  ]


def test_reaching_is_as_far_as_asked():
  spec = Layout(N, A, rounds=3, stride=4)
  assert spec.tokens_predicted == 11
  for tokens in (1, 4, 5, 8, 9, 32):
    some = spec.with_horizon(tokens)
    assert (
      some.tokens_predicted == tokens and some.ahead >= 1 and some.rounds <= 3
    )
    assert some.rounds == 1 + sum(4 * i < tokens for i in (1, 2))
  once = Layout(N, A, rounds=3).with_horizon(5)
  assert (once.rounds, once.tokens_predicted) == (3, 5)


# --- in training ------------------------------------------------------------


def steps_of(tmp_path, **changes):
  config = small_runs.get_config(str(tmp_path))
  config.traces.update(changes)
  return small_runs.Steps(config)


@pytest.mark.slow
def test_training_takes_rounds(tmp_path):
  """At the harmless start none changes what the frozen decoder says."""
  again = steps_of(tmp_path, rounds=2, stride=3)
  batch = again.batches.at(0)
  batch = step.add_points(again.config, batch, again.key, 0)
  spec = configs.layout_of(again.config)

  @jit
  def frozen(batch):
    args = again.model, again.decoder, batch, batch["points"], spec
    return objective.frozen_loss(*args)

  nll, tokens = frozen(batch)
  assert tokens.shape == (7,) and tokens[0] > tokens[-1] > 0
  losses = again.take(3)
  assert abs(losses[0] - nll.sum() / tokens.sum()) < 1e-3
  assert again.state.nll.shape == (7,)
  assert np.abs(again.state.params["latent_projection"]).max() > 1e-3
  halves = steps_of(tmp_path, rounds=2, stride=3)
  halves.config.optimizer.accumulation = 2
  np.testing.assert_allclose(
    small_runs.Steps(halves.config).take(2), losses[:2], rtol=1e-5
  )


@pytest.mark.parametrize(
  "changes, said",
  [
    (dict(rounds=0), "traces.rounds=0 must be at least 1"),
    (dict(rounds=2, stride=-1), "traces.stride=-1"),
    (dict(stride=3), "traces.stride=3 is between rounds"),
    (dict(rounds=2, late_max=1), "cannot come late"),
    (dict(rounds=4, stride=9), "traces.rounds=4.*needs sequences of 33"),
    (dict(rounds=2, min_ahead=5), "traces.min_ahead=5 exceeds the 4 tokens"),
  ],
)
def test_impossible_rounds_are_refused(tmp_path, changes, said):
  config = small_runs.get_config(str(tmp_path))
  config.traces.update(changes)
  with pytest.raises(UserError, match=said):
    validate.check_config(config, 1)


def test_inserted_rounds_need_positions(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  config.coprocessor.positions, config.traces.rounds = "insert", 17
  with pytest.raises(
    UserError, match="latents=2 x traces.rounds=17.*64 positions"
  ):
    validate.check_model(config, configs.model_of(config))


def test_other_ways_refuse_rounds():
  _, spec, _, _, tokens = setup(*CASES[0])
  with pytest.raises(UserError, match="cannot come late"):
    rounds.layout_traces(tokens, DOCUMENTS, POINTS, spec, 0 * POINTS)
  batch = {"tokens": tokens, "documents": DOCUMENTS}
  with pytest.raises(UserError, match="no dense way"):
    dense_reference.naive_loss(None, None, None, batch, POINTS, spec)
  with pytest.raises(UserError, match="computes one round"):
    Worker(None, {}, Layout(N, A, rounds=2))


@pytest.mark.parametrize("stride", [0, 2, 5])
def test_flop_are_of_every_round(stride):
  """By enumeration of who sees whom of a trace's own rows."""
  spec = Layout(N, A, "insert", rounds=3, stride=stride)
  model = make_model().config
  common = dict(batch=1, sequence=S, traces=2, latents=N, ahead=A)
  sizes = flops.Sizes(**common, rounds=3, stride=stride)
  one = flops.Sizes(**common)
  assert sizes.tokens_predicted == spec.tokens_predicted
  # A block counts as N + A rows: the last one is predicted only.
  assert sizes.decoder_rows == 2 * (len(rounds.offsets(spec, 2)) + 1)
  own = 0
  for i in range(3):
    reading, decoding = rounds.masks(spec, i)
    own += (
      reading[-N:].sum() + decoding[-N - rounds.tokens_fed(spec, i) :].sum()
    )
  own += len(decoding) + 1  # of the row that is only predicted
  per_row = sum(flops._context_attention(model, S)) / S  # noqa: SLF001
  pair = flops.attention_per_pair(model)
  rows = sizes.latent_rows + sizes.decoder_rows
  context = flops.context_pass(model, sizes).attention
  assert flops.useful(model, sizes).attention == pytest.approx(
    context + 3 * (rows * per_row + 2 * own * pair)
  )
  ratio = flops.useful(model, sizes).logits / flops.useful(model, one).logits
  assert ratio == pytest.approx(spec.tokens_predicted / A)


# --- in decoding ------------------------------------------------------------


def test_sessions_insert_as_trained():
  """before=... ends a chain at the prompt's end; rounds at one point."""
  for case in (CASES[2], CASES[4]):
    model, spec, decoder, coproc, _ = setup(*case)
    tokens, documents, after = prompts(spec.tokens_predicted)
    told = spec.tokens_predicted - spec.ahead
    read = jit(functools.partial(contexts.read, model))
    context = read(decoder, tokens, documents)
    before = tuple({told - spec.stride * i for i in range(spec.rounds)} - {0})
    session = Session(
      model,
      decoder,
      context,
      max_new_tokens=spec.ahead,
      coproc=coproc,
      spec=spec,
      plan=InsertionSchedule(before=before, rounds=spec.rounds_per_point),
      forced_suffix=after[:, :told],
      scored=True,
    )
    said = session.run(1)
    assert session.nll().shape == (len(tokens), 1) == said.shape
    steps = [x.step for x in session.insertions if x.sequence == 0]
    assert steps == [spec.stride * i - told for i in range(spec.rounds)]
    own = after.copy()
    own[:, told] = said[:, 0]
    same = decoded(*case, forced_suffix=own)
    close(session.nll()[:, 0], same[:, told], NLL)


def test_a_trained_coprocessor_says_how_often():
  spec = Layout(N, A, rounds=2, stride=4)
  assert InsertionSchedule.trained(spec) == InsertionSchedule(every=4)
  assert InsertionSchedule.trained(Layout(N, A, rounds=3)) == InsertionSchedule(
    rounds=3
  )
  assert InsertionSchedule.trained(Layout(N, A)) == InsertionSchedule()
  plan = InsertionSchedule(at=(0,), before=(8, 4), rounds=2)
  assert plan.room(5) == 6 and plan.forced_tokens == 8 and plan.first(5) == -8
  for wrong in (dict(before=(0,)), dict(rounds=0)):
    with pytest.raises(UserError, match="1 or more|at least 1"):
      InsertionSchedule(**wrong)
