"""`python -m cacheaug.export`, and a run's workdir as a coprocessor."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs
import tolerances

import cacheaug
from cacheaug import build, export, optim, sharding
from cacheaug import step as stepping
from cacheaug.errors import UserError
from cacheaug.run import checkpoint
from cacheaug.run import workdir as workdirs
from cacheaug.weights import coprocessor_files, leaves, pretrained, trained

_ROOT = Path(__file__).resolve().parent.parent


def make_run(root, **changes):
  """A workdir with checkpoints of steps 1 and 2; the last one's state."""
  config = small_runs.get_config(str(root))
  for key in config.decoder.shape:
    if changes.get("decoder.path"):
      config.decoder.shape[key] = None
  config.data.tokenizer = "decoder"
  config.update_from_flattened_dict(changes)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
  model, _ = build.open_model(config)
  decoder, fingerprint = build.load_decoder(config, model, mesh)
  optimizer, _ = optim.make_optimizer(config.optimizer, 6)
  fresh = partial(stepping.init_state, config, model, optimizer, False)
  state = tolerances.jit(fresh)(decoder, jax.random.key(0))
  workdir = root / "run"
  workdirs.claim(config, str(workdir))
  meta = {"decoder": fingerprint, "seed": 0}
  with checkpoint.Checkpoints(workdir / "checkpoints", 2, 1) as checkpoints:
    for step in (1, 2):
      params = tolerances.shaken(state.params, step)
      state = state.replace(params=params)
      if state.average is not None:
        average = tolerances.shaken(state.average, step + 2)
        state = state.replace(average=average)
      checkpoints.save(step, state, meta)
  return workdir, state


@pytest.fixture(scope="module")
def coprocessor_run(tmp_path_factory):
  """(workdir, state) of a run for shipped:tiny, without an average."""
  return make_run(
    tmp_path_factory.mktemp("c"), **{"decoder.path": "shipped:tiny"}
  )


@pytest.fixture(scope="module")
def decoder_run(tmp_path_factory):
  """(workdir, state) of a run that trains a decoder, with an average."""
  changes = {"objective": "language_model", "optimizer.average": 0.5}
  return make_run(tmp_path_factory.mktemp("d"), **changes)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_workdir_equals_export(coprocessor_run, tmp_path):
  workdir, state = coprocessor_run
  frozen = cacheaug.load("shipped:tiny")
  run = frozen.with_coprocessor(workdir)
  same(run.coprocessor.params, state.params)
  assert export.export_run(workdir, tmp_path / "out") == 2
  exported = frozen.with_coprocessor(tmp_path / "out")
  assert exported.coprocessor.spec == run.coprocessor.spec
  assert exported.coprocessor.spec.latents == 2
  same(exported.coprocessor.params, run.coprocessor.params)
  meta = coprocessor_files.load_coprocessor(tmp_path / "out")[3]
  assert meta["source"] == "shipped:tiny"
  assert meta["decoder_fingerprint"] == frozen.fingerprint
  # An export over an earlier one is no harm; of the same bytes, too.
  before = small_runs.contents(tmp_path)
  export.export_run(workdir, tmp_path / "out")
  assert small_runs.contents(tmp_path) == before


def test_decoder_is_a_hugging_face_directory(decoder_run, tmp_path):
  workdir, state = decoder_run
  assert export.export_run(workdir, tmp_path / "out", decoder=True) == 2
  found = cacheaug.load(tmp_path / "out")
  same(found.decoder, state.average)  # not the weights of the last step
  assert found.tokenizer.encode("a") == [101]
  assert found.fingerprint == leaves.fingerprint(state.average)


