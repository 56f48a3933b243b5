"""Training on from something: where it begins, what is trained and kept."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import tolerances
from ml_collections import ConfigDict
from tolerances import jit

import cacheaug
from cacheaug import build, export, step, train
from cacheaug import config as configs
from cacheaug.augment import objective, traces
from cacheaug.augment.point_sampling import Draw, sample_points
from cacheaug.data import tokenizers
from cacheaug.errors import UserError
from cacheaug.evals import report, run_report
from cacheaug.model import lora
from cacheaug.model.transformer import Transformer
from cacheaug.weights import huggingface, leaves

LM = {"objective": "language_model"}


@pytest.fixture(scope="module")
def decoder_path(tmp_path_factory):
  """A decoder that is nothing like a fresh one, as a directory."""
  root = tmp_path_factory.mktemp("decoder")
  model = configs.model_of(small_runs.get_config(str(root)))
  params = tolerances.make_params(Transformer(model), 4)
  tokenizer = tokenizers.ByteTokenizer()
  huggingface.save(root / "out", model, params, tokenizer=tokenizer)
  return str(root / "out")


def _config(root, **changes) -> ConfigDict:
  config = small_runs.get_config(str(root))
  config.update_from_flattened_dict(changes)
  return config


def _bytes(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def _baseline(run) -> float:
  baseline = step.make_baseline(run.config, run.model, run.mesh)
  batch = run.batches.at(0)
  nll, tokens = baseline(run.decoder, batch, run.key, np.int32(0))
  return float(nll.sum() / tokens.sum())


# --- where it begins, what is trained -----------------------------------------


@pytest.mark.slow
def test_lora_coprocessor_begins_as_the_copy_and_holds_the_small_tree(
  tmp_path, decoder_path
):
  path = {"decoder.path": decoder_path, "coprocessor.start": "as_is"}
  whole = small_runs.Steps(_config(tmp_path, **path))
  run = small_runs.Steps(
    _config(tmp_path, **path, **{"coprocessor.lora_rank": 2})
  )
  before, decoder = _bytes(run.state.params), _bytes(run.decoder)
  # 'as_is' hands the network's output over, so that this is no tautology.
  assert run.take(1) == whole.take(1)
  assert run.take(1) != whole.take(1)
  params = run.state.params
  assert set(params) == {"lora", "soft_tokens"}
  assert run.state.frozen is None
  assert _size(params["lora"]) == lora.parameters(
    run.model.config, 2, lora.KERNELS
  )
  moments = sum(x.size for x in jax.tree.leaves(run.state.opt_state) if x.ndim)
  assert moments == 2 * _size(params)
  assert all(a != b for a, b in zip(_bytes(params), before, strict=True))
  assert _bytes(run.decoder) == decoder


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"language_model.loss": "traces"},
    {"language_model.lora_rank": 2},
  ],
  ids=str,
)
def test_continued_decoder_begins_as_the_frozen_one(
  tmp_path, decoder_path, changes
):
  changes = changes | LM | {"decoder.path": decoder_path}
  run = small_runs.Steps(_config(tmp_path, **changes))
  decoder, frozen = _bytes(run.decoder), _baseline(run)
  adapts = "language_model.lora_rank" in changes
  if adapts:
    assert set(run.state.params) == {"lora"}
  else:
    assert {x.dtype for x in jax.tree.leaves(run.state.params)} == {
      jnp.dtype("float32")
    }
    assert _bytes(run.state.params) == decoder
  losses = run.take(6)
  assert losses[0] == pytest.approx(frozen, abs=tolerances.LOSS)
  assert losses[-1] < losses[0] - tolerances.MATTERS
  assert _bytes(run.decoder) == decoder


def test_traces_loss_counts_each_token_as_often_as_traces_predict_it():
  model = tolerances.make_model()
  params = tolerances.make_params(model)
  spec = traces.Layout(latents=2, ahead=3)
  tokens = tolerances.tokens_of(model, 2, 16)
  documents = np.repeat([[0, 1], [2, -1]], [9, 7], axis=1).astype(np.int32)
  batch = {"tokens": tokens, "documents": documents}

  @jit
  def run():
    points = sample_points(jax.random.key(0), documents, spec, Draw(4))
    hidden, _ = objective.context_pass(model, params, tokens, documents, spec)
    return (
      points,
      objective.next_token_nll(model, params, hidden, tokens),
      objective.plain_traces_loss(model, params, batch, points, spec),
      objective.frozen_loss(model, params, batch, points, spec),
    )

  points, plain, (nll, count), frozen = jax.device_get(run())
  expected, counted = np.zeros(3), np.zeros(3)
  for row in range(2):
    for p in points[row][points[row] >= 0]:
      for j in range(3):
        t = p + j + 1
        if t < 16 and documents[row, t] == documents[row, p]:
          expected[j] += plain[row, t - 1]
          counted[j] += 1
  np.testing.assert_array_equal(count, counted)
  tolerances.close(nll / count, expected / counted, tolerances.LOSS)
  tolerances.close(frozen[0] / count, nll / count, tolerances.LOSS)


# --- a whole run, and one gone on with ----------------------------------------


def _train(root, name, **changes) -> str:
  """Trains in root/name, which may hold a run; what was printed."""
  flags = (f"--config.{key}={value}" for key, value in changes.items())
  process = small_runs.start(
    root,
    f"--workdir={root / name}",
    *flags,
    JAX_COMPILATION_CACHE_DIR=str(root / "compiled"),
  )
  status, out, err = small_runs.finish(process)
  assert status == 0, err
  return out


def _twice(root, **changes) -> str:
  """Trains in root/whole; again, from its middle, in root/parts."""
  out = _train(root, "whole", **changes)
  whole, parts = root / "whole", root / "parts"
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / "checkpoints" / "6")
  shutil.rmtree(parts / "report")
  again = _train(root, "parts", **changes)
  assert again.replace("/parts/", "/whole/") == out
  for name in ("metrics.jsonl", "report/documents.csv"):
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
  return out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lora_on_a_trained_coprocessor(tmp_path, decoder_path):
  path = {"decoder.path": decoder_path}
  export_to = str(tmp_path / "first_export")
  _train(tmp_path, "first", **path, **{"export": export_to})
  changes = path | {
    "coprocessor.init": str(tmp_path / "first"),
    "coprocessor.lora_rank": 2,
    "optimizer.average": 0.5,
    "export": str(tmp_path / "export"),
  }
  _twice(tmp_path, **changes)
  workdir = tmp_path / "parts"
  # Its base lies in the run's own checkpoints: the first may go.
  (tmp_path / "first").rename(tmp_path / "moved")
  frozen = cacheaug.load(decoder_path)
  base = frozen.with_coprocessor(tmp_path / "first_export").coprocessor
  found = frozen.with_coprocessor(workdir).coprocessor
  exported = frozen.with_coprocessor(tmp_path / "export").coprocessor
  tolerances.close_trees(found.params, exported.params, tolerances.LOSS)
  kernel = "transformer/blocks/mlp/up/kernel"
  flat, was = map(leaves.flatten, (found.params, base.params))
  assert not np.array_equal(flat[kernel], was[kernel])
  norm = "transformer/blocks/mlp_norm/scale"
  np.testing.assert_array_equal(flat[norm], was[norm])
  entries = json.loads((tmp_path / "export" / "config.json").read_text())
  assert entries["lora_rank"] == 2

  # Trained whole from the same: no LoRA, and the first step's loss is its.
  moved = str(tmp_path / "moved")
  whole = _config(
    tmp_path, **{"decoder.path": decoder_path, "coprocessor.init": moved}
  )
  assert set(small_runs.Steps(whole).state.params) == set(base.params)
  for changes, words in (
    ({"coprocessor.latents": 3}, ("coprocessor.latents=2", "has 3")),
    ({"coprocessor.start": "as_is"}, ("coprocessor.start=harmless",)),
    ({"decoder.path": ""}, ("trained for decoder", "coprocessor.init")),
    ({"coprocessor.init": moved + "/no"}, ("coprocessor.init", "no such")),
  ):
    other = ConfigDict(whole.copy_and_resolve_references())
    other.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
      train.train(configs.resolve(other), str(tmp_path / "none"))
    assert [w for w in words if w not in str(caught.value)] == []
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lora_decoder_and_its_table(tmp_path, decoder_path):
  changes = LM | {
    "decoder.path": decoder_path,
    "language_model.lora_rank": 2,
    "export": str(tmp_path / "export"),
  }
  out = _twice(tmp_path, **changes)
  workdir, config = tmp_path / "parts", _config(tmp_path, **changes)
  # The very tokens that a coprocessor of this config is evaluated on.
  spec = configs.layout_of(config)
  table = (workdir / "report" / "perplexity_by_position.csv").read_text()
  assert (
    "continued" in out
    and "continued" in (workdir / "report" / "report.md").read_text()
  )
  counted = [line.split(",")[6] for line in table.splitlines()[1:]]
  model, _ = build.open_model(config)
  params = cacheaug.load(decoder_path).decoder
  sums = run_report.sums_by_source(
    config,
    model,
    params,
    tolerances.make_coprocessor(model, spec),
    tokenizers.ByteTokenizer(),
    spec,
  )["text"]
  rows = report.make_rows(sums, seed=0)
  assert counted == [str(row.tokens) for row in rows]
  same = [line.split(",")[1] for line in table.splitlines()[1:]]
  np.testing.assert_allclose(
    np.array(same, float), [r.frozen_nll for r in rows], atol=tolerances.LOSS
  )

  export.export_run(workdir, tmp_path / "again", decoder=True)
  found, again = (cacheaug.load(tmp_path / n) for n in ("export", "again"))
  tolerances.close_trees(found.decoder, again.decoder, tolerances.LOSS)
  assert found.tokenizer.encode("a") == [101]
  assert found.fingerprint != cacheaug.load(decoder_path).fingerprint
