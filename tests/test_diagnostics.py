"""Interventions, geometry, attention and nearest tokens, from definitions."""

import dataclasses
import functools
import itertools
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import DOCUMENTS, S, setup
from tolerances import ATTENTION, NLL, close, far, jit, make_coprocessor

from cacheaug.augment import objective, traces
from cacheaug.augment.point_sampling import valid_points
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, diagnose, latent_stats, perplexity
from cacheaug.evals.latent_stats import MEAN, NOTHING, RIGHT, ZEROED
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import attention, decode_rows, layers, transformer

N = 4


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
  """The package's programs as it compiles them, but for optimisation."""
  programs = [
    (latent_stats, "contributions"),
    (latent_stats, "latents_nll"),
    (latent_stats, "mass_sums"),
    (perplexity, "both_nll"),
    (perplexity, "plain_nll"),
  ]
  with pytest.MonkeyPatch.context() as patch:
    for module, name in programs:
      plain = getattr(module, name).__wrapped__
      static = {"model", "spec", "context"} & {*signature(plain).parameters}
      quick = jit(plain, static_argnames=sorted(static))
      patch.setattr(module, name, quick)
    yield


@functools.cache
def latents(start="harmless", scheme="replace"):
  """(model, spec, decoder, coproc, text, placed, contributed, valid)."""
  model, spec, decoder, coproc, tokens = setup(N, start, scheme)
  text = {"tokens": tokens, "documents": DOCUMENTS}
  place, out = latent_stats.contributions(
    model, decoder, coproc, tokens, DOCUMENTS, spec=spec
  )
  valid = np.asarray(valid_points(DOCUMENTS, spec))
  return model, spec, decoder, coproc, text, place, out, valid


def nll_of(z, start="harmless", scheme="replace"):
  model, spec, decoder, _, text, *_ = latents(start, scheme)
  return np.asarray(
    latent_stats.latents_nll(model, decoder, *text.values(), z, spec=spec)
  )


def rows_of(sources=None, start="harmless", mean=None):
  *_, place, out, valid = latents(start)
  if mean is None:
    mean = np.asarray(out)[valid].mean(0)
  return dict(
    latent_stats.interventions(
      place, out, mean, sources or {}, start == "harmless"
    )
  )


# --- interventions ----------------------------------------------------------


@pytest.mark.parametrize("start", ["harmless", "as_is"])
def test_right_latents_are_the_tables_and_others_are_not(start):
  model, spec, decoder, coproc, text, *_ = latents(start)
  frozen, augmented, weights = perplexity.both_nll(
    model, decoder, coproc, *text.values(), spec=spec
  )
  keep = np.asarray(weights) > 0
  assert keep.any()
  rows = rows_of(start=start)
  found = {name: nll_of(z, start)[keep] for name, z in rows.items()}
  close(found[RIGHT], np.asarray(augmented)[keep], NLL)
  others = {NOTHING, MEAN} | ({ZEROED} if start == "harmless" else set())
  assert set(found) == {RIGHT} | others
  for a, b in itertools.combinations(found, 2):
    far(found[a], found[b])


def test_zeroed_is_the_frozen_decoder_by_the_harmless_start():
  model, spec, decoder, _, text, *_ = latents()
  frozen = perplexity.plain_nll(model, decoder, *text.values(), spec=spec)
  keep = np.asarray(perplexity.point_weights(DOCUMENTS, spec)) > 0
  zeroed = nll_of(rows_of()[ZEROED])
  close(zeroed[keep], np.asarray(frozen)[keep], 3 * NLL)
  # With other positions it is not: the test could fail.
  *_, place, out, _ = latents(scheme="insert")
  inserted = nll_of(place, scheme="insert")
  far(inserted[keep], np.asarray(frozen)[keep])


def test_shuffled_stays_within_documents_and_is_a_permutation():
  *_, valid = latents()
  source = latent_stats.shuffled(DOCUMENTS, valid, np.random.default_rng(0))
  flat, index = DOCUMENTS.reshape(-1), np.arange(DOCUMENTS.size)
  there = valid.reshape(-1)
  source = source.reshape(-1)
  assert sorted(source[there]) == sorted(index[there])
  np.testing.assert_array_equal(flat[source[there]], flat[there])
  assert (source[there] != index[there]).all()
  np.testing.assert_array_equal(source[~there], index[~there])


