"""The coprocessor in a thread: late, lost or absent, decoding goes on."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from test_generate import N, embed, model_and_params, prompts, spec_of
from test_generate_engine import (
  NEW,
  coproc_of,
  coprocessor_over,
  plain_logits,
  read,
)
from tolerances import far

from cacheaug.errors import UserError
from cacheaug.inference.session import InsertionSchedule, Session
from cacheaug.model import decode_rows
from cacheaug.projects.background import session as background
from cacheaug.projects.background import worker
from cacheaug.projects.background.session import BackgroundSession
from cacheaug.projects.background.worker import Limits, Worker

SPEC = spec_of("replace")


@pytest.fixture
def warnings(monkeypatch):
  """What the worker logs."""
  lines = []
  monkeypatch.setattr(
    worker.logging, "warning", lambda line, *a: lines.append(line % a)
  )
  return lines


class Gate(Worker):
  """Computes nothing before its gate is open."""

  def __init__(self, spec=SPEC, **options):
    self.gate, self.entered = threading.Event(), threading.Event()
    model, _ = model_and_params()
    super().__init__(model, coproc_of(spec), spec, **options)

  def compute(self, taken):
    self.entered.set()
    self.gate.wait()
    return super().compute(taken)

  def close(self):
    self.gate.set()
    super().close()


class Prompt(Gate):
  """Has latents before the next token: late by 0."""

  def submit(self, take, **options):
    self.gate.set()
    job = super().submit(take, **options)
    assert job is None or job.wait(60)
    return job


class Broken(Worker):
  """Fails in one of many ways."""

  def __init__(self, fail, **options):
    self._fault = fail
    model, _ = model_and_params()
    super().__init__(model, coproc_of(SPEC), SPEC, **options)

  def compute(self, taken):
    return self._fault(super().compute(taken))

  def submit(self, take, **options):
    job = super().submit(take, **options)
    if job is not None:
      job.wait(60)
    return job


def session(of=None, **options):
  model, decoder = model_and_params()
  return BackgroundSession(
    model,
    decode_rows.unstack_layers(decoder),
    read(),
    max_new_tokens=NEW,
    worker=of,
    **{"poll_every": 1, "scored": True} | options,
  )


def synchronous(spec=None, **options):
  model, decoder = model_and_params()
  one = Session(
    model,
    decode_rows.unstack_layers(decoder),
    read(),
    max_new_tokens=NEW,
    coproc=spec and coproc_of(spec),
    spec=spec,
    scored=True,
    **options,
  )
  one.run(NEW)
  return one


def bits(done, rows=slice(None)):
  """Tokens, their nll, and the last hidden state."""
  state = done.state
  parts = state.generated, state.nll, state.hidden, state.position
  return [np.asarray(x)[rows].tobytes() for x in parts]


def raises(_):
  raise RuntimeError("out of\nmemory")


def dies(_):
  raise SystemExit


FAULTS = {
  "raises": raises,
  "dies": dies,
  "not finite": lambda out: np.full_like(out, np.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_worker_is_the_frozen_decoder(fault, warnings):
  with Broken(FAULTS[fault]) as broken:
    one = session(broken, plan=InsertionSchedule(every=2))
    one.run(NEW)
    again = session(broken)
    again.run(NEW)
    found = broken.metrics()
  assert bits(one) == bits(again) == bits(synchronous())
  assert found.failed == found.asked == 3 * 3 + 3 and not found.hit_rate
  assert len(warnings) == 1 and "\n" not in warnings[0]
  assert "decoding goes on without latents" in warnings[0]


def test_no_worker_or_one_that_is_off_or_closed(warnings):
  plain = bits(synchronous())
  with Gate() as on:
    runs = [session(), session(on, on=[False] * 3)]
    for one in runs:
      one.run(NEW)
    assert on.metrics().asked == 0
  runs.append(session(on))
  runs[-1].run(NEW)
  assert all(bits(one) == plain for one in runs)
  assert on.metrics().cancelled == 3 and not warnings


def test_time_outs(warnings):
  """Decoding is over while the pass still hangs."""
  with Gate(limits=Limits(timeout=0.05)) as slow:
    one = session(slow, plan=InsertionSchedule(every=1))
    one.run(1)
    slow.entered.wait(60)
    job = one._jobs[0]
    while not slow.failure:
      job.wait(0.05)
      slow.check()
    one.run(NEW)
    assert one.finished and not slow.gate.is_set()
    assert bits(one) == bits(synchronous())
    slow.gate.set()
  assert len(warnings) == 1 and "one pass took over 0.05 s" in warnings[0]
  assert slow.metrics().failed == slow.metrics().asked == 3 * NEW


def test_decoding_never_waits(warnings):
  with Gate() as stuck:
    one = session(stuck, poll_every=2)
    one.run(NEW)
    assert one.finished and bits(one) == bits(synchronous())
    found = stuck.metrics()
    assert (found.asked, found.cancelled, found.inserted) == (3, 3, 0)
  assert not warnings


@pytest.mark.parametrize(
  "scheme, start",
  (("replace", "harmless"), ("overlay", "harmless"), ("insert", "as_is")),
)
def test_late_by_nothing_is_the_synchronous_path(scheme, start):
  """Bit for bit, for some of a batch, and one on top of the other."""
  spec = spec_of(scheme, start)
  options = dict(on=[True, False, True], plan=InsertionSchedule(every=2))
  with Prompt(spec) as prompt:
    one = session(prompt, **options)
    one.run(NEW)
    found = prompt.metrics()
  expected = synchronous(spec, **options)
  assert bits(one) == bits(expected)
  far(one.state.hidden[0], synchronous().state.hidden[0])
  assert bits(one, 1) == bits(synchronous(), 1)
  for late, there in zip(one.insertions, expected.insertions, strict=True):
    assert dataclasses.asdict(late) == dataclasses.asdict(there) | {"late": 0}
  assert found.lateness == {0: 6} and found.hit_rate == 1
  assert found.queue.count == found.compute.count == 3
  assert 0 < found.compute.mean <= found.compute.longest


def late_by_hand(prompt, spec, late):
  """Each token by a whole pass; latents of the prompt's end after `late`."""
  x, positions, text = embed(prompt), list(range(len(prompt))), list(prompt)
  longest = max(map(len, prompts())) + NEW + N * 3
  shift = N if spec.positions == "insert" else 0
  at = np.arange(len(prompt) - N, len(prompt)) + shift
  more = longest - len(x)
  out = coprocessor_over(spec.start)(
    np.pad(x, ((0, more), (0, 0)))[None],
    np.pad(positions, (0, more)).astype(np.int32)[None],
    (np.arange(longest) < len(x)).astype(np.int32)[None],
    embed(prompt[-N:])[None],
    at[None],
  )
  for step in range(NEW):
    if step == late:
      z = out
      if spec.start == "harmless":
        z = out - embed(prompt[-N:]) + embed(text[-N:])
      keep = len(x) - (N if spec.positions == "replace" else 0)
      x = np.concatenate([x[:keep], z])
      positions = [*positions[:keep], *(at + late).tolist()]
    text.append(int(plain_logits(x, positions, longest).argmax()))
    x = np.concatenate([x, embed(text[-1:])])
    positions.append(positions[-1] + 1)
  return text[len(prompt) :]


