"""Where traces stand: masks, layouts, sampling, and the command's picture."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import jit

from cacheaug.augment import dense_masks, drawing, point_sampling, traces
from cacheaug.augment.point_sampling import Draw, near_end, sample_points
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.model import attention
from cacheaug.model.cache import KVCache
from cacheaug.weights import coprocessor_files, pretrained

# Two packed sequences, the second padded at its end; S = 16.
DOCUMENTS = np.array(
  [[4] * 6 + [5] * 10, [7] * 9 + [8] * 4 + [-1] * 3], np.int32
)
TOKENS = np.arange(100, 132, dtype=np.int32).reshape(2, 16)


# --- the pictures -----------------------------------------------------------


def drawn_in_docstring():
  """The module docstring's picture, from its header to its last row."""
  lines = traces.__doc__.splitlines()
  first = next(i for i, x in enumerate(lines) if "| b' c |" in x)
  last = next(i for i in range(first, len(lines)) if not lines[i])
  return "\n".join(line[8:] for line in lines[first:last])


def test_drawing_in_the_docstring():
  spec = Layout(latents=1, ahead=2, positions="insert", start="as_is")
  labels = "a b c d e f b' c d' e".split()
  picture = drawn_in_docstring()
  assert picture.count("#") == 21 + 3 + 4 + 5 + 6

  def draw(points):
    mask = dense_masks.dense_mask(np.zeros(6, int), np.array(points), spec)
    return drawing.draw(labels, mask, {6, 8})

  assert draw([1, 3]) == picture
  assert draw([1, 4]) != picture


PICTURE = """\
input     a b c d e f | b' c | d' e
position  0 1 2 3 4 5   2  3   4  5
target    - - - - - -   c  d   e  f

    a b c d e f | b' c | d' e
a   #
b   # #
c   # # #
d   # # # #
e   # # # # #
f   # # # # # #
b'  # #           #
c   # #           #  #
d'  # # # #              #
e   # # # #              #  #

trace 0, after b
row  position input target
6    2        b'    c
7    3        c     d

trace 1, after d
row  position input target
8    4        d'    e
9    5        e     f
"""

DOCUMENTS_PICTURE = """\
input     a b c d e f | b'1 b'2 c d | e'1 e'2 f f
position  0 1 2 3 4 5   0   1   2 3   3   4   5 6
target    - - - - - -   -   c   - -   -   f   - -
document  0 0 0 1 1 1   0   0   0 0   1   1   1 1

     a b c d e f | b'1 b'2 c d | e'1 e'2 f f
a    #
b    # #
c    # # #
d          #
e          # #
f          # # #
b'1                #
b'2                #   #
c                  #   #   #
d                  #   #   # #
e'1                              #
e'2                              #   #
f                                #   #   #
f                                #   #   # #

trace 0, after b
row  position input target
6    0        b'1   -
7    1        b'2   c
8    2        c     -
9    3        d     -

trace 1, after e
row  position input target
10   3        e'1   -
11   4        e'2   f
12   5        f     -
13   6        f     -
"""


def test_command_prints_figure_2b():
  done = subprocess.run(
    [sys.executable, "-m", "cacheaug.augment.traces", "--text=a b c d e f"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.stdout, done.stderr, done.returncode) == (PICTURE, "", 0)


def test_command_draws_documents_and_several_latents(capsys):
  status = drawing.main(
    ["--text=a b c | d e f", "--points=1,4", "--latents=2", "--ahead=3"]
    + ["--scheme=replace"]
  )
  # With "replace", a and b themselves are hidden from the latents after b;
  # of the targets, those beyond the document do not count.
  assert (status, capsys.readouterr().out) == (0, DOCUMENTS_PICTURE)


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--points=5"], "no trace fits after word 5 (f)"),
    (["--points=0", "--latents=2", "--scheme=overlay"], "2 or more words"),
    (["--points=6"], "numbered from 0 to 5"),
    (["--points=-1"], "numbered from 0 to 5"),
    (["--points=3,1"], "ascend"),
    (["--points=1,1"], "ascend"),
    (["--points=b"], "--points=b"),
    (["--latents=0"], "latents=0"),
    (["--latents=two"], "--latents"),
    (["--ahead=0"], "ahead=0"),
    (["--scheme=beside"], "insert, overlay, replace"),
    (["--text="], "at least one word"),
    (["--text=a | | b"], "at least one word"),
    (["--colour"], "--colour"),
  ],
  ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_command_refuses_with_one_line(flags, said, capsys):
  assert drawing.main(["--text=a b c d e f", *flags]) == 1
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ") and said in captured.err
  assert captured.err.count("\n") == 1


