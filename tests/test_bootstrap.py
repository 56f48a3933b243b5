"""Intervals that cover, sums that equal tokens' arrays, runs compared."""

import math

import numpy as np
import pytest

from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, report
from cacheaug.evals.bootstrap import DocumentSums, paired_interval


def to_csv(by_source) -> bytes:
  """documents.csv."""
  return report.csv_bytes(bootstrap.csv_lines(by_source), bootstrap.COLUMNS)


def tokens(seed, documents, each, effect, spread):
  """Per-document shared differences around `effect`, plus token noise."""
  rng = np.random.default_rng(seed)
  owner = np.repeat(np.arange(documents), each)
  frozen = rng.normal(3.0, 1.0, documents * each)
  shift = rng.normal(effect, spread, documents)[owner]
  augmented = frozen + shift + rng.normal(0.0, 0.05, documents * each)
  return frozen, augmented, owner


def sums_of(by_position):
  """DocumentSums of position -> (frozen, augmented, owner), [T] each."""
  owners = [owner for _, _, owner in by_position.values()]
  documents = np.unique(np.concatenate(owners)).astype(int)

  def stack(i):
    columns = [
      [(x[2] == d) @ x[i] if len(x[i]) else 0.0 for d in documents]
      for x in by_position.values()
    ]
    return np.array(columns, np.float64).reshape(len(by_position), -1).T

  counts = [[(o == d).sum() for d in documents] for o in owners]
  counts = np.array(counts, np.int64).reshape(len(by_position), -1).T
  nll = {bootstrap.FROZEN: stack(0), bootstrap.AUGMENTED: stack(1)}
  return DocumentSums(tuple(by_position), documents, counts, 7 * counts, nll)


def interval(frozen, augmented, owner, **kw):
  """`paired_interval` of tokens' arrays."""
  _, owner = np.unique(owner, return_inverse=True)
  return paired_interval(
    np.bincount(owner, frozen),
    np.bincount(owner, augmented),
    np.bincount(owner),
    **kw,
  )


def of_tokens(frozen, augmented, owner, *, seed, resamples=1000):
  """The same written from the definition: whole documents' tokens, drawn."""
  documents = np.unique(owner)
  n = len(documents)
  drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, resamples)
  means = []
  for times in drawn:
    repeats = np.concatenate(
      [
        np.tile(np.nonzero(owner == d)[0], k)
        for d, k in zip(documents, times, strict=True)
      ]
    )
    means.append(np.mean((augmented - frozen)[repeats]))
  change = np.mean(augmented - frozen)
  return [
    100 * math.expm1(x) for x in (change, *np.percentile(means, [2.5, 97.5]))
  ]


def test_interval_from_sums_is_that_of_the_tokens_arrays():
  frozen, augmented, owner = tokens(0, 12, 5, -0.02, 0.1)
  # Documents of unequal length, in no order.
  keep = np.random.default_rng(1).permutation(60)[:43]
  data = frozen[keep], augmented[keep], owner[keep]
  expected = of_tokens(*data, seed=4)
  # A percentile of exp is the exp of the percentile, but for where it lies
  # between two draws.
  np.testing.assert_allclose(interval(*data, seed=4), expected, rtol=1e-3)


def test_interval_in_turns_is_the_same(monkeypatch):
  data = tokens(0, 30, 5, -0.02, 0.1)
  whole = interval(*data, seed=1)
  monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 30 * 7)
  assert interval(*data, seed=1) == pytest.approx(whole, rel=1e-12)


def test_change_is_of_the_perplexity():
  frozen = np.array([1.0, 2.0, 3.0])
  change, low, high = interval(
    frozen, frozen + math.log(0.97), np.array([5, 9, 9]), seed=0
  )
  assert change == pytest.approx(-3.0)
  assert low == pytest.approx(-3.0) and high == pytest.approx(-3.0)


def test_documents_weigh_by_their_tokens():
  augmented = np.array([0.1, 0.1, 0.1, -0.1])
  change, _, _ = interval(
    np.zeros(4), augmented, np.array([0, 0, 0, 1]), seed=0
  )
  assert change == pytest.approx(100 * math.expm1(0.05))