def late_by(late, spec=SPEC, **options):
  """A session whose latents come after so many tokens, and the metrics."""
  with Gate(spec) as gate:
    one = session(gate, **options)
    one.run(late)
    (job,) = one._jobs
    gate.gate.set()
    assert job.wait(60)
    one.run(NEW)
    return one, gate.metrics()


@pytest.mark.parametrize(
  "scheme, start, late",
  (
    ("replace", "harmless", 2),
    ("insert", "as_is", 1),
    ("insert", "harmless", 3),
  ),
)
def test_late_latents_as_by_hand(scheme, start, late):
  spec = spec_of(scheme, start)
  one, found = late_by(late, spec)
  said = np.asarray(one.state.generated).tolist()
  assert said == [late_by_hand(p, spec, late) for p in prompts()]
  assert [(x.step, x.late) for x in one.insertions] == [(late, late)] * 3
  shift = N if scheme == "insert" else 0
  first = [len(p) + late - N + shift for p in prompts()]
  assert [x.position for x in one.insertions] == first
  assert found.lateness == {late: 3}
  far(one.state.hidden, synchronous().state.hidden)
  # Not what latents computed on the spot would have been.
  on_time = synchronous(spec, plan=InsertionSchedule(at=(late,)))
  far(one.state.hidden, on_time.state.hidden)


def test_a_snapshot_shares_nothing_with_the_state():
  one = session()
  taken = background.snapshot(one._model, one._decoder, one.state, spec=SPEC)
  before = [np.array(x) for x in jax.tree.leaves(taken)]
  slots = np.array(one.state.cache.positions)
  one.run(3)
  assert not np.array_equal(slots, one.state.cache.positions)
  for x, there in zip(jax.tree.leaves(taken), before, strict=True):
    np.testing.assert_array_equal(x, there)


def test_slots_for_latents_are_made_when_they_come():
  """Decoding is as fast as without a worker, as long as nothing comes."""
  plain = session().state.cache.positions.shape
  with Gate() as gate:
    # Room for more latents than the last of the plain slots would hold.
    one = session(gate, plan=InsertionSchedule(after=(36,), most=40))
    one.run(3)
    assert one.state.cache.positions.shape == plain
    gate.gate.set()
    one._jobs[0].wait(60)
    before = np.array(one.state.cache.positions)
    one.run(NEW - 3)
  assert len(one.insertions) == 3
  after = one.state.cache
  assert after.positions.shape[1] > plain[1]
  np.testing.assert_array_equal(after.positions[:, :9], before[:, :9])


def test_a_full_queue_refuses(warnings):
  with Gate(limits=Limits(waiting=1)) as gate:
    one = session(gate, plan=InsertionSchedule(every=1))
    one.run(1)  # Its snapshot is being worked on, the next one waits.
    assert gate.entered.wait(60)
    one.run(NEW)
    found = gate.metrics()
  assert bits(one) == bits(synchronous()) and not warnings
  assert found.asked == 3 * NEW and found.refused == 3 * (NEW - 2)
  assert found.cancelled == 6