# --- the mask ---------------------------------------------------------------


@pytest.mark.parametrize("scheme", traces.POSITIONS)
@pytest.mark.parametrize("together", [False, True])
def test_fast_masks_are_the_dense_mask(scheme, together):
  """What passes 1 and 3 see, row by row, is what the picture says."""
  spec = Layout(3, 4, scheme, mask_documents=not together)
  points = np.array([[2, 4, 8, 12], [2, 5, 7, 11]], np.int32)

  @jit
  def fast():
    laid = traces.layout_traces(TOKENS, DOCUMENTS, points, spec)
    segments = traces.segments_of(DOCUMENTS, spec.mask_documents)
    positions = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    nothing = jnp.zeros((1, 2, 16, 1, 1))
    cache = KVCache(nothing, nothing, positions, segments)
    return (
      attention.visible(positions, segments, positions, segments),
      attention.context_mask(laid.rows, cache, None),
      attention.block_mask(laid.rows, None),
    )

  context, seen, own = map(np.asarray, fast())
  for b in range(2):
    dense = dense_masks.dense_mask(DOCUMENTS[b], points[b], spec)
    np.testing.assert_array_equal(dense[:16, :16], context[b])
    expected = np.zeros_like(dense)
    expected[:16, :16] = context[b]
    for m in range(4):
      run = slice(16 + m * spec.rows, 16 + (m + 1) * spec.rows)
      expected[run, :16], expected[run, run] = seen[b, m], own[b, m]
    np.testing.assert_array_equal(dense, expected)
  other = dataclasses.replace(spec, mask_documents=together)
  changed = dense_masks.dense_mask(DOCUMENTS[0], points[0], other)
  assert (
    changed != dense_masks.dense_mask(DOCUMENTS[0], points[0], spec)
  ).any()


# --- the layout -------------------------------------------------------------


@pytest.mark.parametrize(
  "scheme, latents, ahead, limit",
  [
    ("insert", [9, 10], [11, 12], 8),
    ("overlay", [7, 8], [9, 10], 8),
    ("replace", [7, 8], [9, 10], 6),
  ],
)
def test_layout_of_one_trace(scheme, latents, ahead, limit):
  """N = 2, A = 3, after token 8 of sequence 0, worked by hand."""
  spec = Layout(2, 3, scheme)
  laid = traces.layout_traces(TOKENS, DOCUMENTS, np.array([[8], [7]]), spec)
  assert laid.latent_rows.positions[0, 0].tolist() == latents
  assert laid.rows.positions[0, 0].tolist() == latents + ahead
  # The coprocessor reads the whole prefix whatever the latents stand for.
  assert laid.latent_rows.context_limit.tolist() == [[[8]], [[7]]]
  assert laid.rows.context_limit[0].tolist() == [[limit]]
  assert laid.input_tokens[0, 0].tolist() == [107, 108]
  assert laid.ahead[0, 0].tolist() == [109, 110]
  assert laid.targets[0, 0].tolist() == [109, 110, 111]
  assert laid.weights[0, 0].tolist() == [1, 1, 1]
  assert laid.rows.segments.tolist() == [[[6] * 4], [[8] * 4]]
  # After token 7 of sequence 1 one token is left of its document.
  assert laid.targets[1, 0, 0] == TOKENS[1, 8]
  assert laid.weights[1, 0].tolist() == [1, 0, 0]


