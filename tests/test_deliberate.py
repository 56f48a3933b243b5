"""Contexts to a store and back, and `python -m cacheaug.deliberate`."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from absl import flags
from cases import slow_but

from cacheaug.augment.traces import Layout
from cacheaug.data.tokenizers import ByteTokenizer
from cacheaug.errors import UserError
from cacheaug.inference.session import InsertionSchedule
from cacheaug.lm import LM, Coprocessor
from cacheaug.projects.context_store.lm import (
  context_of,
  entries_of,
  with_store,
)
from cacheaug.projects.context_store.store import Store

_ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["the first of two documents, and its end", "the second"]
NEW = 6


def make(scheme) -> LM:
  model = tolerances.make_model(vocab_size=260, max_positions=256)
  spec = Layout(2, 4, scheme)
  return LM(
    model=model,
    decoder=tolerances.make_params(model),
    tokenizer=ByteTokenizer(),
    fingerprint="tiny",
    coprocessor=Coprocessor(tolerances.make_coprocessor(model, spec), spec),
  )


@pytest.fixture(scope="module")
def lm():
  return make("replace")


@pytest.fixture(
  scope="module", params=slow_but(["replace", "insert"], quick=(0,))
)
def either(request):
  return make(request.param)


@pytest.fixture
def infos():
  """What is logged from INFO on."""
  found = []

  class Keep(logging.Handler):
    def emit(self, record):
      found.append(record.getMessage())

  handler, logger = Keep(), logging.getLogger("absl")
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  yield found
  logger.removeHandler(handler)
  logger.setLevel(level)


def test_a_batch_comes_back_bit_for_bit(lm, tmp_path):
  store = with_store(lm, Store(tmp_path))
  rows = [lm.encode(text) for text in TEXTS]
  plain = lm.prefill(rows)
  for latents, context in ((False, plain), (True, lm.augment(plain))):
    for entry in entries_of(context):
      store.store.put(store.identity(latents), entry)
    back = context_of(
      [
        store.store.get(
          store.identity(latents), row, (len(row),) if latents else ()
        )
        for row in rows
      ]
    )
    assert back.augmented == latents
    there = np.asarray(context.cache.segments) > 0
    assert there.sum(1).tolist() == (back.cache.segments > 0).sum(1).tolist()
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(context),
      jax.tree.leaves(back),
      strict=True,
    ):
      x, y = np.asarray(x), np.asarray(y)
      name = jax.tree_util.keystr(path)
      assert (x.shape, x.dtype) == (y.shape, y.dtype), name
      if "cache" in name:
        axis = 1 if x.ndim == 5 else 0
        x, y = (np.moveaxis(a, (axis, axis + 1), (0, 1))[there] for a in (x, y))
      assert x.tobytes() == y.tobytes(), name
    np.testing.assert_array_equal(lm.decode(back, NEW), lm.decode(context, NEW))


@pytest.mark.usefixtures("as_users_compile_here")
def test_decoding_from_the_store_is_decoding_right_after(
  either, tmp_path, infos
):
  store = with_store(either, Store(tmp_path), keep=True)
  options = dict(latents=[True, False], scored=True)
  plain = either.complete(TEXTS, NEW, **options)
  first = store.complete(TEXTS, NEW, **options)
  assert infos[-1] == "store: 0 of 2 prompts were begun in it"
  again = with_store(either, Store(tmp_path)).complete(TEXTS, NEW, **options)
  assert infos[-1] == "store: 2 of 2 prompts were begun in it"
  for a, b, c in zip(plain, first, again, strict=True):
    assert a.ids == b.ids == c.ids
    assert b.nll.tobytes() == c.nll.tobytes()
    tolerances.close(a.nll, c.nll, tolerances.NLL)
  off = either.complete(TEXTS, NEW, latents=False, scored=True)
  tolerances.far(off[0].nll, plain[0].nll)
  # Latents that are planned for later come on top, where they would.
  plan = InsertionSchedule(at=(0, 3))
  options = dict(latents=True, plan=plan, scored=True)
  a, b = (
    either.complete(TEXTS, NEW, **options),
    store.complete(TEXTS, NEW, **options),
  )
  for x, y in zip(a, b, strict=True):
    assert x.ids == y.ids
    tolerances.close(x.nll, y.nll, tolerances.NLL)
    assert [(i.step, i.position) for i in x.insertions][1:] == [
      (i.step, i.position) for i in y.insertions
    ]


def test_a_prompt_goes_on_from_its_stored_beginning(either, tmp_path, infos):
  store = with_store(either, Store(tmp_path))
  rows = [either.encode(text) for text in TEXTS]
  more = [" - a question?", " - and another one, of more than 32 tokens"]
  prompts = [a + b for a, b in zip(TEXTS, more, strict=True)]
  for row in rows:  # apart, so that each counts its positions from its own
    assert store.fill([row], False, 1) == [True]
  plain = either.complete(prompts, NEW, latents=False, scored=True)
  found = store.complete(prompts, NEW, latents=False, scored=True)
  assert infos[-1] == "store: 2 of 2 prompts were begun in it"
  for a, b in zip(plain, found, strict=True):
    assert a.ids == b.ids
    tolerances.close(a.nll, b.nll, tolerances.NLL)
  augmented = either.complete(prompts, NEW, scored=True)
  found = store.complete(prompts, NEW, scored=True)
  for a, b in zip(augmented, found, strict=True):
    assert a.ids == b.ids
    tolerances.close(a.nll, b.nll, tolerances.NLL)
  # With latents at the document's end: as the training's passes have it.
  assert store.fill(rows, True, 2) == [True, True]
  found = store.complete(prompts, NEW, scored=True)
  for row, done, frozen in zip(rows, found, plain, strict=True):
    whole = [*done.prompt, *done.ids]
    want = either.nll([whole], [[len(row) - 1]], len(whole) - len(row))[0, 0]
    tolerances.close(done.nll, want[-NEW:], tolerances.NLL)
    if done.ids == frozen.ids:
      tolerances.far(done.nll, frozen.nll)
    assert not done.insertions
  assert len(store.store.files()) == 4  # nothing was kept beside


def test_contexts_of_other_weights_or_specs_are_not_found(lm, tmp_path):
  store = with_store(lm, Store(tmp_path))
  row = lm.encode(TEXTS[0])
  for latents in (False, True):
    store.fill([row], latents, 1)
    assert store.has(row, latents)

  def nudged(tree):
    """One weight's last bit, which bfloat16 does not have."""
    leaves, structure = jax.tree.flatten(tree)
    leaf = np.array(leaves[0])
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(9))
    return structure.unflatten([jnp.asarray(leaf), *leaves[1:]])

  config = dataclasses.replace(lm.model.config, final_softcap=6.0)
  coproc, spec = lm.coprocessor, lm.coprocessor.spec
  for latents, changes in (
    ((False, True), dict(decoder=nudged(lm.decoder))),
    ((False, True), dict(model=lm.model.clone(config=config))),
    ((False, True), dict(model=lm.model.clone(dtype=jnp.bfloat16))),
    ((True,), dict(coprocessor=Coprocessor(nudged(coproc.params), spec))),
    (
      (True,),
      dict(
        coprocessor=Coprocessor(
          coproc.params, dataclasses.replace(spec, positions="overlay")
        )
      ),
    ),
  ):
    other = with_store(dataclasses.replace(lm, **changes), store.store)
    for kind in (False, True):
      assert other.has(row, kind) == (kind not in latents), changes.keys()
      if kind in latents:
        longest = store.store.longest(other.identity(kind), row)
        assert longest is None
  bare = with_store(dataclasses.replace(lm, coprocessor=None), store.store)
  assert bare.has(row, False)
  with pytest.raises(UserError, match="no coprocessor"):
    bare.has(row, True)