@pytest.mark.parametrize("limits", (Limits(tokens=2), Limits(seconds=0.0)))
def test_deadlines(limits):
  with Gate(limits=limits) as gate:
    one = session(gate)
    one.run(3)
    gate.gate.set()
    one.run(NEW)
    found = gate.metrics()
  assert (found.asked, found.expired, found.inserted) == (3, 3, 0)
  assert bits(one) == bits(synchronous())


def test_in_time_for_the_deadline():
  with Gate(limits=Limits(tokens=2)) as gate:
    one = session(gate)
    one.run(2)
    (job,) = one._jobs
    gate.gate.set()
    assert job.wait(60)
    one.run(NEW)
    assert gate.metrics().lateness == {2: 3}


def test_sequences_that_end_meanwhile():
  with Gate() as gate:
    one = session(gate)
    one.run(2)
    (job,) = one._jobs
    one.end(1)
    gate.gate.set()
    assert job.wait(60)
    one.run(NEW)
    found = gate.metrics()
  whole, _ = late_by(2)
  assert (found.cancelled, found.inserted) == (1, 2)
  assert {x.sequence for x in one.insertions} == {0, 2}
  assert bits(one, [0, 2]) == bits(whole, [0, 2])


def test_work_for_nobody_is_dropped():
  with Gate(limits=Limits(waiting=1)) as gate:
    first, other = session(gate), session(gate)
    first.run(1)
    assert gate.entered.wait(60)
    other.run(1)
    (job,) = other._jobs
    for i in range(3):
      other.end(i)
    other.run(1)
    other.close()
    assert job.outcome == "cancelled" and job.taken is None
    third = session(gate)  # There is room again.
    third.run(1)
    assert len(third._jobs) == 1
    gate.gate.set()
    for one in (first, third):
      assert one._jobs[0].wait(60)
      one.run(NEW)
    found = gate.metrics()
  late, _ = late_by(1)
  assert bits(first) == bits(third) == bits(late)
  assert (found.asked, found.inserted, found.cancelled) == (9, 6, 3)
  assert found.compute.count == 2


def test_later_latents_overtake():
  with Gate() as gate:
    one = session(gate, plan=InsertionSchedule(at=(0, 2)))
    one.run(3)
    old, new = one._jobs
    gate.gate.set()
    assert old.wait(60) and new.wait(60)
    one.run(NEW)
    found = gate.metrics()
  assert [(x.step, x.late) for x in one.insertions] == [(3, 1)] * 3
  assert (found.expired, found.inserted) == (3, 3)
  # As if the first had never been asked for.
  with Gate() as gate:
    alone = session(gate, plan=InsertionSchedule(at=(2,)))
    alone.run(3)
    gate.gate.set()
    assert alone._jobs[0].wait(60)
    alone.run(NEW)
  assert np.array_equal(one.state.generated, alone.state.generated)


def test_latents_after_a_token():
  plain = synchronous()
  token = int(plain.state.generated[0, 1])
  plan = InsertionSchedule(at=(), after=(token,), most=1)
  with Prompt() as prompt:
    one = session(prompt, plan=plan, poll_every=4)
    one.run(NEW)
  assert bits(one) == bits(synchronous(SPEC, plan=plan))
  assert one.insertions


def test_no_thread_is_left(monkeypatch, warnings):
  before = threading.active_count()
  with Prompt() as gate:
    assert threading.active_count() == before + 1
    gate.close()
  assert threading.active_count() == before and not warnings
  # One that hangs is named, once, and forgotten.
  monkeypatch.setattr(worker, "_GRACE", 0.05)
  stuck = Gate()
  one = session(stuck)
  one.run(1)
  assert stuck.entered.wait(60)
  for _ in range(2):
    Worker.close(stuck)
  assert len(warnings) == 1 and "after it was closed" in warnings[0]
  one.run(NEW)
  assert bits(one) == bits(synchronous())
  stuck.gate.set()
  stuck._thread.join(60)
  assert threading.active_count() == before and len(warnings) == 1


def test_where_it_computes():
  devices = jax.local_devices()
  with Gate() as spare, Gate(device=devices[3]) as given:
    for one, device in ((spare, devices[1]), (given, devices[3])):
      assert {device} == {
        d for x in jax.tree.leaves(one._coproc) for d in x.devices()
      }


@pytest.mark.parametrize(
  "changes, message",
  (
    (dict(waiting=0), "waiting=0 must be at least 1"),
    (dict(tokens=-1), "tokens=-1 must be 0 or more"),
    (dict(seconds=-0.5), "seconds=-0.5 must be 0 or more"),
    (dict(timeout=0.0), "timeout=0.0 must be more than 0"),
  ),
)
def test_limits_that_are_none(changes, message):
  with pytest.raises(UserError, match=message):
    Limits(**changes)
  with pytest.raises(UserError, match="poll_every=0 must be at least 1"):
    session(poll_every=0)
