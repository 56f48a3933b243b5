"""Gates in decoding, on the decoder and coprocessor that ship."""

import jax
import numpy as np
import pytest

import cacheaug
from cacheaug.errors import UserError
from cacheaug.inference import gates
from cacheaug.inference.session import InsertionSchedule

PROMPTS = [
  "def main(argv):\n  for name in argv[1:]:\n    print(",
  "a=4;b=a+3;c=b-2;d=c+6;e=d+1;f=e-3;f=",
  "import os",
]
NEW = 12
PLAN = InsertionSchedule(every=4)


@pytest.fixture(scope="module")
def lm():
  return cacheaug.load("shipped:tiny").with_coprocessor(
    "shipped:tiny_coprocessor"
  )


def complete(lm, prompts=PROMPTS, **options):
  return lm.complete(prompts, NEW, **(dict(scored=True, plan=PLAN) | options))


def same(one, other):
  """Tokens and nll, bit for bit."""
  return one.ids == other.ids and one.nll.tobytes() == other.nll.tobytes()


@pytest.mark.usefixtures("as_users_compile_here")
def test_thresholds_beyond_all_are_always_and_never(lm):
  always, frozen = complete(lm), complete(lm, latents=False)
  for a, b in zip(complete(lm, gate="entropy:-inf"), always, strict=True):
    assert same(a, b) and a.insertions == b.insertions and not a.declined
  for a, b in zip(complete(lm, gate="entropy:inf"), frozen, strict=True):
    assert same(a, b) and not a.insertions
    assert [x.step for x in a.declined] == [0, 4, 8]
  assert not any(map(same, always, frozen))


def test_each_sequence_is_decided_alone(lm):
  """At every point, by the hidden state there, whatever its neighbours get."""
  seen = []

  def watch(hidden, threshold=np.inf):
    seen.append(np.asarray(gates.entropy(lm.model, lm.decoder, hidden)))
    return seen[-1] > threshold

  frozen = complete(lm, latents=[False] * 3, gate=watch)
  assert not seen, "a gate was asked where no latents are wanted"
  complete(lm, gate=watch)
  at_ends = seen[0]
  high, threshold = int(np.argmax(at_ends)), float(np.median(at_ends)) + 1e-3
  seen.clear()
  mixed = complete(lm, gate=lambda h: watch(h, threshold))
  steps = [0, 4, 8]
  assert len(seen) == 3
  for i, done in enumerate(mixed):
    yes = [s for s, e in zip(steps, seen, strict=True) if e[i] > threshold]
    assert [x.step for x in done.insertions] == yes
    assert [x.step for x in done.declined] == [s for s in steps if s not in yes]
    assert same(done, frozen[i]) == (not yes)
    on = [i == j for j in range(3)]
    alone = complete(lm, latents=on, gate=f"entropy:{threshold}")
    assert same(alone[i], done)
    assert not any(
      alone[j].insertions or alone[j].declined for j in range(3) if j != i
    )
  assert 0 in [x.step for x in mixed[high].insertions]
  assert 0 < sum(len(x.insertions) for x in mixed) < 9


def test_gates_by_name(lm, tmp_path):
  width = lm.model.config.width
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(64, width)).astype(np.float32)
  head = gates.fit_head(jax.random.key(0), hidden, hidden[:, 0], steps=20)
  meta = {"decoder_fingerprint": lm.fingerprint, "threshold": 0.1}
  path = tmp_path / "a:0.3"  # colons are what thresholds follow
  gates.save_head(path, head, meta)

  def parse(text, fingerprint=lm.fingerprint):
    return gates.parse(text, lm.model, lm.decoder, fingerprint)

  gain = np.asarray(gates.predicted_gain(head, hidden))
  for text, threshold in ((f"head:{path}", 0.1), (f"head:{path}:-0.2", -0.2)):
    np.testing.assert_array_equal(parse(text)(hidden), gain > threshold)
  found = np.asarray(gates.entropy(lm.model, lm.decoder, hidden))
  middle = float(np.median(found))
  np.testing.assert_array_equal(
    parse(f"entropy:{middle}")(hidden), found > np.float32(middle)
  )
  for text, said in (
    ("entropy", "is not entropy:NATS or head:DIR"),
    ("entropy:", "is not entropy:NATS"),
    ("often:1", "'often:1' is not"),
    ("entropy:much", "'much' is not a threshold"),
    ("entropy:nan", "'nan' is not a threshold"),
    (f"head:{path}:x", "'x' is not a threshold"),
    (f"head:{tmp_path}", "gate.json: missing"),
  ):
    with pytest.raises(UserError, match=said):
      parse(text)
  with pytest.raises(UserError, match="learned for decoder"):
    parse(f"head:{path}", "another")
  with pytest.raises(UserError, match="is not entropy:NATS"):
    lm.generate(PROMPTS, 2, gate="no")
