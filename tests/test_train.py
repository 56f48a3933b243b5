"""The step: what it trains, what it leaves alone, how a run stops."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from cacheaug import step as stepping
from cacheaug import train
from cacheaug.errors import UserError
from cacheaug.run import machine
from cacheaug.run.metrics import check_finite


def _bytes(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _shapes(tree):
  return {tuple(x.shape) for x in jax.tree.leaves(tree)}


def test_decoder_is_bit_identical_after_20_steps(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  config.optimizer.steps = 20
  run = small_runs.Steps(config)
  decoder, trained = _bytes(run.decoder), _bytes(run.state.params)
  losses = run.take(20)
  assert _bytes(run.decoder) == decoder
  # Control: the comparison sees a change, and every leaf has one.
  assert all(
    a != b for a, b in zip(_bytes(run.state.params), trained, strict=True)
  )
  assert losses[-1] < losses[0]


def test_state_and_gradients_hold_no_decoder_leaf(tmp_path):
  run = small_runs.Steps(small_runs.get_config(str(tmp_path)))
  embedding = run.decoder["embedder"]["embedding"].shape
  assert embedding in _shapes(run.decoder)
  assert embedding not in _shapes(run.state)
  # Adam's two moments of each trained leaf and some counters, no more; the
  # gradient has the tree of the moments.
  moments = sum(x.size for x in jax.tree.leaves(run.state.opt_state) if x.ndim)
  assert moments == 2 * sum(x.size for x in jax.tree.leaves(run.state.params))
  assert set(run.state.params) == {
    "transformer",
    "soft_tokens",
    "latent_projection",
  }
  assert set(run.state.params["transformer"]) == {"blocks", "final_norm"}


def test_average_follows_the_parameters(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  config.optimizer.average = 0.75
  run = small_runs.Steps(config)
  expected = run.state.params["soft_tokens"] * 1.0
  for _ in range(3):
    run.take(1)
    expected = 0.75 * expected + 0.25 * run.state.params["soft_tokens"]
  found = run.state.average["soft_tokens"]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert not np.allclose(found, run.state.params["soft_tokens"], rtol=1e-3)


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "parameter_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_looks_at_loss_gradient_and_parameters(name, value):
  names = ("loss", "gradient_norm", "parameter_norm")
  fine = {k: np.float32(1) for k in names}
  check_finite(3, fine)
  with pytest.raises(UserError, match=rf"{name} is {value} at step 3"):
    check_finite(3, fine | {name: np.float32(value)})


def test_baseline_is_over_the_very_tokens_of_the_step(tmp_path):
  """With 'replace' and the harmless start, step 1 is the frozen decoder."""
  config = small_runs.get_config(str(tmp_path))
  config.optimizer.accumulation = 2
  run = small_runs.Steps(config)
  batch = run.batches.at(0)
  baseline = stepping.make_baseline(config, run.model, run.mesh)
  frozen = [
    baseline(run.decoder, batch, run.key, np.int32(step)) for step in (0, 1)
  ]
  (loss,) = run.take(1)
  means = [nll.sum() / tokens.sum() for nll, tokens in frozen]
  assert loss == pytest.approx(float(means[0]), rel=1e-5)
  # Control: another step's points are other tokens.
  assert loss != pytest.approx(float(means[1]), rel=1e-5)


def test_mfu_where_the_devices_peak_is_known(tmp_path):
  config = small_runs.get_config(str(tmp_path))
  sums = np.ones(4), np.ones(4)
  metrics = {"running": sums, "batch": sums, "terms": {}}
  metrics |= {"gradient_norm": 1.0, "parameter_norm": 1.0}
  found = []

  class Writer:
    def write(self, step, line, speed):
      found.append(speed)

  for floor in (0.25, None):
    times = {"step_time": 0.5}
    batch = {"tokens": jnp.ones((2, 4), jnp.int32)}
    train.log_step(config, Writer(), floor, 1, metrics, None, batch, times)
  assert found[0]["mfu"] == 0.5 and "mfu" not in found[1]
  tpu = types.SimpleNamespace(device_kind="TPU v5 lite")
  assert machine.peak_flops([tpu, tpu]) == 2 * machine.CHIPS["v5e"].flops
  assert machine.peak_flops(jax.devices()) is None
