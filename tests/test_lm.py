"""cacheaug.load: against torch, against the functions below it, refusals."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
import tolerances
from oracle import FAMILIES, TOLERANCE, WHY_TORCH

import cacheaug
from cacheaug import build, lm
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference import padding
from cacheaug.weights import coprocessor_files, pretrained

SPEC = Layout(3, 4, "replace")
PROMPTS = ["def f(x):\n", "import os\n", "for i in range(10): print(i"]
NEW = 5


def save(directory, decoder, spec=SPEC, **changes):
  """A random exported coprocessor for a loaded decoder."""
  options = dict(
    model_config=decoder.model.config,
    spec=spec,
    params=oracle.random_params(decoder.model, spec),
    decoder_fingerprint=decoder.fingerprint,
    source="shipped:tiny",
  )
  coprocessor_files.save_coprocessor(directory, **options | changes)
  return directory


@pytest.fixture(scope="module")
def tiny():
  return cacheaug.load("shipped:tiny")


@pytest.fixture(scope="module")
def augmented(tiny, tmp_path_factory):
  return tiny.with_coprocessor(save(tmp_path_factory.mktemp("c"), tiny))


def test_import_is_light():
  code = (
    "import sys, time; start = time.process_time(); import cacheaug; "
    "print(time.process_time() - start); print(*sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  seconds, modules = done.stdout.splitlines()
  assert float(seconds) < 0.2
  assert not {"jax", "flax", "numpy"} & set(modules.split())


def test_names_of_the_package():
  assert cacheaug.load is build.load and cacheaug.LM is lm.LM
  assert {"load", "LM"} <= set(dir(cacheaug))
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    _ = cacheaug.lode


@pytest.mark.parametrize("family", FAMILIES)
def test_nll_equals_torch(family, tmp_path):
  torch = pytest.importorskip("torch", reason=WHY_TORCH)
  pytest.importorskip("transformers", reason=WHY_TORCH)
  _, _, reference = oracle.make_decoder(family, tmp_path / "decoder")
  frozen = cacheaug.load(tmp_path / "decoder")
  spec = dataclasses.replace(SPEC, positions="overlay")
  ours = frozen.with_coprocessor(save(tmp_path / "coprocessor", frozen, spec))
  tokens = tolerances.tokens_of(ours.model, 2, 20)
  points = np.array([[2, 7, 15], [4, 5, 11]])

  got = ours.nll(tokens, points, ahead=4)
  want = oracle.traces_nll(
    reference, tmp_path / "coprocessor", tokens, points, spec
  )
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)

  plain = ours.nll(tokens, points, ahead=4, latents=False)
  with torch.no_grad():
    logits = reference(torch.tensor(tokens).long()).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
      logits.mT, torch.tensor(tokens[:, 1:]).long(), reduction="none"
    ).numpy()
  index = points[..., None] + np.arange(4)
  want = np.stack([row[i] for row, i in zip(each, index, strict=True)])
  np.testing.assert_allclose(plain, want, atol=TOLERANCE, rtol=0)
  tolerances.far(plain, got)
  # A decoder without a tokenizer scores tokens; it has no text to give.
  assert ours.tokenizer is None
  with pytest.raises(UserError, match="without tokenizer.json"):
    ours.generate(["a"])


def test_shipped_decoder_is_what_transformers_reads(tiny):
  """The files that `export --decoder` writes, and their logits."""
  torch = pytest.importorskip("torch", reason=WHY_TORCH)
  transformers = pytest.importorskip("transformers", reason=WHY_TORCH)
  directory = pretrained.resolve("shipped:tiny")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation="eager"
  )
  text = "def f(x):\n  return sorted(x)\n" * 4  # past the window of 64
  tokens = np.array([[2, *tiny.tokenizer.encode(text)]], np.int32)
  with torch.no_grad():
    want = theirs(torch.tensor(tokens).long()).logits.numpy()
  apply = tolerances.jit(lambda p, t: tiny.model.apply({"params": p}, t))
  got = np.asarray(apply(tiny.decoder, tokens)).reshape(want.shape)
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  found = tokenizer(text, add_special_tokens=False)["input_ids"]
  assert found == tokens[0, 1:].tolist()


def rows(model):
  return [[2, *model.tokenizer.encode(p)] for p in PROMPTS]


@pytest.mark.parametrize("latents", (True, False))
def test_generate_equals_greedy_and_the_three_steps(latents, augmented):
  tokens, documents = padding.pad_left(rows(augmented), 0)
  ids = contexts.greedy(
    augmented.model,
    augmented.decoder,
    augmented.coprocessor.params if latents else None,
    tokens,
    documents,
    spec=SPEC if latents else None,
    max_new_tokens=NEW,
    stop_id=1,
  )
  texts = [augmented.tokenizer.decode(row) for row in np.asarray(ids).tolist()]
  assert augmented.generate(PROMPTS, NEW, latents=latents) == texts
  context = augmented.prefill(rows(augmented))
  if latents:
    context = augmented.augment(context)
  np.testing.assert_array_equal(augmented.decode(context, NEW), ids)
  assert len(set(texts)) > 1


def test_latents_have_their_say(augmented):
  prompts = (PROMPTS, NEW)
  with_latents = augmented.generate(*prompts)
  assert with_latents != augmented.generate(*prompts, latents=False)


def test_a_stop_token_ends_a_text(augmented):
  free = augmented.decode(augmented.prefill(rows(augmented)), NEW, stop_ids=())
  stop = int(free[0, 2])
  stops = dataclasses.replace(augmented, stop_ids=(1, stop))
  texts = stops.generate(PROMPTS, NEW, latents=False)
  for ids, text in zip(free.tolist(), texts, strict=True):
    end = ids.index(stop) if stop in ids else NEW
    assert text == augmented.tokenizer.decode(ids[:end])
  assert len(texts[0]) <= 2


def test_stop_ids_are_those_of_the_directory(tmp_path):
  shutil.copytree(pretrained.resolve("shipped:tiny"), tmp_path / "d")
  path = tmp_path / "d" / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": [7, 9]}))
  assert cacheaug.load(tmp_path / "d").stop_ids == (1, 7, 9)


def test_dtype(tiny):
  half = cacheaug.load("shipped:tiny", dtype="bfloat16")
  assert {x.dtype.name for x in jax.tree.leaves(half.decoder)} == {"bfloat16"}
  assert half.fingerprint == tiny.fingerprint
  with pytest.raises(UserError, match="dtype='int4' is not one of"):
    cacheaug.load("shipped:tiny", dtype="int4")


def test_points_of_all_rows_alike(augmented):
  tokens = tolerances.tokens_of(augmented.model, 2, 20)
  one = augmented.nll(tokens, [[4, 9]], 4)
  assert one.shape == (2, 2, 4)
  np.testing.assert_array_equal(one, augmented.nll(tokens, [[4, 9]] * 2, 4))


@pytest.mark.parametrize(
  "points, ahead, message",
  (
    ([[1]], 4, "points: 1 is not from 2 to 15"),
    ([[3, 16]], 4, "points: 16 is not from 2 to 15"),
    ([3], 4, "points: give whole numbers"),
    ([[3.5]], 4, "points: give whole numbers"),
    ([[3]] * 3, 4, "points has 3 rows, tokens 2"),
    ([[3]], 0, "ahead=0 must be at least 1"),
  ),
)
def test_points_that_cannot_be_scored(points, ahead, message, augmented):
  tokens = tolerances.tokens_of(augmented.model, 2, 20)
  with pytest.raises(UserError, match=message):
    augmented.nll(tokens, points, ahead)


def test_tokens_that_cannot_be_read(augmented):
  for tokens, message in (
    ([], "tokens is empty"),
    ([1, 2], "a row is a number"),
    ([[1], []], "row 1 is empty"),
    ([[1, 260]], "260 in row 0 is not a token from 0 to 259"),
    ([[1.5]], "1.5 in row 0 is not a token"),
    ([[1] * 1025], "1025 tokens exceed the decoder's 1024 positions"),
  ):
    with pytest.raises(UserError, match=message):
      augmented.prefill(tokens)
  with pytest.raises(UserError, match="rows of one length"):
    augmented.nll([[1, 2, 3], [1, 2]], [[0]], 1)
  with pytest.raises(UserError, match="prompts is one string"):
    augmented.generate("def")
  with pytest.raises(UserError, match="10 tokens and 1020 new ones exceed"):
    augmented.decode(augmented.prefill([[5] * 10]), 1020)
  with pytest.raises(UserError, match="max_new_tokens=0"):
    augmented.decode(augmented.prefill([[5] * 10]), 0)
  assert augmented.generate([]) == []


def test_latents_are_refused_where_there_can_be_none(tiny, augmented):
  for call in (
    lambda: tiny.generate(["a"], latents=True),
    lambda: tiny.nll([[1] * 20], [[5]], 4, latents=True),
    lambda: tiny.augment(tiny.prefill([[5] * 10])),
  ):
    with pytest.raises(UserError, match="no coprocessor is attached"):
      call()
  with pytest.raises(UserError, match="prompt 0 has 2 tokens"):
    augmented.generate(["a"])
  context = augmented.augment(augmented.prefill([[5] * 10]))
  with pytest.raises(UserError, match="has latents already"):
    augmented.augment(context)


def test_coprocessor_of_another_decoder_is_refused(tiny, tmp_path):
  save(tmp_path, tiny, decoder_fingerprint="0123456789ab")
  with pytest.raises(
    UserError,
    match=rf"trained for decoder 0123456789ab \(shipped:tiny\), the one loaded "
    rf"is {tiny.fingerprint}: load that decoder",
  ):
    tiny.with_coprocessor(tmp_path)


def test_paths_that_hold_nothing(tiny, tmp_path):
  with pytest.raises(UserError, match="no such directory"):
    cacheaug.load(tmp_path / "none")
  with pytest.raises(UserError, match="no such directory; give an exported"):
    tiny.with_coprocessor(tmp_path / "none")
  with pytest.raises(UserError, match="config.json: missing"):
    tiny.with_coprocessor(tmp_path)
  with pytest.raises(UserError, match="not a decoder"):
    tiny.with_coprocessor("shipped:tiny")
