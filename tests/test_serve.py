"""Many requests through one small batch: none lost, none crossed."""

import random
import threading
import time

import pytest
import test_background
import tolerances
from test_background import SPEC, Broken, Gate, Prompt, late_by_hand, raises
from test_generate import N, model_and_params, naive, prompts, spec_of
from test_generate_engine import NEW, coproc_of

from cacheaug.errors import UserError
from cacheaug.inference.sampling import Sampling
from cacheaug.inference.session import InsertionSchedule
from cacheaug.model import decode_rows
from cacheaug.projects.background.serve import Server
from cacheaug.projects.background.worker import Worker

warnings = test_background.warnings
B = 3


def server(worker=None, **options):
  model, decoder = model_and_params()
  return Server(
    model,
    decode_rows.unstack_layers(decoder),
    worker=worker,
    **{"max_new_tokens": NEW, "batch": B, "poll_every": 2} | options,
  )


def ask(one, *given, **options):
  """Answers in the order of the prompts given."""
  numbers = [one.submit(prompt, **options) for prompt in given]
  found = {answer.request: answer for answer in one.answers()}
  assert set(numbers) == set(found) and not one.pending
  return [found[number] for number in numbers]


def test_the_frozen_decoder():
  found = ask(server(), *prompts())
  assert [list(x.ids) for x in found] == [naive(p) for p in prompts()]
  assert {x.ended for x in found} == {"length"}
  assert not any(x.error or x.insertions for x in found)


def test_latents_in_time_and_late(warnings):
  with Prompt() as prompt:
    found = ask(server(prompt), *prompts())
    off = ask(server(prompt), *prompts(), latents=False)
  assert [list(x.ids) for x in found] == [naive(p, SPEC) for p in prompts()]
  assert [list(x.ids) for x in off] == [naive(p) for p in prompts()]
  with Gate() as gate:
    one = server(gate)
    numbers = [one.submit(prompt) for prompt in prompts()]
    assert one.step() == []
    gate.gate.set()
    assert one._session._jobs[0].wait(60)
    found = {x.request: x for x in one.answers()}
  for number, prompt in zip(numbers, prompts(), strict=True):
    assert list(found[number].ids) == late_by_hand(prompt, SPEC, 2)
    assert [x.late for x in found[number].insertions] == [2]
  assert not warnings


def test_a_broken_worker(warnings):
  with Broken(raises) as broken:
    found = ask(server(broken), *prompts() * 3)
  assert [list(x.ids) for x in found] == [naive(p) for p in prompts()] * 3
  assert len(warnings) == 1


def test_none_lost_none_crossed():
  """Alone or among others, an answer is the same, whatever they do."""
  model, _ = model_and_params()
  rng = random.Random(0)
  lengths = (3, 9, 20, 40)
  asked = [
    (tolerances.tokens_of(model, n, seed=100 + i).tolist(), on, most)
    for i, n in enumerate(lengths * 2)
    for on, most in ((True, NEW), (False, 1 + i % NEW))
  ]
  law = Sampling(1.0)

  def submit(one, what):
    prompt, on, most = what
    seed = len(prompt)
    return one.submit(prompt, latents=on, max_new_tokens=most, seed=seed)

  with Prompt() as prompt:
    alone = []
    for what in asked:
      one = server(prompt, sampling=law)
      submit(one, what)
      (answer,) = one.answers()
      assert answer.ended == "length" and len(answer.ids) == what[2]
      alone.append(answer.ids)
    assert len(set(alone)) > len(asked) / 2
    one, found, which = server(prompt, sampling=law), {}, {}
    for i in rng.choices(range(len(asked)), k=60):
      which[submit(one, asked[i])] = i
      if not rng.randrange(4):
        found |= {x.request: x for x in one.step()}
      if not rng.randrange(8):
        one.cancel(rng.choice(list(which)))
    for answer in one.answers():
      assert answer.request not in found
      found[answer.request] = answer
  assert set(found) == set(which)
  cut = [x for x in found.values() if x.ended == "cancelled"]
  assert 0 < len(cut) < 20
  for number, answer in found.items():
    ids = alone[which[number]]
    assert answer.ids == ids[: len(answer.ids)]
    if answer.ended != "cancelled":
      assert answer.ids == ids and answer.ended == "length"
    on = asked[which[number]][1]
    assert len(answer.insertions) <= on
    if on and answer.ended == "length":
      assert answer.insertions