def test_weights_end_with_the_document_the_sequence_and_the_points():
  spec = Layout(1, 4)
  points = np.array([[-1, 5, 13], [0, 11, 12]], np.int32)
  weights = traces.layout_traces(TOKENS, DOCUMENTS, points, spec).weights
  assert weights.tolist() == [
    [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]],
    [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]],
  ]


# --- sampling ---------------------------------------------------------------


def by_hand(documents, spec, min_ahead):
  """Valid points of one sequence, from the definition."""
  found = set()
  for p in range(len(documents)):
    first, last = p - spec.context_needed + 1, p + min_ahead
    whole = first >= 0 and last < len(documents) and documents[p] >= 0
    if whole and len(set(documents[first : last + 1].tolist())) == 1:
      found.add(p)
  return found


@pytest.mark.parametrize("min_ahead", [1, 3])
@pytest.mark.parametrize(
  "scheme, start, needed",
  [
    ("insert", "as_is", 1),
    ("insert", "harmless", 3),
    ("overlay", "as_is", 3),
    ("replace", "harmless", 3),
  ],
)
def test_valid_points(scheme, start, needed, min_ahead):
  spec = Layout(3, 4, scheme, start)
  assert spec.context_needed == needed
  valid = np.asarray(
    point_sampling.valid_points(DOCUMENTS, spec, min_ahead=min_ahead)
  )
  for b in range(2):
    expected = by_hand(DOCUMENTS[b], spec, min_ahead)
    assert set(np.flatnonzero(valid[b]).tolist()) == expected


DRAWS = 4000


def many(spec, draw, documents=DOCUMENTS, draws=DRAWS):
  keys = jax.random.split(jax.random.key(3), draws)
  sample = jit(jax.vmap(lambda key: sample_points(key, documents, spec, draw)))
  return np.asarray(sample(keys))


def test_uniform_points_are_distinct_ascending_and_uniform():
  spec = Layout(2, 3)
  points = many(spec, Draw(4, min_ahead=2))
  assert points.shape == (DRAWS, 2, 4)
  assert (np.diff(points, axis=-1) > 0).all()
  for b in range(2):
    valid = by_hand(DOCUMENTS[b], spec, 2)
    counts = np.bincount(points[:, b].ravel(), minlength=16)
    assert set(np.flatnonzero(counts).tolist()) == valid
    expected = DRAWS * 4 / len(valid)
    chi = ((counts[sorted(valid)] - expected) ** 2 / expected).sum()
    # About `len(valid)` degrees of freedom; a tenth more or less of the draws
    # at one point gives 20 to 60, and the seed is fixed.
    assert chi < 3 * len(valid), chi
  # Points of a draw, and keys, are independent: no pair is favoured.
  assert len({tuple(p) for p in points[:, 0]}) > 0.9 * 210


def test_points_are_minus_one_where_too_few_are_valid():
  documents = np.array([[0] * 5 + [-1] * 3, [-1] * 8], np.int32)
  spec = Layout(2, 2)
  points = many(spec, Draw(4, min_ahead=2), documents, 10)
  assert (points[:, 0] == [-1, -1, 1, 2]).all() and (points[:, 1] == -1).all()
  laid = traces.layout_traces(np.zeros((2, 8), int), documents, points[0], spec)
  assert laid.weights.sum(-1).tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]]


def test_points_near_a_documents_end_come_first():
  # Documents end at 4, at 9 and (cut off by the sequence, so not there) at 15.
  documents = jnp.asarray([[0] * 5 + [1] * 5 + [2] * 6])
  near = near_end(documents, 2)
  assert np.flatnonzero(near[0]).tolist() == [3, 4, 8, 9]
  # An end itself has no token after it, so two points are near and valid.
  for seed in range(20):
    key = jax.random.key(seed)
    spec, draw = Layout(latents=1, ahead=2), Draw(count=3, tail=2)
    points = sample_points(key, documents, spec, draw)[0].tolist()
    assert {3, 8} < set(points)
  draw = Draw(count=3)
  drawn = [
    set(sample_points(jax.random.key(s), documents, spec, draw)[0].tolist())
    for s in range(20)
  ]
  assert not all({3, 8} < points for points in drawn)


