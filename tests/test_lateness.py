"""Latents that come late: one trace at a time = in parallel = dense mask.

As test_objective.py, but the coprocessor has read up to d tokens less than the
decoder when its latents are inserted.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from cases import slow_but
from packed import (
  DOCUMENTS,
  STARTS_AT,
  A,
  S,
  layout_traces,
  note,
  one_at_a_time,
  setup,
  with_gradient,
)
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
  save_coprocessor,
  tokens_of,
)

from cacheaug import step, validate
from cacheaug.augment import (
  coprocessor,
  dense_masks,
  drawing,
  objective,
  traces,
)
from cacheaug.augment.point_sampling import Draw, sample_late, sample_points
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import attention, transformer
from cacheaug.projects.speed import dense_reference
from cacheaug.weights import coprocessor_files

N = 4
POINTS = np.array([[-1, 8, 20], [12, 14, 23]], np.int32)
# 14 is its document's end, so its trace weighs nothing; 23 - 15 + 1 = 9 tokens
# are up to 23, so that it may come 5 late and no more.
LATE = np.array([[0, 3, 3], [8, 4, 5]], np.int32)


def lay(tokens, spec, late=LATE, points=POINTS):
  return layout_traces(tokens, spec, points, late)


# --- the layout -------------------------------------------------------------


@pytest.mark.parametrize("scheme", traces.POSITIONS)
def test_pass_2_is_of_the_earlier_point_and_pass_3_of_the_later(scheme):
  """Every row of a late trace is a row of one of two on-time traces."""
  spec, tokens = Layout(N, A, scheme), tokens_of(make_model(), 2, S)
  late = lay(tokens, spec)
  here = lay(tokens, spec, None)
  earlier = lay(tokens, spec, None, np.where(POINTS < 0, -1, POINTS - LATE))
  for name in ("latent_rows", "input_tokens"):
    pairs = zip(
      jax.tree.leaves(getattr(late, name)),
      jax.tree.leaves(getattr(earlier, name)),
      strict=True,
    )
    for a, b in pairs:
      np.testing.assert_array_equal(a, b)
  for name in ("rows", "ahead", "targets", "weights"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(late, name), getattr(here, name)
    )
  np.testing.assert_array_equal(late.base_tokens, here.input_tokens)
  assert here.base_tokens is None
  assert (np.asarray(late.input_tokens) != np.asarray(here.input_tokens)).any()


@pytest.mark.parametrize("scheme", traces.POSITIONS)
@pytest.mark.parametrize("together", [False, True])
def test_fast_masks_are_the_dense_masks(scheme, together):
  spec = Layout(N, A, scheme, mask_documents=not together)
  tokens = tokens_of(make_model(), 2, S)

  @jit
  def fast():
    laid = traces.layout_traces(tokens, DOCUMENTS, POINTS, spec, LATE)
    segments = traces.segments_of(DOCUMENTS, spec.mask_documents)
    positions = jnp.broadcast_to(jnp.arange(S)[None], (2, S))
    nothing = jnp.zeros((1, 2, S, 1, 1))
    cache = transformer.KVCache(nothing, nothing, positions, segments)
    return [
      mask
      for rows in (laid.latent_rows, laid.rows)
      for mask in (
        attention.context_mask(rows, cache, None),
        attention.block_mask(rows, None),
      )
    ]

  reading, reading_own, seen, own = map(np.asarray, fast())
  for b in range(2):
    # A trace that is none (point -1) has rows that nothing reads.
    some = [m for m in range(3) if POINTS[b, m] >= 0]
    points, late = POINTS[b, some], LATE[b, some]
    latents = dense_masks.dense_latent_mask(DOCUMENTS[b], points, spec, late)
    decoder = dense_masks.dense_mask(DOCUMENTS[b], points, spec)[S:]
    for context, block, dense, n in (
      (reading, reading_own, latents, N),
      (seen, own, decoder, spec.rows),
    ):
      expected = np.zeros_like(dense)
      for i, m in enumerate(some):
        run = slice(i * n, i * n + n)
        expected[run, :S] = context[b, m]
        expected[run, S + i * n : S + i * n + n] = block[b, m]
      np.testing.assert_array_equal(dense, expected)
    on_time = dense_masks.dense_latent_mask(DOCUMENTS[b], points, spec)
    assert (on_time != latents).any()


PICTURE = """\
the coprocessor, 1 late
     position a b c x d e f g | c'1 c'2 | f'1 f'2