def test_shuffled_with_one_trace_a_document_is_right():
  *_, place, out, valid = latents()
  alone = np.zeros_like(valid)
  for document in range(4):
    rows, points = np.nonzero((DOCUMENTS == document) & valid)
    alone[rows[3], points[3]] = True
  rng = np.random.default_rng(0)
  rows = rows_of({"shuffled": latent_stats.shuffled(DOCUMENTS, alone, rng)})
  np.testing.assert_array_equal(rows["shuffled"], rows[RIGHT])
  rows = rows_of({"shuffled": latent_stats.shuffled(DOCUMENTS, valid, rng)})
  far(np.asarray(rows["shuffled"])[alone], np.asarray(rows[RIGHT])[alone])


def test_swapped_comes_from_other_documents():
  *_, valid = latents()
  flat, there = DOCUMENTS.reshape(-1), valid.reshape(-1)
  seen = set()
  for seed in range(40):
    rng = np.random.default_rng(seed)
    source = latent_stats.swapped(DOCUMENTS, valid, rng).reshape(-1)[there]
    assert there[source].all()
    assert (flat[source] != flat[there]).all()
    seen |= set(source)
  assert seen == set(np.nonzero(there)[0])  # nobody is left out
  one = np.where(DOCUMENTS >= 0, 5, -1)
  assert latent_stats.swapped(one, valid, np.random.default_rng(0)) is None


def test_contributions_of_others_are_put_in_place():
  *_, place, out, valid = latents()
  rng = np.random.default_rng(3)
  source = latent_stats.swapped(DOCUMENTS, valid, rng)
  z = np.asarray(rows_of({"swapped": source})["swapped"])
  b, p = np.argwhere(valid)[5]
  there = np.asarray(out).reshape(-1, *out.shape[2:])[source[b, p]]
  np.testing.assert_allclose(z[b, p], np.asarray(place)[b, p] + there, 1e-6)


# --- geometry ---------------------------------------------------------------


def test_effective_rank_of_known_matrices():
  def rank(x):
    return latent_stats.effective_rank(np.linalg.eigvalsh(x.T @ x))

  rng = np.random.default_rng(0)
  turned = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  assert rank(turned) == pytest.approx(6.0)
  assert rank(np.outer(rng.normal(size=9), rng.normal(size=6))) == (
    pytest.approx(1.0)
  )
  # Singular values 2, 1, 1: shares 1/2, 1/4, 1/4, entropy 1.5 bits.
  known = (
    np.diag([2.0, 1.0, 1.0, 0.0]) @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
  )
  assert rank(known) == pytest.approx(2**1.5)
  assert latent_stats.effective_rank(np.zeros(3)) == 0.0


def test_moments_are_of_all_pairs():
  rng = np.random.default_rng(0)
  x = rng.normal(0.3, 1.0, (2, 7, 3, 5)).astype(np.float32)
  valid = rng.random((2, 7)) < 0.6
  x[~valid] = 1e6
  parts = [latent_stats.moments(x[i : i + 1], valid[i : i + 1]) for i in (0, 1)]
  found = jax.tree.map(np.add, *parts)
  rows = x[valid].astype(np.float64)  # [T, N, D]
  t = len(rows)
  assert found.count == t
  np.testing.assert_allclose(found.mean, rows.mean(0), 1e-5)
  assert found.rms == pytest.approx(np.sqrt((rows**2).sum(-1).mean()))

  def rank(matrix):
    s = np.linalg.svd(matrix.reshape(-1, 5), compute_uv=False)
    s = s / s.sum()
    return np.exp(-(s * np.log(s)).sum())

  assert found.effective_rank() == pytest.approx(rank(rows), rel=1e-5)
  centred = rank(rows - rows.mean(0))
  assert found.effective_rank(centred=True) == pytest.approx(centred, rel=1e-5)
  assert abs(centred - rank(rows)) > 1e-3
  unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
  pairs = list(itertools.permutations(range(t), 2))
  traces_apart = np.mean([(unit[i] * unit[j]).sum(-1) for i, j in pairs])
  assert found.overlap_of_traces() == pytest.approx(traces_apart, abs=1e-5)
  pairs = list(itertools.permutations(range(3), 2))
  slots = np.mean([(unit[:, i] * unit[:, j]).sum(-1) for i, j in pairs])
  assert found.overlap_of_slots() == pytest.approx(slots, abs=1e-5)


