"""Every kind of coprocessor at work: decoding, files, steps, refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_runs
import tolerances
from cases import slow_but
from test_generate import PAD, N, model_and_params, prompts
from tolerances import (
  LOSS,
  MATTERS,
  NLL,
  close,
  far,
  make_coprocessor,
  save_coprocessor,
)

from cacheaug import sharding, validate
from cacheaug import step as stepping
from cacheaug.augment import coprocessor, kinds, objective, traces
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference import engine, padding
from cacheaug.inference.session import InsertionSchedule, Session
from cacheaug.model import decode_rows, transformer
from cacheaug.projects.background.worker import Worker
from cacheaug.weights import coprocessor_files

NEW = 5
KINDS = tuple(k for k in kinds.NAMES if k != "coprocessor")


def setup(kind, scheme="replace"):
  model, decoder = model_and_params()
  spec = Layout(N, NEW, scheme, kind=kind)
  coproc = make_coprocessor(model, Layout(N, NEW, kind=kind))
  return model, decoder, coproc, spec


@functools.cache
def scorer(kind):
  """nll [1, 1, A] after the point of a text, as lm.nll has it."""
  model, decoder, _, spec = setup(kind)

  @tolerances.jit
  def run(coproc, tokens, documents, laid):
    args = model, decoder
    hidden, cache = objective.context_pass(*args, tokens, documents, spec)
    read = coprocessor.source_cache(model, coproc, cache, hidden, spec)
    return objective.traces_nll(*args, coproc, cache, laid, read)

  return run


def teacher_forced(kind, scheme, prompt, said, **changes):
  """nll [A] of what was said, all of it in one pass over the whole text."""
  _, _, coproc, spec = setup(kind, scheme)
  spec = dataclasses.replace(spec, **changes)
  text = [*prompt, *said]
  padded = max(map(len, prompts())) + NEW
  tokens = np.full((1, padded), PAD, np.int32)
  tokens[0, : len(text)] = text
  documents = np.where(np.arange(padded) < len(text), 0, -1)[None]
  points = np.array([[len(prompt) - 1]], np.int32)
  laid = traces.layout_traces(tokens, documents, points, spec)
  return np.asarray(scorer(kind)(coproc, tokens, documents, laid))[0, 0]


@functools.cache
def context(kind):
  model, decoder, *_, spec = setup(kind)
  tokens, documents = padding.pad_left(prompts(), PAD)
  run = functools.partial(
    contexts.read, model, keep_states=spec.kind.reads_states
  )
  return tolerances.jit(run)(
    decode_rows.unstack_layers(decoder), tokens, documents
  )


def session(kind, scheme="replace", **options):
  model, decoder, coproc, spec = setup(kind, scheme)
  apart = decode_rows.unstack_layers(decoder)
  args = model, apart, context(kind)
  kw = dict(coproc=coproc, spec=spec, scored=True, max_new_tokens=NEW)
  return Session(*args, **kw | options)


@pytest.mark.parametrize("scheme", slow_but(["replace", "insert"], quick=(0,)))
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_says_what_the_whole_text_would_score(kind, scheme):
  """Token by token over a static cache, and once as training scores it."""
  one = session(kind, scheme)
  said, nll = one.run(NEW), one.nll()
  for i, prompt in enumerate(prompts()):
    close(teacher_forced(kind, scheme, prompt, said[i]), nll[i], NLL)
  assert len(one.insertions) == len(prompts())
  plain = session(kind, coproc=None, spec=None)
  plain.run(NEW)
  far(plain.nll(), nll)


@pytest.mark.parametrize("kind", ["pause", "handover"])
def test_a_window_hides_in_decoding_what_it_hides_in_training(kind):
  window = N + 1
  spec = dataclasses.replace(setup(kind)[3], window=window)
  one = session(kind, spec=spec)
  said, nll = one.run(NEW), one.nll()
  for i, prompt in enumerate(prompts()):
    args = kind, "replace", prompt, said[i]
    close(teacher_forced(*args, window=window), nll[i], NLL)
    if len(prompt) > window + 1:
      far(teacher_forced(*args), nll[i])
  with pytest.raises(UserError, match="traces.window=.*inserted once"):
    session(kind, spec=spec, plan=InsertionSchedule(at=(0, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_without_latents_are_the_frozen_decoders(kind):
  """Bit for bit, whatever stands beside them; later insertions too."""
  plan = InsertionSchedule(at=(0, 2))
  plain = session(kind, on=[False] * 3, plan=plan)
  expected, both = plain.run(NEW), session(kind, plan=plan, on=[1, 0, 1])
  said = both.run(NEW)
  np.testing.assert_array_equal(said[1], expected[1])
  np.testing.assert_array_equal(both.nll()[1], plain.nll()[1])
  far(both.nll()[[0, 2]], plain.nll()[[0, 2]])
  assert [x.sequence for x in both.insertions] == [0, 2, 0, 2]
  frozen = session(kind, coproc=None, spec=None)
  np.testing.assert_array_equal(frozen.run(NEW), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_once_at_the_end_and_in_one_program(kind, monkeypatch):
  """What exact match asks for says what a session says."""
  model, decoder, coproc, spec = setup(kind)
  expected = session(kind).run(NEW)
  for name in ("start", "decode"):  # inside of one program, not their own
    function = getattr(engine, name).__wrapped__
    monkeypatch.setattr(engine, name, function)
  tokens, documents = padding.pad_left(prompts(), PAD)
  run = functools.partial(
    contexts.greedy.__wrapped__, model, spec=spec, max_new_tokens=NEW
  )
  out = tolerances.jit(run)(decoder, coproc, tokens, documents)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_after_tokens_said_are_those_of_the_longer_prompt(kind):
  """So that slots, positions and states of what was said are right."""
  model, decoder, coproc, spec = setup(kind)
  one = session(kind, plan=InsertionSchedule(at=(2,)))
  said, nll = one.run(NEW), one.nll()
  for i, prompt in enumerate(prompts()):
    text = [*prompt, *said[i, :2]]
    again = teacher_forced(kind, "replace", text, said[i, 2:])
    close(again[: NEW - 2], nll[i, 2:], NLL)


@pytest.mark.parametrize("start", traces.STARTS)
@pytest.mark.parametrize("kind", kinds.NAMES)
def test_export_round_trip(kind, start, tmp_path):
  model, _ = model_and_params()
  spec = Layout(N, NEW, "overlay", start, kind=kind)
  params = save_coprocessor(tmp_path, model, spec)
  config, found, tree, _ = coprocessor_files.load_coprocessor(tmp_path)
  assert (config, found) == (model.config, spec)
  assert jax.tree.structure(tree) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, tree, params)
  entries = json.loads((tmp_path / "config.json").read_text())
  assert entries["kind"] == kind
  stored = safetensors.numpy.load_file(tmp_path / coprocessor_files.WEIGHTS)
  assert any("layers.1.mlp" in x for x in stored) == (
    kind not in ("pause", "prefix")
  )
  # Of another kind it is damaged: names the tensor.
  other = "prefix" if kind == "pause" else "pause"
  variant = kinds.Kind(other).variant
  entries |= {"kind": other, "variant": variant}
  (tmp_path / "config.json").write_text(json.dumps(entries))
  with pytest.raises(UserError, match="tensor|soft_tokens|prefix"):
    coprocessor_files.load_coprocessor(tmp_path)


def test_exports_from_before_there_were_kinds_are_the_papers(tmp_path):
  model, _ = model_and_params()
  spec = Layout(N, NEW)
  save_coprocessor(tmp_path, model, spec)
  path = tmp_path / "config.json"
  entries = json.loads(path.read_text())
  assert entries.pop("kind") == "coprocessor"
  assert entries["variant"] == "embeddings"
  path.write_text(json.dumps(entries))
  assert coprocessor_files.load_coprocessor(tmp_path)[1] == spec


# --- training ---------------------------------------------------------------

LEAVES = {
  "pause": {"soft_tokens"},
  "prefix": {"prefix_keys", "prefix_values"},
  "handover": {"transformer", "soft_tokens"},
  "activations": {"transformer", "soft_tokens", "latent_projection"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_train_what_the_kind_has_and_nothing_else(kind, tmp_path):
  """On a mesh of two devices, half of them splitting parameters."""
  config = small_runs.get_config(str(tmp_path))
  config.coprocessor.kind = kind
  config.mesh.fsdp = 2
  # Enough for a prefix of zeros to leave zero.
  config.optimizer.learning_rate, config.optimizer.eps = 0.05, 1e-8
  run = small_runs.Steps(config, devices=2)
  assert set(run.state.params) == LEAVES[kind]
  before = jax.tree.map(np.array, run.state.params)
  decoder = jax.tree.map(np.array, run.decoder)
  losses = run.take(6)
  baseline = stepping.make_baseline(config, run.model, run.mesh)
  frozen = []
  for step in (0, 5):
    batch = sharding.put_global(
      run.batches.at(step), sharding.batch_sharding(run.mesh)
    )
    nll, tokens = baseline(run.decoder, batch, run.key, np.int32(step))
    frozen.append(float(nll.sum() / tokens.sum()))
  # It begins as the frozen decoder and becomes better on the same tokens.
  close(losses[0], frozen[0], LOSS)
  assert losses[5] < frozen[1] - MATTERS, (losses, frozen)
  moved = jax.tree.map(lambda a, b: (a != b).any(), before, run.state.params)
  assert all(jax.tree.leaves(moved)), moved
  jax.tree.map(np.testing.assert_array_equal, run.decoder, decoder)


@pytest.mark.parametrize(
  "changes, words",
  (
    ({"coprocessor.kind": "x"}, ("coprocessor.kind='x'", "handover")),
    (
      {"coprocessor.kind": "pause", "coprocessor.init": "scratch"},
      ("coprocessor.init='scratch'", "coprocessor.kind='pause'"),
    ),
    (
      {"coprocessor.kind": "prefix", "traces.late_max": 2},
      ("coprocessor.kind='prefix'", "traces.late_max=0"),
    ),
    (
      {"coprocessor.kind": "handover", "traces.late_max": 2},
      ("coprocessor.kind='handover'", "traces.late_max=0"),
    ),
  ),
)
def test_what_does_not_fit_is_refused(changes, words, tmp_path):
  config = small_runs.get_config(str(tmp_path))
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError) as e:
    validate.check_config(config, 1)
  assert all(word in str(e.value) for word in words), e.value


def test_late_latents_of_kinds_that_know_none_are_refused():
  model, decoder, coproc, spec = setup("handover")
  held = context("handover")
  with pytest.raises(UserError, match="coprocessor.kind='handover'"):
    contexts.augment_context(
      model, decoder, coproc, held, spec, np.array([0, 1, 0])
    )


def test_the_background_takes_the_papers_kind_alone():
  model, _, coproc, spec = setup("pause")
  with pytest.raises(UserError, match="coprocessor.kind='pause'.*background"):
    Worker(model, coproc, spec)


def test_late_activations_are_those_of_the_shorter_text():
  """What the coprocessor has not read changes nothing."""
  model, decoder, coproc, spec = setup("activations", "overlay")
  tokens, documents = padding.pad_left(prompts()[:1], PAD)
  other = tokens.copy()
  other[0, -1] += 1
  late = np.array([1], np.int32)

  @tolerances.jit
  def outputs(tokens):
    point = jnp.full((1, 1), tokens.shape[1] - 1)
    laid = traces.layout_traces(tokens, documents, point, spec, late[:, None])
    args = model, decoder
    hidden, cache = objective.context_pass(*args, tokens, documents, spec)
    read = coprocessor.source_cache(model, coproc, cache, hidden, spec)
    copied = transformer.embed(model, decoder, laid.input_tokens)
    return coprocessor.outputs(model, coproc, read, laid, copied)

  np.testing.assert_array_equal(outputs(tokens), outputs(other))
  other[0, -2] += 1
  far(outputs(tokens), outputs(other))