def test_interval_covers_the_truth_about_95_times_in_100():
  true = 100 * math.expm1(-0.02)
  inside = 0
  for seed in range(200):
    _, low, high = interval(
      *tokens(seed, 60, 5, -0.02, 0.1), seed=seed, resamples=400
    )
    inside += low <= true <= high
  # 200 draws of 0.95 have a standard deviation of 3; percentile intervals of
  # 60 documents cover a little less.
  assert 178 <= inside <= 199


def test_interval_is_over_documents_not_tokens():
  frozen, augmented, owner = tokens(0, 30, 50, 0.0, 0.1)
  _, low, high = interval(frozen, augmented, owner, seed=1)
  alone = np.arange(len(owner))
  _, low_token, high_token = interval(frozen, augmented, alone, seed=1)
  assert high - low > 3 * (high_token - low_token)


def test_interval_is_a_function_of_the_seed():
  data = tokens(0, 30, 5, 0.0, 0.1)
  again = [interval(*data, seed=s) for s in (1, 1, 2)]
  assert again[0] == again[1] != again[2]


def test_single_document_has_no_interval_and_no_tokens_are_refused():
  _, low, high = interval(np.ones(3), np.ones(3), np.zeros(3), seed=0)
  assert math.isnan(low) and math.isnan(high)
  with pytest.raises(UserError, match="no token"):
    paired_interval(np.ones(0), np.ones(0), np.ones(0), seed=0)
  with pytest.raises(ValueError, match="same"):
    paired_interval(np.ones(2), np.ones(3), np.ones(3), seed=0)


# --- sums of batches --------------------------------------------------------

_DOCUMENTS = np.array([[4, 4, 4, 9, 9, 9], [9, 9, 2, 2, 2, -1]])


def _batch():
  rng = np.random.default_rng(0)
  text = {
    "tokens": rng.integers(0, 50, (2, 6)).astype(np.int32),
    "documents": _DOCUMENTS,
  }
  nll = {name: rng.normal(3, 1, (2, 6, 3)) for name in ("frozen", "other")}
  nll["frozen"][1, 5] = np.nan  # padding says anything
  weights = np.zeros((2, 6, 3), np.float32)
  for b, p, j in np.ndindex(2, 6, 3):
    t = p + 1 + j
    if t < 6 and _DOCUMENTS[b, p] >= 0:
      weights[b, p, j] = _DOCUMENTS[b, p] == _DOCUMENTS[b, t]
  return text, nll, weights


def test_sums_are_of_the_tokens_that_count():
  text, nll, weights = _batch()
  sums = bootstrap.sums_of_batch(text, nll, weights, (1, 3))
  assert sums.documents.tolist() == [2, 4, 9]
  for t, document in enumerate(sums.documents):
    for j, position in enumerate((1, 3)):
      keep = (weights[..., position - 1] > 0) & (_DOCUMENTS == document)
      assert sums.tokens[t, j] == keep.sum()
      for name in nll:
        expected = nll[name][..., position - 1][keep].sum()
        assert sums.nll[name][t, j] == pytest.approx(expected, abs=1e-12)
  # Of three tokens each: nothing is 3 after.
  assert sums.tokens.tolist() == [[2, 0], [2, 0], [3, 0]]


def test_batches_add_up():
  text, nll, weights = _batch()
  whole = bootstrap.sums_of_batch(text, nll, weights, (1, 2))
  parts = [
    bootstrap.sums_of_batch(
      {k: v[b : b + 1] for k, v in text.items()},
      {k: v[b : b + 1] for k, v in nll.items()},
      weights[b : b + 1],
      (1, 2),
    )
    for b in (1, 0)
  ]
  both = bootstrap.merge(parts)
  for name in ("documents", "tokens", "checksum"):
    np.testing.assert_array_equal(getattr(both, name), getattr(whole, name))
  np.testing.assert_allclose(both.nll["other"], whole.nll["other"], 1e-12)