def test_cosines_want_pairs():
  x = np.ones((1, 1, 1, 5), np.float32)
  found = jax.device_get(latent_stats.moments(x, np.ones((1, 1), bool)))
  assert np.isnan(found.overlap_of_traces())
  assert np.isnan(found.overlap_of_slots())


# --- attention --------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["replace", "insert"])
def test_attention_mass_is_what_the_decoders_own_attention_gives(
  scheme, monkeypatch
):
  """An indicator of the latents in place of values comes out as their mass."""
  model, spec, decoder, _, text, place, out, valid = latents(scheme=scheme)
  tokens = text["tokens"]
  points = np.array([[-1, 8, 20], [-1, 8, 23]], np.int32)
  laid = traces.layout_traces(tokens, DOCUMENTS, points, spec)
  z = latent_stats._at(place + out, points)

  @jit
  def measured():
    _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)
    return latent_stats.attention_mass(model, decoder, cache, z, laid), cache

  mass, cache = measured()
  assert mass.shape == (2, 2, 3, spec.ahead - 1, N + 2)
  there = np.asarray(laid.weights)[..., :-1] > 0
  close(mass.sum(-1)[:, there], np.ones_like(mass.sum(-1)[:, there]), 1e-6)

  traced, attend = [], attention.attend

  def recording(q, k, v, rows, cache, **kw):
    # [B, M, R, K, E]: unit e is 1 for latent e alone.
    unit = jnp.zeros_like(v)
    for e in range(N):
      unit = unit.at[:, :, e, :, e].set(1.0)
    none = cache.replace(values=jnp.zeros_like(cache.values))
    plain = kw | {"kernel": Kernel("plain")}
    given = attend(q, k, unit, rows, none, **plain)  # [B, M, R, H, E]
    traced.append(given.mean(3)[:, :, N:, :N])
    return attend(q, k, v, rows, cache, **kw)

  monkeypatch.setattr(layers.attention, "attend", recording)

  @jit
  def direct():
    x = jnp.concatenate([z, transformer.embed(model, decoder, laid.ahead)], 2)
    apart = decode_rows.unstack_layers(decoder)
    transformer.run(model, apart, x, laid.rows, cache)
    return tuple(traced)

  recorded = direct()
  assert len(recorded) == 2
  for layer in range(2):
    expected = np.asarray(recorded[layer])[there]
    close(np.asarray(mass)[layer][there][:, :N], expected, ATTENTION)
    assert expected.sum(-1).max() > 0.1 > expected.min()


def test_mass_is_summed_over_traces():
  model, spec, decoder, _, text, place, out, valid = latents()
  args = model, decoder, *text.values(), place + out
  sums, counts = latent_stats.mass_sums(*args, valid, spec=spec)
  weights = np.asarray(perplexity.point_weights(DOCUMENTS, spec))
  np.testing.assert_array_equal(counts, weights[..., :-1].sum((0, 1)))
  close(sums.sum(-1) / counts[None], np.ones((2, spec.ahead - 1)), 1e-5)


# --- nearest tokens ---------------------------------------------------------


def test_nearest_tokens_are_found_in_both_senses(monkeypatch):
  monkeypatch.setattr(latent_stats, "_VECTORS_AT_ONCE", 1)  # in two turns
  model, spec, decoder, *_ = latents()
  table = np.asarray(transformer.embed(model, decoder, np.arange(37)))
  z = 3.0 * table[np.array([5, 11])] + 1e-3
  lens, near = latent_stats.nearest(model, decoder, z, 4)
  assert near[:, 0].tolist() == [5, 11]
  cosine = z @ (table / np.linalg.norm(table, axis=-1, keepdims=True)).T
  np.testing.assert_array_equal(near, np.argsort(-cosine, -1)[:, :4])
  scale = 1.0 + np.asarray(decoder["final_norm"]["scale"])
  rms = np.sqrt((z * z).mean(-1, keepdims=True) + model.config.norm_eps)
  logits = transformer.logits(model, decoder, z / rms * scale)
  np.testing.assert_array_equal(lens, np.argsort(-logits, -1)[:, :4])


# --- the whole --------------------------------------------------------------