def test_with_a_real_worker_all_are_answered():
  """Latents come when they come; prompts without them are not touched."""

  class Slow(Worker):
    def compute(self, taken):
      time.sleep(0.002)
      return super().compute(taken)

  model, _ = model_and_params()
  with Slow(model, coproc_of(SPEC), SPEC) as slow:
    one = server(slow, poll_every=1)
    on = [one.submit(p) for p in prompts() * 5]
    off = [one.submit(p, latents=False) for p in prompts() * 5]
    found = {x.request: x for x in one.answers()}
    counts = slow.metrics()
  assert set(found) == {*on, *off}
  for number, prompt in zip(off, prompts() * 5, strict=True):
    assert list(found[number].ids) == naive(prompt)
  late = [x.late for number in on for x in found[number].insertions]
  assert counts.asked == len(on) == counts.inserted + counts.cancelled
  assert sorted(late) == sorted(counts.lateness.elements())
  for number, prompt in zip(on, prompts() * 5, strict=True):
    for x in found[number].insertions:
      assert list(found[number].ids) == late_by_hand(prompt, SPEC, x.late)


def test_stop_tokens_and_lengths():
  plain = naive(prompts()[0])
  one = server(stop_ids=(plain[3],))
  found = ask(one, *prompts())
  assert found[0].ended == "stop"
  assert list(found[0].ids) == plain[: plain.index(plain[3])]
  (short,) = ask(one, prompts()[0], max_new_tokens=2)
  assert (short.ended, list(short.ids)) == ("length", plain[:2])


def test_what_cannot_be_asked():
  """One line each; the others do not notice."""
  spec = spec_of("insert", "harmless")
  with Prompt(spec) as prompt:
    one = server(prompt)
    limit = model_and_params()[0].config.max_positions
    wrong = {
      one.submit([]): "the prompt is empty",
      one.submit([1, 2]): f"has 2 tokens: with latents={N} it needs at least 3",
      one.submit([1] * limit): f"exceed the decoder's {limit} positions",
      one.submit(
        [1] * (limit - NEW)
      ): f"{limit - NEW + N} tokens and {NEW} new",
      one.submit([1, 37, 2]): "37 is not a token from 0 to 36",
      one.submit([1, -1, 2]): "-1 is not a token",
      one.submit("text"): "not a list of tokens",
      one.submit([[1, 2], [3]]): "not a list of tokens",
      one.submit([1] * 4, max_new_tokens=0): "max_new_tokens=0 is not from 1",
      one.submit([1] * 4, max_new_tokens=NEW + 1): f"to the server's {NEW}",
    }
    right = [one.submit(p, latents=False) for p in prompts()]
    short = one.submit([1, 2], latents=False)
    found = {x.request: x for x in one.answers()}
  assert set(found) == {*wrong, *right, short}
  for number, message in wrong.items():
    answer = found[number]
    assert answer.ended == "error" and not answer.ids
    assert message in answer.error and "\n" not in answer.error
  assert [list(found[x].ids) for x in right] == [naive(p) for p in prompts()]
  assert len(found[short].ids) == NEW


def test_short_prompts_before_later_latents():
  with Prompt() as prompt:
    (found,) = ask(server(prompt, plan=InsertionSchedule(at=(2,))), [1])
    assert not found.error and found.insertions[0].step == 2
    after = InsertionSchedule(at=(2,), after=(5,))
    (found,) = ask(server(prompt, plan=after), [1])
    assert "it needs at least 3" in found.error


def test_cancelling():
  one = server()
  numbers = [one.submit(p) for p in prompts() * 2]
  assert one.step() == []
  assert one.cancel(numbers[0]) and one.cancel(numbers[5])
  found = {x.request: x for x in one.answers()}
  assert set(found) == set(numbers)
  assert found[numbers[5]].ids == () and found[numbers[5]].ended == "cancelled"
  cut = found[numbers[0]]
  assert cut.ended == "cancelled"
  assert list(cut.ids) == naive(prompts()[0])[: len(cut.ids)]
  assert 2 <= len(cut.ids) < NEW
  assert list(found[numbers[1]].ids) == naive(prompts()[1])
  assert not any(one.cancel(x) for x in (*numbers, 99))
  # All at once: what waits, and what runs.
  numbers = [one.submit(p) for p in prompts() * 2]
  one.step()
  one.close()
  found = {x.request: x for x in one.answers()}
  assert set(found) == set(numbers)
  assert {x.ended for x in found.values()} == {"cancelled"}


def test_requests_from_many_threads():
  one, which = server(), {}

  def submit(i):
    for _ in range(5):
      which[one.submit(prompts()[i])] = i

  threads = [threading.Thread(target=submit, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  found = []
  while len(found) < 15:
    found += one.step()
  for thread in threads:
    thread.join()
  assert {x.request for x in found} == set(which)
  for answer in found:
    assert list(answer.ids) == naive(prompts()[which[answer.request]])


@pytest.mark.parametrize("name", ("max_new_tokens", "batch", "poll_every"))
def test_servers_that_are_none(name):
  with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
    server(**{name: 0})