def test_stratified_points_fall_one_in_each_bucket():
  spec = Layout(2, 3)
  points = many(spec, Draw(4, "stratified", min_ahead=2))
  for b in range(2):
    valid = by_hand(DOCUMENTS[b], spec, 2)
    for m in range(4):
      drawn = set(np.unique(points[:, b, m]).tolist())
      bucket = valid & set(range(4 * m, 4 * m + 4))
      assert drawn == (bucket or {-1})
  assert (points[:, 1, 3] == -1).all() and (points[:, 0] >= 0).all()


def test_starts_are_where_segments_begin():
  segments = np.array([[1, 1, 2, 2, 2, 0], [0, 0, 3, 3, 4, 4]])
  starts = traces.starts_of(segments)
  np.testing.assert_array_equal(
    starts, [[0, 0, 2, 2, 2, 5], [0, 0, 2, 2, 4, 4]]
  )


@pytest.mark.parametrize(
  "changes, said",
  [
    (dict(latents=0), "traces.latents=0"),
    (dict(ahead=0), "traces.ahead=0"),
    (dict(positions="beside"), "coprocessor.positions='beside'"),
    (dict(start="harmful"), "coprocessor.start='harmful'"),
    (dict(kind="brake"), "coprocessor.kind='brake'"),
  ],
  ids=str,
)
def test_impossible_layouts_are_refused(changes, said):
  with pytest.raises(UserError, match=said):
    Layout(**(dict(latents=2, ahead=4) | changes))


@pytest.mark.parametrize(
  "changes, said",
  [
    (dict(count=0), "traces.count=0"),
    (dict(min_ahead=5), "traces.min_ahead=5"),
    (dict(law="even"), "traces.law='even'"),
    (dict(tail=-1), "traces.tail=-1"),
  ],
  ids=str,
)
def test_impossible_draws_are_refused(changes, said):
  with pytest.raises(UserError, match=said):
    Draw(**changes).check(Layout(latents=2, ahead=4))


# --- on disk ----------------------------------------------------------------

# As version 1 wrote a store entry's owner, byte for byte.
STORED = (
  '{"ahead": 4, "count": 1, "kind": "coprocessor", "late_max": 2, '
  '"latents": 3, "law": "stratified", "mask_documents": true, "min_ahead": 2, '
  '"rounds": 1, "scheme": "replace", "start": "harmless", "stride": 0, '
  '"tail": 2}'
)


def test_layout_and_draw_are_one_flat_dictionary_on_disk():
  layout = Layout(3, 4, "replace")
  draw = Draw(law="stratified", min_ahead=2, tail=2, late_max=2)
  entries = point_sampling.to_entries(layout, draw)
  assert json.dumps(entries, sort_keys=True) == STORED
  assert type(entries["kind"]) is str
  again = point_sampling.from_entries(json.loads(STORED))
  assert again == (layout, draw)
  # The oldest have no kind, rounds or lateness.
  for key in ("late_max", "kind", "rounds", "stride"):
    del entries[key]
  older, drawn = point_sampling.from_entries(entries)
  assert (older, drawn) == (layout, dataclasses.replace(draw, late_max=0))
  del entries["tail"]
  with pytest.raises(KeyError, match="tail"):
    point_sampling.from_entries(entries)


def test_the_shipped_coprocessor_is_read_and_written_alike():
  path = pretrained.resolve("shipped:tiny_coprocessor")
  _, layout, _, meta = coprocessor_files.load_coprocessor(path)
  assert layout == Layout(4, 8, "replace")
  assert meta["draw"] == Draw(24, tail=4)
  entries = json.loads((path / "config.json").read_text())
  entries["scheme"] = entries["positions"]
  written = point_sampling.to_entries(layout, meta["draw"])
  assert written.items() & entries.items() == {
    (k, v) for k, v in written.items() if k in entries
  }
  assert set(written) - set(entries) == {"late_max", "kind", "rounds", "stride"}
