"""The benchmark's variants are one loss, and its figures are of what ran."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from cases import slow_but
from tolerances import (
  GRADIENT,
  LOSS,
  close,
  close_trees,
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug import benchmark, flops
from cacheaug import config as configs
from cacheaug.augment import objective, traces
from cacheaug.augment.point_sampling import Draw, sample_points
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.kernels import dispatch
from cacheaug.projects.speed import dense_reference

ROOT = Path(__file__).resolve().parent.parent
ALL = ("structured", "naive", "cached_dense")


def config_of(tmp_path, **changes):
  config = small_runs.get_config(str(tmp_path))
  config.mesh.data = 1
  config.mesh.fsdp = jax.device_count()
  config.update_from_flattened_dict(changes)
  return config


def of_loss(sums, scheme):
  """(loss, gradients) of a coprocessor, freshly traced."""
  model, spec = make_model(), Layout(2, 3, scheme)
  decoder, coproc = make_params(model), make_coprocessor(model, spec)
  documents = np.array([[0] * 9 + [1] * 7, [2] * 13 + [-1] * 3], np.int32)
  batch = {"tokens": tokens_of(model, 2, 16), "documents": documents}

  @jit
  def run(coproc):
    points = sample_points(jax.random.key(0), documents, spec, Draw(4))

    def loss(coproc):
      nll, tokens = sums(model, decoder, coproc, batch, points, spec)
      return nll.sum() / tokens.sum()

    return jax.value_and_grad(loss)(coproc)

  return run(coproc)


@pytest.mark.parametrize("scheme", slow_but(traces.POSITIONS, quick=(2,)))
def test_peers_are_the_same_loss_and_gradients(scheme):
  loss, gradients = of_loss(objective.coprocessor_loss, scheme)
  for peer in (dense_reference.naive_loss, dense_reference.cached_dense_loss):
    again, their_gradients = of_loss(peer, scheme)
    close(again, loss, LOSS)
    close_trees(their_gradients, gradients, GRADIENT)


def test_a_peer_with_another_mask_is_found_out(monkeypatch):
  loss, _ = of_loss(objective.coprocessor_loss, "replace")

  def everything(rows):
    b, m, r = rows.positions.shape
    return jnp.ones((b, 1, m * r, m * r), bool)

  monkeypatch.setattr(dense_reference, "_order", everything)
  far(of_loss(dense_reference.cached_dense_loss, "replace")[0], loss)


@pytest.mark.slow
def test_figures_are_of_what_ran(tmp_path):
  config = config_of(tmp_path)
  found = benchmark.measure(config, ALL, repeats=2)
  assert [row.variant for row in found] == list(ALL)
  losses = [row.loss for row in found]
  assert max(losses) - min(losses) < LOSS
  useful = flops.of_step(config, configs.model_of(config)).total
  for row in found:
    assert row.useful_flop == useful
    assert row.temporary_bytes > 0 and row.seconds >= row.fastest > 0
    made = config.data.batch * config.traces.count
    assert row.traces_per_second == pytest.approx(made / row.seconds)
    assert row.mfu is None  # nobody knows this processor's peak
    assert row.gradient_difference is None  # not asked for
  assert all(row.variant in benchmark.table(found) for row in found)


def test_command(tmp_path):
  (tmp_path / "config.py").write_text(
    f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    "import small_runs\n\n\ndef get_config():\n"
    f"  return small_runs.get_config({str(tmp_path)!r})\n"
  )
  command = [sys.executable, "-m", "cacheaug.benchmark", "--repeats=1"]
  command += [f"--config={tmp_path / 'config.py'}"]

  def run(*more):
    return subprocess.run(
      [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

  done = run("--json", "--against=", "--gradients")
  assert done.returncode == 0, done.stderr
  rows = json.loads(done.stdout)
  assert [row["variant"] for row in rows] == ["structured"]
  assert "context: xla" in done.stderr, "the choice is logged"
  done = run("--against=fast")
  assert done.returncode == 1 and done.stderr.count("\n") == 1
  assert "--against='fast'" in done.stderr


def test_bad_input(tmp_path):
  with pytest.raises(UserError, match="repeats=0"):
    benchmark.measure(config_of(tmp_path), ALL, repeats=0)
  config = config_of(tmp_path, objective="language_model")
  with pytest.raises(UserError, match="language_model"):
    benchmark.measure(config, ALL)


def test_kernel_is_chosen_by_device_and_shape():
  assert dispatch.choose("auto", "cpu", 64, jnp.float32)[0] == "xla"
  assert dispatch.choose("plain", "tpu", 64, jnp.float32)[0] == "plain"
