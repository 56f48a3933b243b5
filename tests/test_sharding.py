"""Meshes and shardings on eight fake devices, and what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from cacheaug import sharding
from cacheaug.errors import UserError


def _sizes(data=2, fsdp=2, tensor=2, slices=1):
  return ConfigDict(
    {"data": data, "fsdp": fsdp, "tensor": tensor, "slices": slices}
  )


def _mesh(*sizes, **more):
  return sharding.make_mesh(_sizes(*sizes, **more))


def test_rest_of_the_devices_goes_to_data():
  assert dict(_mesh(data=-1, fsdp=2, tensor=1).shape) == {
    "data": 4,
    "fsdp": 2,
    "tensor": 1,
  }


@pytest.mark.parametrize(
  "sizes, numbers",
  [
    ((4, 4, 1), ("16", "8")),
    ((-1, 3, 1), ("fsdp=3", "8")),
    ((2, 2, 1), ("data=2", "8")),
    ((0, 2, 1), ("data=0",)),
  ],
)
def test_mesh_that_does_not_fit_is_refused_with_numbers(sizes, numbers):
  with pytest.raises(UserError) as caught:
    _mesh(*sizes)
  message = str(caught.value)
  assert "config.mesh" in message and "\n" not in message
  assert all(n in message for n in numbers)


def test_slices_split_the_data_axis_alone():
  """Devices 0-3 and 4-7 are far apart: only `data` goes from one to others."""
  devices = _mesh(data=4, fsdp=2, tensor=1, slices=2).devices
  halves = np.vectorize(lambda d: d.id // 4)(devices)
  assert halves[:, 0, 0].tolist() == [0, 0, 1, 1]
  assert (halves == halves[:, :1, :1]).all()


def _tpu(number, per_slice):
  return SimpleNamespace(
    id=number,
    platform="tpu",
    device_kind="TPU v5 lite",
    process_index=number // 4,
    slice_index=number // per_slice,
    coords=(number % per_slice % 2, number % per_slice // 2, 0),
    core_on_chip=0,
  )


def test_tpu_slices_are_taken_as_they_are(monkeypatch):
  """In whatever order jax lists the devices."""
  monkeypatch.setattr(
    sharding, "Mesh", lambda devices, axes: SimpleNamespace(devices=devices)
  )
  devices = [_tpu(i, 4) for i in (5, 0, 6, 3, 1, 7, 2, 4)]
  found = sharding.make_mesh(_sizes(2, 4, 1, slices=2), devices).devices
  slices = np.vectorize(lambda d: d.slice_index)(found)
  assert slices.reshape(2, 4).tolist() == [[0] * 4, [1] * 4]
  with pytest.raises(UserError, match="are of 2 slices: set mesh.slices=2"):
    sharding.make_mesh(_sizes(2, 4, 1), devices)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 4), (4, 2, 1, 3), (2, 2, 2, 0)])
def test_slices_must_divide_the_data_axis(sizes):
  with pytest.raises(UserError, match=f"mesh.slices: {sizes[3]} .*data="):
    _mesh(*sizes)


def test_letters_map_to_mesh_axes_and_shards_have_their_shapes():
  mesh = _mesh()
  shapes = {
    "q": jax.ShapeDtypeStruct((3, 8, 4, 5), jnp.float32),
    "embed": jax.ShapeDtypeStruct((16, 8), jnp.float32),
    "scale": jax.ShapeDtypeStruct((7,), jnp.float32),
    "square": jax.ShapeDtypeStruct((8, 8), jnp.float32),
    "tokens": jax.ShapeDtypeStruct((12, 9), jnp.int32),
  }
  axes = {
    "q": ("L", "D", "H", "E"),
    "embed": ("V", "D"),
    "scale": None,
    "square": ("D", "D"),
    "tokens": ("B", "S"),
  }
  found = sharding.logical_to_sharding(mesh, axes, shapes)
  local = {k: found[k].shard_shape(shapes[k].shape) for k in shapes}
  assert local == {
    "q": (3, 4, 2, 5),
    "embed": (8, 4),
    "scale": (7,),
    "square": (4, 8),
    "tokens": (3, 9),
  }


def test_dimension_that_does_not_divide_is_refused_by_path():
  shapes = {"layers": {"q": jax.ShapeDtypeStruct((8, 3), jnp.float32)}}
  with pytest.raises(UserError, match=r"layers/q.*\(H\).*\(8, 3\).*tensor=2"):
    sharding.logical_to_sharding(_mesh(), {"layers": {"q": ("D", "H")}}, shapes)


def test_unknown_letter_and_wrong_rank_are_errors():
  shape = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  with pytest.raises(ValueError, match="'Q'"):
    sharding.logical_to_sharding(_mesh(), ("Q", "D"), shape)
  with pytest.raises(ValueError, match="axes"):
    sharding.logical_to_sharding(_mesh(), ("D",), shape)


class _Layers(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = nn.with_logical_partitioning(
      nn.initializers.normal(1.0), ("D", "F")
    )
    body = nn.scan(
      lambda module, carry, _: (
        carry + module.param("w", kernel, (8, 6)).sum(),
        None,
      ),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
      metadata_params={nn.PARTITION_NAME: "L"},
    )
    x, _ = body(self, x, None)
    return x * self.param("plain", nn.initializers.ones, ())


def test_shardings_come_from_linen_metadata_and_drive_init():
  mesh = _mesh()

  def init(key):
    return _Layers().init(key, jnp.zeros(()))

  shardings = sharding.tree_shardings(
    mesh, jax.eval_shape(init, jax.random.key(0))
  )
  assert shardings["params"]["w"].spec == P(None, ("fsdp",), ("tensor",))
  assert shardings["params"]["plain"].spec == P()
  params = jax.jit(lambda k: nn.unbox(init(k)), out_shardings=shardings)(
    jax.random.key(0)
  )
  assert params["params"]["w"].addressable_shards[0].data.shape == (3, 4, 3)


def test_put_global_splits_the_batch_and_keeps_its_order():
  mesh = _mesh()
  batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}
  put = sharding.put_global(batch, sharding.batch_sharding(mesh))["tokens"]
  np.testing.assert_array_equal(np.asarray(put), batch["tokens"])
  assert put.addressable_shards[0].data.shape == (2, 3)
  whole = sharding.put_global(np.float32(3), sharding.replicated(mesh))
  assert whole.is_fully_replicated and float(whole) == 3.0


def test_sharded_matmul_equals_unsharded():
  x = jax.random.normal(jax.random.key(0), (8, 16))
  w = jax.random.normal(jax.random.key(1), (16, 32))
  shardings = sharding.logical_to_sharding(
    _mesh(), (("B", "D"), ("D", "F")), (x, w)
  )
  found = jax.jit(jnp.matmul)(*jax.device_put((x, w), shardings))
  # Sums of 16 float32 products in another order.
  np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)
