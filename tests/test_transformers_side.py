"""An exported coprocessor in transformers' generate, beside JAX."""

import itertools
import json
import runpy

import make_golden
import numpy as np
import oracle
import pytest
import tolerances
from oracle import WHY_TORCH

import cacheaug
from cacheaug import lm as lms
from cacheaug.augment.traces import KINDS, STARTS, TraceSpec
from cacheaug.evals import torch_parity
from cacheaug.inference import engine
from cacheaug.weights import coprocessor_files, transformers_files

pytest.importorskip("torch", reason=WHY_TORCH)
pytest.importorskip("transformers", reason=WHY_TORCH)

import torch  # noqa: E402
import transformers  # noqa: E402

COMPARE = runpy.run_path(
  str(transformers_files.GENERATE.with_name("compare.py"))
)["compare"]
FAMILIES = ("gemma2", "gemma3", "llama", "qwen3", "qwen3_sliding")
SPEC = TraceSpec(latents=3, ahead=4, scheme="replace")


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
  """Compiles without optimisation; code of exports is copied to a new place."""
  patch = pytest.MonkeyPatch()
  jit = tolerances.jit
  for module, name, static in (
    (lms, "_read", ("model", "keep_states")),
    (lms, "_augment", ("model", "spec")),
    (lms, "_decode", ("model", "max_new_tokens", "stop_ids")),
    (lms, "_nll", ("model", "spec")),
    (torch_parity, "_compute_latents", ("model", "spec", "last")),
  ):
    function = getattr(module, name).__wrapped__
    patch.setattr(module, name, jit(function, static_argnames=static))
  yield
  patch.undo()


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
  """By name: (directory, LM, torch's model) of a tiny random decoder."""
  made = {}

  def get(case):
    if case not in made:
      directory = tmp_path_factory.mktemp(case)
      reference = make_golden.build(case, max_position_embeddings=128)
      reference.save_pretrained(directory)
      lm = cacheaug.load(directory, dtype="float32")
      made[case] = directory, lm, reference
    return made[case]

  return get


def export(directory, lm, spec=SPEC, **changes):
  """A random exported coprocessor, and the LM that has it."""
  options = dict(
    model_config=lm.model.config,
    spec=spec,
    params=oracle.random_params(lm.model, spec),
    decoder_fingerprint=lm.fingerprint,
    source="tiny",
  )
  coprocessor_files.save_coprocessor(directory, **options | changes)
  transformers_files.write_generate(directory, lm.model.config)
  return lm.with_coprocessor(directory)


@pytest.mark.parametrize("case", FAMILIES)
def test_families(case, decoders, tmp_path):
  """Contexts of 20 tokens exceed the windows of 8."""
  directory, lm, _ = decoders(case)
  lm = export(tmp_path, lm)
  want = torch_parity.expected(lm, torch_parity.prompts_of(lm), ahead=4)
  rows = COMPARE(tmp_path, directory, want)
  assert len(rows) == 6
  assert {name: text for name, (text, good) in rows.items() if not good} == {}