def test_checksum_is_of_which_tokens_stand_where():
  text, nll, weights = _batch()

  def checksum(text):
    return bootstrap.sums_of_batch(text, nll, weights, (1,)).checksum[:, 0]

  before = checksum(text)
  # 2nd and 3rd token of document 4 are targets; its first is context only.
  for change, seen in (([0, 1, 2], None), ([1, 0, 2], 4), ([0, 2, 1], 4)):
    other = text["tokens"].copy()
    other[0, :3] = np.array([11, 12, 13])[change]
    first = text["tokens"].copy()
    first[0, :3] = [11, 12, 13]
    found = checksum(text | {"tokens": other})
    differs = found != checksum(text | {"tokens": first})
    assert differs.tolist() == [False, seen == 4, False]
  other = text["tokens"].copy()
  other[0, 0] += 1
  np.testing.assert_array_equal(checksum(text | {"tokens": other}), before)


# --- documents.csv ----------------------------------------------------------


def _write(path, sums, source="text"):
  path.mkdir(parents=True)
  (path / "documents.csv").write_bytes(to_csv({source: sums}))
  return path


def _three(seed=0, effect=-0.05):
  texts = {p: tokens(seed + p, 20, 4, effect, 0.02) for p in (1, 2, 4)}
  return sums_of(texts)


def test_file_holds_every_digit(tmp_path):
  sums = _three()
  found = bootstrap.read_csv(_write(tmp_path / "a", sums))
  assert len(found) == 60
  line = found["text", 3, 2]
  assert line.frozen == sums.nll["frozen"][3, 1]
  assert line.augmented == sums.nll["augmented"][3, 1]
  assert (line.tokens, line.checksum) == (4, 28)


def test_runs_are_compared_on_common_documents(tmp_path):
  first, second = _three(), _three(effect=-0.01)
  a = _write(tmp_path / "a", first)
  keep = slice(0, 15)
  fewer = DocumentSums(
    second.positions,
    second.documents[keep],
    second.tokens[keep],
    second.checksum[keep],
    {k: v[keep] for k, v in second.nll.items()},
  )
  b = _write(tmp_path / "run" / "report", fewer).parent
  rows = bootstrap.compare(a, b, seed=2)
  assert [(r.source, r.position) for r in rows] == [
    ("text", 1),
    ("text", 2),
    ("text", 4),
  ]
  mine, yours = first.nll["augmented"][keep, 1], fewer.nll["augmented"][:, 1]
  expected = paired_interval(yours, mine, fewer.tokens[:, 1], seed=2)
  row = rows[1]
  assert (row.change_percent, row.low, row.high) == expected
  assert row.change_percent < 0 and row.documents == 15 and row.tokens == 60
  frozen = bootstrap.compare(a, b, seed=2, against_frozen=True)[1]
  assert frozen.base_nll == fewer.nll["frozen"][:, 1].sum() / 60
  same = bootstrap.compare(a, a)[0]
  assert (same.change_percent, same.low, same.high) == (0.0, 0.0, 0.0)


def test_runs_on_other_tokens_are_refused(tmp_path):
  sums = _three()
  a = _write(tmp_path / "a", sums)
  for name in ("tokens", "checksum"):
    changed = getattr(sums, name).copy()
    changed[7:9, 1] += 1
    fields = {"tokens": sums.tokens, "checksum": sums.checksum, name: changed}
    other = DocumentSums(sums.positions, sums.documents, nll=sums.nll, **fields)
    b = _write(tmp_path / name, other)
    with pytest.raises(UserError, match="document 7 .* position 2;") as e:
      bootstrap.compare(a, b)
    assert ("tokens in both" in str(e.value)) == (name == "checksum")
  elsewhere = _write(tmp_path / "c", sums, source="code")
  with pytest.raises(UserError, match="in common"):
    bootstrap.compare(a, elsewhere)


@pytest.mark.parametrize(
  ("content", "says"),
  [
    (None, "no documents.csv"),
    (b"\xff\xfe\x00", "no documents.csv that can be read"),
    (b"", "line 1 is not source,document"),
    (b"a,b\n1,2\n", "line 1 is not source,document"),
    (to_csv({}) + b"text,1,1,0.5,0.5,3\n", "line 2 is damaged"),
    (to_csv({}) + b"text,x,1,0.5,0.5,3,4\n", "line 2 is damaged"),
  ],
)
def test_files_of_another_form_are_refused(tmp_path, content, says):
  path = tmp_path / "documents.csv"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=says):
    bootstrap.compare(tmp_path, tmp_path)
