"""The mask and one attention layer, against their definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import (
  ATTENTION,
  GRADIENT,
  MATTERS,
  close,
  close_trees,
  far,
  jit,
)

from cacheaug.kernels import context_attention
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import attention
from cacheaug.model.attention import QueryLayout
from cacheaug.model.cache import KVCache

B, M, R, S, H, K, E = 2, 4, 3, 8, 4, 2, 6
POINTS = np.array([[1, 3, 4, 6], [0, 2, 5, 6]], np.int32)


def drawing_of(function):
  """The mask drawn in a docstring, [Q, T] bool, read column by column."""
  lines = function.__doc__.splitlines()
  head = next(i for i, x in enumerate(lines) if x.split()[:2] == ["0", "1"])
  keys = lines[head].split()
  columns = [lines[head].index(key) for key in keys]
  rows = lines[head + 1 : head + 1 + len(keys)]
  assert [row.split()[0] for row in rows] == keys
  return np.array(
    [[row.ljust(columns[-1] + 1)[c] == "#" for c in columns] for row in rows]
  )


def test_drawing_in_the_docstring():
  drawn = drawing_of(attention.visible)
  assert drawn.shape == (5, 5) and drawn.sum() == 10
  positions, segments = np.arange(5), np.array([1, 1, 1, 1, 2])
  args = positions, segments, positions, segments
  np.testing.assert_array_equal(attention.visible(*args, window=3), drawn)
  assert (np.asarray(attention.visible(*args, window=2)) != drawn).any()


def test_positions_decide_and_not_indices():
  rng = np.random.default_rng(0)
  positions = np.arange(9, dtype=np.int32)
  segments = np.array([1, 1, 1, 1, 2, 2, 2, 0, 0], np.int32)
  order = rng.permutation(9)
  mask = np.asarray(
    attention.visible(positions, segments, positions, segments, 3)
  )
  shuffled = attention.visible(
    positions, segments, positions[order], segments[order], 3
  )
  np.testing.assert_array_equal(shuffled, mask[:, order])
  assert not mask[:, segments == 0].any(), "padding is seen"
  assert (np.asarray(shuffled) != mask).any()


def arrays(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  q, k, v = draw(B, M, R, H, E), draw(B, M, R, K, E), draw(B, M, R, K, E)
  return q, k, v, draw(B, S, K, E), draw(B, S, K, E)


def rows_of(points=POINTS):
  positions = points[..., None] - 1 + np.arange(R, dtype=np.int32)
  segments = np.array([[1, 1, 1, 2], [1, 1, 2, 2]], np.int32)
  segments = np.broadcast_to(segments[..., None], positions.shape)
  return QueryLayout(positions, segments, points[..., None])


def starts_at(rows):
  """The promise of intervals: where each block's document begins."""
  begin = np.array([[0, 0, 0, 5], [0, 0, 3, 3]], np.int32)
  return rows.replace(context_start=begin[..., None])


def cache_of(keys, values):
  positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
  segments = np.array(
    [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2, 0]], np.int32
  )
  return KVCache(keys, values, positions, segments)


def attend(q, k, v, keys, values, rows, *, window=None, softcap=0.0):
  # Freshly traced, since tests change the size of tiles.
  @jax.jit
  def run(q, k, v, keys, values):
    return attention.attend(
      q,
      k,
      v,
      rows,
      cache_of(keys, values),
      window=window,
      softcap=softcap,
      kernel=Kernel("xla"),
    )

  return run(q, k, v, keys, values)


def reference(q, k, v, keys, values, *, window=None, softcap=0.0):
  """Row by row and head by head, from the definition, in float64."""
  rows, cache = rows_of(), cache_of(keys, values)
  out = np.zeros((B, M, R, H, E))
  for b, m, r, h in np.ndindex(B, M, R, H):
    head = h // (H // K)  # neighbouring query heads share a key head
    at, segment = rows.positions[b, m, r], rows.segments[b, m, r]
    seen_k, seen_v = [], []
    for s in range(S):
      near = window is None or at - cache.positions[b, s] < window
      same = cache.segments[b, s] == segment
      if s <= POINTS[b, m] and same and near:
        seen_k.append(keys[b, s, head])
        seen_v.append(values[b, s, head])
    for i in range(r + 1):
      if window is None or r - i < window:
        seen_k.append(k[b, m, i, head])
        seen_v.append(v[b, m, i, head])
    scores = np.array(seen_k, np.float64) @ q[b, m, r, h]
    if softcap:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    out[b, m, r, h] = weights / weights.sum() @ np.array(seen_v, np.float64)
  return out


CASES = [
  dict(),
  dict(window=2),
  dict(softcap=1.5),
  dict(window=3, softcap=1.5),
]


@pytest.mark.parametrize("case", CASES)
def test_rows_over_context_and_block(case):
  x = arrays()
  close(attend(*x, rows_of(), **case), reference(*x, **case), ATTENTION)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [(512, 128), (5, 3)], ids=str)
def test_tiles_of_intervals(case, tile, monkeypatch):
  """One tile, and several: rows and slots that do not divide into them."""
  monkeypatch.setattr(context_attention, "ROWS", tile[0])
  monkeypatch.setattr(context_attention, "SLOTS", tile[1])
  x = arrays()
  rows = starts_at(rows_of())
  close(attend(*x, rows, **case), reference(*x, **case), ATTENTION)