def test_a_damaged_context_is_computed_again(lm, tmp_path, infos):
  store = with_store(lm, Store(tmp_path), keep=True)
  want = store.complete(TEXTS[:1], NEW, scored=True)
  for _, path, size in store.store.files():
    data = bytearray(path.read_bytes())
    data[size // 2] ^= 1
    path.write_bytes(data)
  infos.clear()
  found = store.complete(TEXTS[:1], NEW, scored=True)
  assert found[0].ids == want[0].ids
  assert found[0].nll.tobytes() == want[0].nll.tobytes()
  assert ["damaged" in line for line in infos] == [True, True, False]
  infos.clear()
  store.complete(TEXTS[:1], NEW)
  assert infos == ["store: 1 of 1 prompts were begun in it"]


def test_reading_on_past_the_positions_is_refused(lm, tmp_path):
  store = with_store(lm, Store(tmp_path))
  (entry,) = entries_of(lm.prefill([lm.encode(TEXTS[1])]))
  with pytest.raises(UserError, match="exceed the decoder's 256 positions"):
    store.read_on(entry, [5] * 250)


@pytest.fixture(scope="module")
def command():
  """The module; its flags are the process's while these tests run."""
  before = set(flags.FLAGS)
  from cacheaug import deliberate

  yield deliberate
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  sys.modules.pop("cacheaug.deliberate")


def write(path, *texts):
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  return f"--documents={path}"


def test_bad_input_is_one_line(command, tmp_path):
  (tmp_path / "empty").write_text("\n")
  (tmp_path / "half").write_text('{"text": "whole"}\n\n{"text": "ha\n')
  good = write(tmp_path / "good.jsonl", "a document of some length")
  store = f"--store={tmp_path / 'store'}"
  (tmp_path / "file").write_text("")
  for arguments, message in (
    ([], "--documents is missing"),
    ([good], "--store is missing"),
    ([good, store, "--batch=0"], "--batch=0 must be"),
    ([good, store, "--max_bytes=-1"], "max_bytes=-1 must be"),
    ([good, f"--store={tmp_path / 'file'}"], "cannot be a store"),
    ([good, store, "--field=body"], "object 1: no field 'body'"),
    ([f"--documents={tmp_path / 'none'}", store], "no such file"),
    ([f"--documents={tmp_path / 'empty'}", store], "no text in"),
    ([f"--documents={tmp_path / 'half'}", store], "object 2: not JSON"),
  ):
    flags.FLAGS(["deliberate", *arguments])
    with pytest.raises(UserError, match=message):
      command.main()
    flags.FLAGS.unparse_flags()
    for name in ("documents", "store", "batch", "max_bytes", "field"):
      flags.FLAGS[name].unparse()
  assert not list((tmp_path / "store").glob("*"))


def test_documents_of_one_length_go_together(command):
  todo = [(32, 0), (32, 4), (32, 5), (64, 1), (64, 2)]
  assert command.batches(todo, 2) == [[0, 4], [5], [1, 2]]
  assert command.batches([], 2) == []


def test_fill_then_resume_then_generate(tmp_path):
  def run(module, *arguments):
    return subprocess.run(
      [sys.executable, "-m", f"cacheaug.{module}", *arguments],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=280,
    )

  text = "def main(argv):\n  for name in argv[1:]:\n    print("
  documents = write(tmp_path / "d", text, "", "ab", "import os", "x" * 1024)
  store = f"--store={tmp_path / 'store'}"
  first = run("deliberate", documents, store, "--batch=2")
  assert first.returncode == 1
  assert first.stdout.startswith(
    "5 documents: 0 were stored before, 2 are now, 3 left out; "
  )
  *lines, last = first.stderr.splitlines()
  out = [line for line in lines if line.startswith("document ")]
  for line, said in zip(
    out,
    ("2 is left out: it is empty", "3 is left out: ", "5 is left out: 1025 "),
    strict=True,
  ):
    assert line.startswith(f"document {said}")
  assert last.startswith("error: 3 of 5 documents were left out")
  again = run("deliberate", documents, store)
  assert again.stdout.startswith(
    "5 documents: 2 were stored before, 0 are now, 3 left out; "
  )
  prompt = f"--prompt={text}name"
  done = run("generate", prompt, "--max_new_tokens=4", store)
  assert done.returncode == 0 and done.stdout.startswith(f"{text}name")
  assert done.stderr == "store: 1 of 1 prompts were begun in it\n"
