"""Eight devices equal one, and micro-batches equal one big batch.

Tolerance: float32 sums in another order; 2e-5 relative is some 200 roundings.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_runs
from ml_collections import ConfigDict

from cacheaug import sharding
from cacheaug.errors import UserError

OBJECTIVES = ("coprocessor", "language_model")


def _close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(
      np.asarray(x), np.asarray(y), rtol=1e-3, atol=2e-6
    )


def _config(tmp_path, objective):
  config = small_runs.get_config(str(tmp_path))
  config.objective = objective
  return config


@pytest.fixture(scope="module", params=OBJECTIVES)
def one(request, tmp_path_factory):
  """Five steps on one device with the whole batch at once; their losses."""
  directory = tmp_path_factory.mktemp(request.param)
  run = small_runs.Steps(_config(directory, request.param))
  losses = run.take(5)
  assert len(set(losses)) == 5
  return directory, request.param, run, losses


def test_eight_devices_equal_one(one):
  directory, objective, run, losses = one
  config = _config(directory, objective)
  config.mesh.update(data=2, fsdp=2, tensor=2)
  eight = small_runs.Steps(config, devices=8)
  np.testing.assert_allclose(eight.take(5), losses, rtol=2e-5)
  _close(eight.state.params, run.state.params)

  # Really split: D over fsdp, H over tensor, moments as their parameters.
  tree = eight.state.params
  tree = tree if objective == "language_model" else tree["transformer"]
  kernel = tree["blocks"]["attention"]["q"]["kernel"]
  assert kernel.shape == (2, 16, 2, 8)
  assert kernel.addressable_shards[0].data.shape == (2, 8, 1, 8)
  moments = [
    x for x in jax.tree.leaves(eight.state.opt_state) if x.shape == kernel.shape
  ]
  assert len(moments) >= 2
  for moment in moments:
    assert moment.addressable_shards[0].data.shape[1] == 8
  if eight.decoder is not None:
    embedding = eight.decoder["embedder"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (130, 8)


def test_accumulation_equals_one_batch(one):
  directory, objective, run, losses = one
  config = _config(directory, objective)
  config.optimizer.accumulation = 4
  parts = small_runs.Steps(config)
  np.testing.assert_allclose(parts.take(5), losses, rtol=2e-5)
  _close(parts.state.params, run.state.params)
  np.testing.assert_allclose(parts.state.tokens, run.state.tokens)


def test_tensor_axis_over_processes_is_refused(monkeypatch):
  """Its devices would be handed other rows by each process."""

  monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: axes)
  devices = [
    SimpleNamespace(process_index=i // 4, platform="cpu", device_kind="cpu")
    for i in range(8)
  ]
  sizes = ConfigDict({"data": 1, "fsdp": 2, "tensor": 4, "slices": 1})
  sharding.make_mesh(sizes, devices)
  sizes.update(fsdp=1, tensor=8)
  with pytest.raises(UserError, match="mesh.tensor: 8 spans processes"):
    sharding.make_mesh(sizes, devices)