def _diagnose(documents=DOCUMENTS, answers=None, **kw):
  model, spec, decoder, coproc, text, *_ = latents()
  batches = [text | {"documents": documents}]
  if answers is not None:
    batches[0]["answers"] = answers
  return diagnose.diagnose(
    model, decoder, coproc, lambda: batches, spec, positions=(1, 4, 8), **kw
  )


@functools.cache
def whole():
  return _diagnose()


def test_diagnosis_has_every_row_on_the_same_tokens():
  model, spec, decoder, coproc, text, place, out, valid = latents()
  found = whole()
  assert list(found.sums.nll) == [
    bootstrap.FROZEN,
    RIGHT,
    ZEROED,
    NOTHING,
    latent_stats.SHUFFLED,
    latent_stats.SWAPPED,
    MEAN,
  ]
  assert found.sums.positions == (1, 4) and not found.left_out
  plain = perplexity.coprocessor_sums(
    model, decoder, coproc, [text], spec, positions=(1, 4)
  )
  np.testing.assert_array_equal(found.sums.checksum, plain.checksum)
  close(found.sums.nll[RIGHT], plain.nll[bootstrap.AUGMENTED], 30 * NLL)
  close(found.sums.nll[ZEROED], plain.nll[bootstrap.FROZEN], 30 * NLL)
  assert found.contribution.count == valid.sum()
  np.testing.assert_allclose(
    found.contribution.mean, np.asarray(out)[valid].mean(0), 1e-4, 1e-5
  )
  np.testing.assert_allclose(
    found.z.mean, found.contribution.mean + found.copied.mean, 1e-4, 1e-5
  )
  for mass in found.mass.values():
    assert mass.shape == (2, 3, N + 2)
    close(mass.sum(-1), np.ones((2, 3)), 1e-5)
  assert len(found.nearest.lens) == N and found.nearest.traces == 32


def test_one_document_cannot_be_swapped_and_it_is_said():
  one = np.where(DOCUMENTS >= 0, DOCUMENTS // 2 * 0, -1)
  found = _diagnose(one)
  assert "one document" in found.left_out[latent_stats.SWAPPED]
  assert latent_stats.SWAPPED not in found.sums.nll
  assert latent_stats.SHUFFLED in found.sums.nll


def test_text_without_room_for_a_trace_is_refused():
  with pytest.raises(UserError, match="no token has room"):
    _diagnose(np.full_like(DOCUMENTS, -1))


def test_kinds_that_hand_over_keys_are_refused():
  model, spec, decoder, coproc, *_ = latents()
  for kind in ("prefix", "handover"):
    other = dataclasses.replace(spec, kind=kind)
    with pytest.raises(UserError, match=f"{kind}.* --nodiagnostics"):
      diagnose.diagnose(model, decoder, coproc, lambda: [], other)


@pytest.mark.parametrize("kind", ["pause", "activations"])
def test_right_latents_of_other_kinds_are_the_tables(kind):
  model, spec, decoder, _, text, *_ = latents()
  spec = dataclasses.replace(spec, kind=kind)
  coproc = make_coprocessor(model, spec)
  args = model, decoder, coproc, *text.values()
  place, out = latent_stats.contributions(*args, spec=spec)
  nll = latent_stats.latents_nll(
    model, decoder, *text.values(), place + out, spec=spec
  )
  _, augmented, weights = perplexity.both_nll(*args, spec=spec)
  keep = np.asarray(weights) > 0
  close(np.asarray(nll)[keep], np.asarray(augmented)[keep], NLL)


def test_context_and_answers_leave_out_points():
  answers = np.zeros_like(DOCUMENTS, bool)
  answers[:, ::2] = True  # every second token
  later = _diagnose(context=N + 2, answers=answers)
  model, spec, decoder, coproc, text, *_ = latents()
  text = text | {"answers": answers}
  same = perplexity.coprocessor_sums(
    model, decoder, coproc, [text], spec, positions=(1, 4), context=N + 2
  )
  np.testing.assert_array_equal(later.sums.checksum, same.checksum)
  assert later.z.count == same.tokens[:, 0].sum()
  assert (later.sums.tokens < whole().sums.tokens).all()
  assert dataclasses.replace(Layout(N, 4)).context_needed == N
  assert S > N + 2
