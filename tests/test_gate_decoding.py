"""Gates in decoding, on the decoder and coprocessor that ship."""

import jax
import numpy as np
import pytest

import cacheaug
from cacheaug.errors import UserError
from cacheaug.inference import gates
from cacheaug.inference.session import Plan

PROMPTS = [
  "def main(argv):\n  for name in argv[1:]:\n    print(",
  "a=4;b=a+3;c=b-2;d=c+6;e=d+1;f=e-3;f=",
  "import os",
]
NEW = 12
PLAN = Plan(every=4)


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


def test_thresholds_beyond_all_are_always_and_never(lm):
  always, frozen = complete(lm), complete(lm, latents=False)
  for kind in ("entropy:-inf", lambda h: np.ones(len(h), bool)):
    for a, b in zip(complete(lm, gate=kind), always, strict=True):
      assert same(a, b) and a.insertions == b.insertions and not a.declined
  for a, b in zip(complete(lm, gate="entropy:inf"), frozen, strict=True):
    assert same(a, b) and not a.insertions
    assert [x.step for x in a.declined] == [0, 4, 8]
  assert not any(map(same, always, frozen))


def test_each_sequence_is_decided_alone(lm):
  """At the prompts' ends, and by the hidden state that is there."""
  seen = []
  entropy = jax.jit(gates.entropy, static_argnums=0)

  def watch(hidden):
    seen.append(np.asarray(entropy(lm.model, lm.decoder, hidden)))
    return np.ones(len(hidden), bool)

  options = dict(plan=Plan())
  always = complete(lm, **options, gate=watch)
  frozen = complete(lm, **options, latents=[False] * 3)
  (found,) = seen
  high, low = np.argmax(found), np.argmin(found)
  threshold = f"entropy:{np.median(found) + 1e-3:.6f}"
  mixed = complete(lm, **options, gate=threshold)
  for i, done in enumerate(mixed):
    yes = i == high
    assert same(done, (always if yes else frozen)[i])
    assert (len(done.insertions), len(done.declined)) == (yes, not yes)
    (alone,) = complete(lm, [PROMPTS[i]], **options, gate=threshold)
    assert alone.ids == done.ids and len(alone.insertions) == yes
  assert high != low
  # Where no latents are asked for, the gate is not.
  off = complete(lm, **options, gate="entropy:inf", latents=[True, False, True])
  assert [len(x.declined) for x in off] == [1, 0, 1]


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