def test_damaged_checkpoint_is_left_and_the_one_before_read(
  coprocessor_run, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(coprocessor_run[0], workdir)
  large = max(
    (workdir / "checkpoints" / "2" / "state").rglob("*"),
    key=lambda p: p.stat().st_size,
  )
  large.write_bytes(large.read_bytes()[:-1])
  before = small_runs.contents(workdir)
  assert trained.read_run(workdir).step == 1
  assert small_runs.contents(workdir) == before
  for step in "12":
    (workdir / "checkpoints" / step / "files.json").unlink()
  with pytest.raises(UserError, match="no checkpoint that can be read"):
    trained.read_run(workdir)


def test_runs_from_before_there_was_a_key_are_read(coprocessor_run, tmp_path):
  workdir = tmp_path / "older"
  shutil.copytree(coprocessor_run[0], workdir)
  config = json.loads((workdir / "config.json").read_text())
  for section, key in (
    ("coprocessor", "kind"),
    ("coprocessor", "lora_rank"),
    ("traces", "late_max"),
    ("data", "answers_only"),
    ("eval", "context"),
  ):
    del config[section][key]
  del config["lora"], config["data"]["sources"]["text"]["answer_field"]
  (workdir / "config.json").write_text(json.dumps(config))
  found, now = trained.read_run(workdir), trained.read_run(coprocessor_run[0])
  assert found.spec == now.spec
  # By JSON: a tuple becomes a list there.
  as_json = [json.loads(x.config.to_json()) for x in (found, now)]
  assert as_json[0] == as_json[1]
  same(found.flat, now.flat)


def refused(message, *arguments, **options):
  with pytest.raises(UserError, match=message) as caught:
    export.export_run(*arguments, **options)
  assert "\n" not in str(caught.value)


def test_refusals(coprocessor_run, decoder_run, tmp_path):
  coprocessor, decoder = coprocessor_run[0], decoder_run[0]
  out = tmp_path / "out"
  refused("holds a decoder: add --decoder", decoder, out)
  refused("coprocessor: leave out --decoder", coprocessor, out, decoder=True)
  refused("config.json: missing; give the --workdir", tmp_path / "none", out)
  refused("no such decoder", coprocessor, out, decoder_path="shipped:none")
  other = cacheaug.load("shipped:tiny").with_coprocessor
  with pytest.raises(UserError, match="holds a decoder .*cacheaug.load"):
    other(decoder)
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "config.json").write_text('{"objective": "x"}')
  refused("config.json: not a run's config", tmp_path / "bad", out)
  assert not out.exists()


def test_weights_of_another_shape_are_refused(coprocessor_run, tmp_path):
  golden = str(_ROOT / "tests" / "golden" / "gemma2")
  refused(
    "checkpoints/2: .* the decoder given wants",
    coprocessor_run[0],
    tmp_path / "out",
    decoder_path=golden,
  )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("decoder", (False, True))
@pytest.mark.parametrize("name", ("notes.txt", "config.json", ""))
def test_out_of_something_else_is_left_alone(name, decoder, tmp_path):
  out = tmp_path / "out"
  if name:
    out.mkdir()
    (out / name).write_text("{}")
  else:
    out.write_text("a file")
  before = small_runs.contents(tmp_path)
  refused("--out=.*holds something else", tmp_path, out, decoder=decoder)
  assert small_runs.contents(tmp_path) == before


def test_a_decoder_is_not_written_over_one(tmp_path):
  shutil.copytree(pretrained.resolve("shipped:tiny"), tmp_path / "out")
  for decoder in (False, True):
    refused("something else", tmp_path, tmp_path / "out", decoder=decoder)


def command(*arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "cacheaug.export", *arguments],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_command(coprocessor_run, decoder_run, tmp_path):
  """In one test: the commands start side by side."""
  workdir, d = f"--workdir={coprocessor_run[0]}", f"--out={tmp_path / 'd'}"
  out = f"--out={tmp_path / 'out'}"
  good = command(workdir, out)
  decoder = command(f"--workdir={decoder_run[0]}", d, "--decoder")
  bad = {
    "--out is missing": command(workdir),
    "unknown flag --decode": command(workdir, out, "--decode=1"),
  }
  helped = command("--help")
  status, printed, err = small_runs.finish(good)
  assert (status, err) == (0, "")
  assert printed.startswith("step 2 of ")
  assert coprocessor_files.load_coprocessor(tmp_path / "out")[1].latents == 2
  assert small_runs.finish(decoder)[::2] == (0, "")
  assert cacheaug.load(tmp_path / "d").model.config.width == 16
  for message, process in bad.items():
    status, printed, err = small_runs.finish(process)
    assert (status, printed) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
  status, printed, err = small_runs.finish(helped)
  assert (status, err) == (0, "")
  for flag in ("--workdir", "--out", "--[no]decoder", "--decoder_path"):
    assert flag in printed