@pytest.mark.parametrize("case", CASES)
def test_rows_asked_for_are_the_last_of_all(case):
  """Two of three rows ask, of the same keys: plain and in tiles."""
  q, *others = arrays()
  for rows in (rows_of(), starts_at(rows_of())):
    some = attend(q[:, :, 1:], *others, rows, **case)
    close(some, reference(q, *others, **case)[:, :, 1:], ATTENTION)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_tiles(case, monkeypatch):
  """Against autodiff of the one masked softmax."""
  monkeypatch.setattr(context_attention, "ROWS", 5)
  monkeypatch.setattr(context_attention, "SLOTS", 3)
  q, k, v, keys, values = arrays()
  rows = rows_of()
  weight = np.random.default_rng(1).standard_normal(q[:, :, 1:].shape)

  def gradients(rows):
    def loss(q, k, v):
      out = attend(q[:, :, 1:], k, v, keys, values, rows, **case)
      return (out * weight.astype(np.float32)).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)

  expected = gradients(rows)
  close_trees(gradients(starts_at(rows)), expected, GRADIENT)
  assert all(np.abs(x).max() > MATTERS for x in expected)


def test_window_and_soft_cap_matter():
  x = arrays()
  outs = [attend(*x, rows_of(), **case) for case in CASES]
  for i in range(len(outs)):
    for j in range(i):
      far(outs[i], outs[j])


def test_a_window_past_the_context_is_none():
  x = arrays()
  a = attend(*x, rows_of(), window=S + R)
  np.testing.assert_array_equal(a, attend(*x, rows_of()))


def test_starts_that_lie_are_found_out():
  """They do cut the context: a promise not kept changes the result."""
  x = arrays()
  rows = starts_at(rows_of())
  far(
    attend(*x, rows.replace(context_start=rows.context_start + 1)),
    reference(*x),
  )


def test_repeated_key_heads_equal_grouped_queries():
  q, k, v, keys, values = arrays()
  grouped = attend(q, k, v, keys, values, rows_of())

  def repeat(x, order):
    return np.repeat(x, H // K, axis=-2)[..., order, :]

  straight = list(range(H))
  four = [repeat(x, straight) for x in (k, v, keys, values)]
  close(attend(q, *four, rows_of()), grouped, ATTENTION)
  # Heads dealt in turn instead of in runs are another model.
  dealt = [repeat(x, [0, 2, 1, 3]) for x in (k, v, keys, values)]
  far(attend(q, *dealt, rows_of()), grouped)


def test_what_is_hidden_has_no_influence_at_all():
  """Exactly zero gradient, and none where a row sees nothing becomes NaN."""
  x = arrays()

  def loss(k, v, keys, values):
    out = attend(x[0], k, v, keys, values, rows_of(), window=3)
    return jnp.sin(out[:, 1]).sum()  # of every sequence's second block

  own_k, own_v, keys, values = jit(jax.grad(loss, (0, 1, 2, 3)))(*x[1:])
  for g in (own_k, own_v):
    assert (np.asarray(g[:, [0, 2, 3]]) == 0).all(), "another block is seen"
    assert (np.abs(g[:, 1]).max((-1, -2)) > 0).all()
  # Points 3 and 2, rows from position p - 1, window 3: from p - 3 up to p.
  seen = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]], bool)
  for g in (keys, values):
    np.testing.assert_array_equal(np.abs(g).max((-1, -2)) > 0, seen)


def test_a_row_that_sees_nothing_is_finite():
  x = arrays()
  empty = rows_of().replace(segments=np.zeros((B, M, R), np.int32))
  out = attend(*x, empty)
  assert np.isfinite(np.asarray(out)).all()
  gradient = jit(jax.grad(lambda q: attend(q, *x[1:], empty).sum()))(x[0])
  assert np.isfinite(np.asarray(gradient)).all()


def test_one_row_is_softmax_over_what_was_seen_before():
  """M blocks of one row over a context equal the last row of one block."""
  q, k, v, _, _ = arrays()
  positions = np.broadcast_to(np.arange(R, dtype=np.int32), (B, R))
  ones = np.ones((B, R), np.int32)
  run = functools.partial(
    attention.attend, window=2, softcap=1.5, kernel=Kernel("xla")
  )

  @jit
  def both(q, k, v):
    whole = run(q, k, v, QueryLayout.plain(positions, ones), None)
    cache = KVCache(k[:, 0, :-1], v[:, 0, :-1], positions[:, :-1], ones[:, :-1])
    last = QueryLayout.plain(positions[:, -1:], ones[:, -1:])
    return whole[:, :, -1:], run(
      *(x[:, :, -1:] for x in (q, k, v)), last, cache
    )

  close(*both(q[:, :1], k[:, :1], v[:, :1]), ATTENTION)


def test_of_rows_at_equal_positions_the_later_sees_the_earlier():
  positions = np.full((1, 1, 3), 5, np.int32)
  rows = QueryLayout(positions, np.ones_like(positions), positions[..., :1])
  mask = np.asarray(attention.block_mask(rows, window=1))
  np.testing.assert_array_equal(mask[0, 0], np.tri(3, dtype=bool))
