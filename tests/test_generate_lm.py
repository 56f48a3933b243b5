"""Text in, text out, on the decoder and coprocessor that ship."""

import numpy as np
import pytest

import cacheaug
from cacheaug.errors import UserError
from cacheaug.inference.sampling import Sampling
from cacheaug.inference.session import InsertionSchedule

pytestmark = pytest.mark.usefixtures("as_users_compile")

PROMPTS = [
  "def main(argv):\n  for name in argv[1:]:\n    print(",
  "a=4;b=a+3;c=b-2;d=c+6;e=d+1;f=e-3;f=",
  "import os",
]
NEW = 24


@pytest.fixture(scope="module")
def lm():
  """Compiled as users have it: rounding is what some of these are about."""
  return cacheaug.load("shipped:tiny").with_coprocessor(
    "shipped:tiny_coprocessor"
  )


@pytest.fixture(scope="module")
def plain(lm):
  return lm.complete(PROMPTS, NEW, latents=False, scored=True)


def test_without_latents_bit_for_bit_plain_decoding(lm, plain):
  """Whatever the neighbours have, and however many slots wait for latents."""
  for plan in (
    InsertionSchedule(),
    InsertionSchedule(every=1),
  ):  # 64 slots as plain decoding, and 192
    mixed = lm.complete(
      PROMPTS, NEW, latents=[True, False, False], plan=plan, scored=True
    )
    assert len(mixed[0].insertions) == (NEW if plan.every else 1)
    for one, other in zip(mixed[1:], plain[1:], strict=True):
      assert one.ids == other.ids and not one.insertions
      assert one.nll.tobytes() == other.nll.tobytes()
    assert mixed[0].nll.tobytes() != plain[0].nll.tobytes()
    everywhere = lm.complete(PROMPTS, NEW, plan=plan, scored=True)
    assert everywhere[0].ids == mixed[0].ids
    assert everywhere[0].nll.tobytes() == mixed[0].nll.tobytes()


def test_stream_joins_to_the_whole_and_stops_where_it_does(lm, plain):
  stop = [plain[0].text[7:10], plain[1].text[3:5]]
  cut = [min((x.text + s).index(s) for s in stop) for x in plain]
  expected = [x.text[:end] for x, end in zip(plain, cut, strict=True)]
  assert expected != [x.text for x in plain] and any(expected)
  done = lm.complete(PROMPTS, NEW, latents=False, stop=stop)
  assert [x.text for x in done] == expected
  for x, whole in zip(done, plain, strict=True):
    assert x.ids == whole.ids[: len(x.ids)]
    assert x.ids == whole.ids or lm.tokenizer.decode(x.ids).endswith(
      tuple(stop)
    )
  texts, count = [""] * 3, 0
  for i, piece in lm.stream(PROMPTS, NEW, latents=False, stop=stop):
    texts[i] += piece
    count += 1
  assert texts == expected and count > 6


def test_draws_repeat_by_seed_whatever_the_other_prompts(lm):
  law = dict(sampling=Sampling(0.8, top_k=40, top_p=0.9), latents=False)
  first = lm.generate(PROMPTS, NEW, **law, seed=5)
  assert first == lm.generate(PROMPTS, NEW, **law, seed=5)
  assert first != lm.generate(PROMPTS, NEW, **law, seed=6)
  others = [PROMPTS[0], "class A:", "x"]
  assert lm.generate(others, NEW, **law, seed=5)[0] == first[0]
  greedy = lm.generate(PROMPTS, NEW, latents=False)
  one = Sampling(0.8, top_k=1)
  assert lm.generate(PROMPTS, NEW, latents=False, sampling=one) == greedy


@pytest.mark.parametrize(
  "options, message",
  (
    (dict(latents=[True]), "latents names 1 prompts of 3"),
    (dict(stop="a"), "stop is one string"),
    (dict(stop=["a", ""]), "stop holds an empty string"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
    (dict(max_new_tokens=1001), "and 1001 new ones exceed"),
    (dict(prompts=["a", "abcd"]), "prompt 0 has 2 tokens.*at least 4"),
    (
      dict(prompts=["a"], plan=InsertionSchedule(at=(1,))),
      "has 2 tokens.*at least 3",
    ),
  ),
)
def test_what_cannot_be_done_is_refused(lm, options, message):
  with pytest.raises(UserError, match=message):
    lm.generate(**(dict(prompts=PROMPTS) | options))


def test_what_can_be_done_is_not(lm):
  assert len(lm.generate(["a", "abcd"], 2, latents=[False, True])) == 2
  late = InsertionSchedule(at=(2,))
  assert len(lm.generate(["a", "abcd"], 6, plan=late)) == 2
  assert lm.complete([], 3) == [] and list(lm.stream([])) == []
  frozen = cacheaug.load("shipped:tiny")
  with pytest.raises(UserError, match="no coprocessor is attached"):
    frozen.generate(["abcd"], latents=[False])
  _, done = lm.complete(["a", "abcd"], 2, latents=False, scored=True)
  assert done.prompt == (2, *lm.tokenizer.encode("abcd"))
  assert done.nll.shape == (2,) and np.isfinite(done.nll).all()