c'1  2        # #               #
c'2  3        # #               #   #
f'1  6                # #                 #
f'2  7                # #                 #   #
"""


def test_command_draws_what_the_coprocessor_reads(capsys):
  args = ["--latents=2", "--text=a b c x | d e f g", "--points=2,6"]
  assert drawing.main([*args, "--late=1"]) == 0
  out = capsys.readouterr().out
  assert out.endswith(PICTURE)
  # All before it is the on-time picture.
  assert drawing.main(args) == 0
  on_time = capsys.readouterr().out
  assert out == on_time + "\n" + PICTURE
  for late, said in ((3, "at most 2 words late"), (-1, "--late=-1")):
    assert drawing.main([*args, f"--late={late}"]) == 1
    assert said in capsys.readouterr().err


# --- the same numbers three ways --------------------------------------------


@functools.cache
def parallel(start):
  model, spec, decoder, _, tokens = setup(N, start)

  @with_gradient
  def nll(coproc, laid):
    _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)
    return objective.traces_nll(model, decoder, coproc, cache, laid)

  return nll


@functools.cache
def alone(start):
  """One trace by itself, from two prefixes: what was read, what is there."""
  model, _, decoder, _, _ = setup(N, start)

  @with_gradient
  def nll(coproc, prefix, ahead, targets, first_latent, first_ahead, read, cut):
    _, cache = transformer.prefill(model, decoder, read)
    copied = transformer.embed(model, decoder, read[:, -N:])
    soft = coproc["soft_tokens"][None]
    rows = soft + copied if start == "harmless" else soft
    at = (first_latent + jnp.arange(N))[None]
    z, _ = transformer.extend(
      model,
      coproc["transformer"],
      cache,
      rows,
      at - (prefix.shape[1] - read.shape[1]),
    )
    if start == "harmless":
      again = transformer.embed(model, decoder, prefix[:, -N:])
      z = again + z @ coproc["latent_projection"]
    keep = prefix.shape[1] - (N if cut else 0)
    _, cache = transformer.prefill(model, decoder, prefix[:, :keep])
    fed = transformer.embed(model, decoder, ahead)
    after = (first_ahead + jnp.arange(A - 1))[None]
    hidden, _ = transformer.extend(
      model,
      decoder,
      cache if keep else None,
      jnp.concatenate([z, fed], 1),
      jnp.concatenate([at, after], 1),
    )
    logits = transformer.logits(model, decoder, hidden[:, N - 1 :])
    return -jax.nn.log_softmax(logits)[0][jnp.arange(A), targets]

  return nll


def dense(start, scheme):
  """All traces' rows in one block under a dense mask: a peer's way."""
  model, spec, decoder, coproc, tokens = setup(N, start, scheme)
  batch = {"tokens": tokens, "documents": DOCUMENTS, "late": LATE}

  @jit
  def run(coproc):
    def loss(coproc):
      nll, count = dense_reference.cached_dense_loss(
        model, decoder, coproc, batch, POINTS, spec
      )
      return nll.sum() / count.sum()

    return jax.value_and_grad(loss)(coproc)

  return run(coproc)


@pytest.mark.parametrize(
  "start, scheme",
  slow_but(
    [
      *(("harmless", scheme) for scheme in traces.POSITIONS),
      ("as_is", "insert"),
    ],
    quick=(2,),
  ),
)
def test_parallel_equals_one_at_a_time_equals_dense(start, scheme):
  _, spec, _, coproc, tokens = setup(N, start, scheme)
  laid = lay(tokens, spec)
  w = laid.weights / laid.weights.sum()
  loss, nll, grads = parallel(start)(coproc, w, laid)
  single, nlls, single_grads = one_at_a_time(
    alone(start), coproc, tokens, spec, POINTS, LATE
  )
  assert len(nlls) == 4 and laid.weights.sum() == 12
  note("loss, one at a time", close(loss, single, LOSS))
  for (b, m), expected in nlls.items():
    got = np.asarray(nll)[b, m][np.asarray(laid.weights)[b, m] > 0]
    note("nll, one at a time", close(got, expected, NLL))
  note("gradients, one at a time", close_trees(grads, single_grads, GRADIENT))
  whole, whole_grads = dense(start, scheme)
  note("loss, dense", close(loss, whole, LOSS))
  note("gradients, dense", close_trees(grads, whole_grads, GRADIENT))
  # On time it is another number: the equalities show something.
  on_time = parallel(start)(coproc, w, lay(tokens, spec, 0 * LATE))
  far(loss, on_time[0])


@pytest.mark.parametrize("scheme", traces.POSITIONS)
def test_a_lateness_of_zero_is_none(scheme):
  """Bit for bit in the layout; XLA may fuse the rest otherwise."""
  _, spec, _, coproc, tokens = setup(N, "harmless", scheme)
  zero, none = lay(tokens, spec, 0 * LATE), lay(tokens, spec, None)
  np.testing.assert_array_equal(zero.base_tokens, none.input_tokens)
  zero = zero.replace(base_tokens=None)
  jax.tree.map(np.testing.assert_array_equal, zero, none)


@pytest.mark.parametrize("start", slow_but(traces.STARTS, quick=(1,)))
def test_nothing_between_reaches_the_coprocessor(start):
  """d z / d embedding of any token, and what the predictions depend on.

  With 'replace' and as_is, late latents stand in place of tokens that they have
  not read and do not repeat: nothing says those to the decoder.
  """
  points, late = np.array([[6, 20]], np.int32), np.array([[2, 4]], np.int32)
  documents = DOCUMENTS[:1]
  model = make_model(tied_head=False).clone(attention=Kernel("plain"))
  spec = Layout(2, A, "replace", start)
  decoder, coproc = make_params(model), make_coprocessor(model, spec)
  # All tokens differ and the head is untied: row t of the embedding's gradient
  # is the influence of token t and of nothing else.
  tokens = np.random.default_rng(0).permutation(37)[None, :S].astype(np.int32)
  laid = jit(
    lambda: traces.layout_traces(tokens, documents, points, spec, late)
  )()

  @jit
  def influences(table):
    def outputs(table):
      params = decoder | {"embedder": {"embedding": table}}
      _, cache = objective.context_pass(model, params, tokens, documents, spec)
      copied, _ = objective.embedded(model, params, laid)
      return coprocessor.outputs(model, coproc, cache, laid, copied)[0]

    def nll(table):
      params = decoder | {"embedder": {"embedding": table}}
      _, cache = objective.context_pass(model, params, tokens, documents, spec)
      return objective.traces_nll(model, params, coproc, cache, laid)[0]

    # Squares: the sum after a norm hardly moves.
    one = lambda f, m: jax.grad(lambda t: (f(t)[m] ** 2).sum())(table)  # noqa: E731
    return [[one(f, m) for m in range(2)] for f in (outputs, nll)]

  found = influences(decoder["embedder"]["embedding"])
  for m, (p, d) in enumerate(zip(points[0], late[0], strict=True)):
    begin = STARTS_AT[documents[0, p]]
    by_outputs, by_nll = (
      (np.abs(grads[m]).max(-1)[tokens[0]] > 0).tolist() for grads in found
    )
    assert by_outputs == [begin <= t <= p - d for t in range(S)]
    lost = range(max(p - 2, p - d) + 1, p + 1) if start == "as_is" else ()
    assert by_nll == [
      begin <= t <= p + A - 1 and t not in lost for t in range(S)
    ]


# --- the law ----------------------------------------------------------------


def test_lateness_is_uniform_and_stays_in_the_document():
  spec, draw = Layout(3, 2), Draw(6, min_ahead=2)
  keys = jax.random.split(jax.random.key(2), 3000)

  @jit
  def many(keys):
    def one(key):
      points = sample_points(key, DOCUMENTS, spec, draw)
      late = sample_late(key, DOCUMENTS, points, spec, 4)
      return points, late

    return jax.vmap(one)(keys)

  points, late = map(np.asarray, many(keys))
  assert (points[:, 1] >= 0).all() and late.min() == 0 and late.max() == 4
  for b in range(2):
    begin = np.vectorize(lambda p, b=b: STARTS_AT[DOCUMENTS[b, p]])(
      points[:, b]
    )
    room = points[:, b] - begin - 2  # of a point with 3 tokens up to it: none
    assert (late[:, b] <= room).all()
    free = late[:, b][room >= 4]
    counts = np.bincount(free, minlength=5) / len(free)
    # 10,000 draws: five standard deviations are 0.02.
    np.testing.assert_allclose(counts, 0.2, atol=0.02)
    for short in range(4):  # cut off, not redrawn
      some = late[:, b][room == short]
      np.testing.assert_allclose(
        (some == short).mean(), 1 - short / 5, atol=0.1
      )
  nothing = np.full((1, 2), -1, np.int32)
  none = sample_late(keys[0], DOCUMENTS[:1], nothing, spec, 4)
  assert none.tolist() == [[0, 0]]


def test_training_draws_lateness_and_no_other_points(tmp_path):
  on_time = small_runs.Steps(small_runs.get_config(str(tmp_path)))
  config = small_runs.get_config(str(tmp_path))
  config.traces.late_max = 3
  late = small_runs.Steps(config)
  batch = on_time.batches.at(0)
  drawn = step.add_points(config, batch, on_time.key, 0)
  plain = step.add_points(on_time.config, batch, on_time.key, 0)
  np.testing.assert_array_equal(drawn["points"], plain["points"])
  assert "late" not in plain and 0 < np.asarray(drawn["late"]).max() <= 3
  other = step.add_points(config, batch, on_time.key, 1)
  assert (np.asarray(other["late"]) != np.asarray(drawn["late"])).any()
  a, b = on_time.take(3), late.take(3)
  # At the harmless start latents say nothing, late or not.
  assert abs(a[0] - b[0]) < LOSS and abs(a[2] - b[2]) > LOSS


def test_accumulation_splits_lateness_with_its_rows(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  config.traces.late_max = 3
  whole = small_runs.Steps(config).take(2)
  config.optimizer.accumulation = 2
  np.testing.assert_allclose(small_runs.Steps(config).take(2), whole, rtol=1e-5)


@pytest.mark.parametrize(
  "value, said",
  [(-1, "traces.late_max=-1"), (30, "traces.late_max=30.*at most 29")],
)
def test_impossible_lateness_is_refused(tmp_path, value, said):
  config = small_runs.get_config(str(tmp_path))
  config.traces.late_max = value
  with pytest.raises(UserError, match=said):
    validate.check_config(config, 1)
  config.traces.late_max = 29
  validate.check_config(config, 1)


def test_exports_say_it_and_older_ones_need_not(tmp_path):
  model = make_model(attention_softcap=0.0, final_softcap=0.0)
  spec, draw = Layout(2, A), Draw(late_max=5)
  save_coprocessor(tmp_path, model, spec, draw=draw)
  assert coprocessor_files.load_coprocessor(tmp_path)[3]["draw"] == draw
  path = tmp_path / "config.json"
  entries = json.loads(path.read_text())
  assert entries.pop("late_max") == 5
  path.write_text(json.dumps(entries))
  older = coprocessor_files.load_coprocessor(tmp_path)
  assert (older[1], older[3]["draw"]) == (spec, Draw())
