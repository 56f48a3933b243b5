"""One mesh, one table from axis letters to mesh axes, and refusals.

Sharding stays outside the maths: modules name their parameters' axes by the
letters of the method (`nn.with_logical_partitioning(init, ("V", "D"))`), and
everything about devices is decided here.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cacheaug.errors import UserError
from cacheaug.model import placement
from cacheaug.run.checksum import leaf_name

AnyMesh = Mesh | AbstractMesh  # of devices, or of as many without any

MESH_AXES = ("data", "fsdp", "tensor")

# Axis letter -> mesh axes that its dimension is split over, in order. `fsdp`
# splits parameters by width and the batch as well; letters that map to
# nothing are replicated: layers are scanned over, heads' channels, latents
# and positions are read whole by every device.
RULES: Mapping[str | None, tuple[str, ...]] = {
  "B": ("data", "fsdp"),
  "D": ("fsdp",),
  "H": ("tensor",),
  "K": ("tensor",),
  "F": ("tensor",),
  "V": ("tensor",),
  "L": (),
  "E": (),
  "N": (),
  "S": (),
  None: (),
}


def make_mesh(
  config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Mesh with axes (data, fsdp, tensor) over all devices.

  Args:
    config: sizes `data`, `fsdp`, `tensor`, `slices`; data = -1 takes the rest.
    devices: those to use; all of the run's by default. `slices` equal parts
      of them, joined by a slow network, split the data axis, the one that
      bears it: once a step, for gradients.

  Raises:
    UserError: sizes that do not multiply to the number of devices, another
      number of TPU slices than `slices`, or a tensor axis over several
      processes, which read other rows each.
  """
  devices = list(jax.devices() if devices is None else devices)
  data, fsdp, tensor = mesh_sizes(config, len(devices))
  shape = data // config.slices, fsdp, tensor
  # The data axis runs through one slice before it enters the next.
  arranged = np.concatenate(
    [
      mesh_utils.create_device_mesh(shape, part)
      for part in _slices(config, devices)
    ]
  )
  for group in arranged.reshape(-1, tensor):
    if len({d.process_index for d in group}) > 1:
      raise UserError(
        f"config.mesh.tensor: {tensor} spans processes: lower it to at most "
        "the devices of one, or raise mesh.fsdp instead"
      )
  return Mesh(arranged, MESH_AXES)


def mesh_sizes(config: ConfigDict, devices: int) -> tuple[int, int, int]:
  """Sizes (data, fsdp, tensor) over that many devices; see `make_mesh`.

  Raises:
    UserError: sizes that do not multiply to them.
  """
  data, fsdp, tensor = config.data, config.fsdp, config.tensor
  if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
    raise UserError(
      f"config.mesh: data={data}, fsdp={fsdp}, tensor={tensor} must be 1 or "
      "more (data may be -1: the rest)"
    )
  asked = fsdp * tensor * max(data, 1)
  if asked > devices:
    raise UserError(
      f"config.mesh: data={data}, fsdp={fsdp}, tensor={tensor} asks for "
      f"{asked} devices, {devices} found: lower one of them"
    )
  if data == -1:
    data = devices // asked
  if data * fsdp * tensor != devices:
    raise UserError(
      f"config.mesh: data={config.data}, fsdp={fsdp}, tensor={tensor} do not "
      f"multiply to the {devices} devices found: choose sizes that do"
    )
  if config.slices < 1 or data % config.slices:
    raise UserError(
      f"config.mesh.slices: {config.slices} must be 1 or more and divide "
      f"mesh.data={data}, the only axis that may span slices"
    )
  return data, fsdp, tensor


def _slices(
  config: ConfigDict, devices: Sequence[jax.Device]
) -> list[list[jax.Device]]:
  """The devices of each slice, as many in each as `config.slices` makes."""
  found = sorted({getattr(d, "slice_index", None) or 0 for d in devices})
  # Only TPU slices are separate by construction; elsewhere (`slice_index` may
  # count hosts there) the user says where the network is slow, in whole runs
  # of jax.devices(), whose order is by process.
  if len(found) == 1 or devices[0].platform != "tpu":
    size = len(devices) // config.slices
    return [
      list(devices[i * size : (i + 1) * size]) for i in range(config.slices)
    ]
  if len(found) != config.slices:
    raise UserError(
      f"config.mesh.slices: {config.slices}, but the devices found are of "
      f"{len(found)} slices: set mesh.slices={len(found)}"
    )
  return [[d for d in devices if d.slice_index == i] for i in found]


def _spec(
  mesh: AnyMesh, name: str, axes: Sequence[str | None] | None, shape: tuple
) -> PartitionSpec:
  """PartitionSpec of one array; checks letters, rank and divisibility."""
  if axes is None:
    return PartitionSpec()
  if len(axes) != len(shape):
    raise ValueError(f"{name}: axes {tuple(axes)} for shape {shape}")
  used: set[str] = set()
  entries: list[tuple[str, ...] | None] = []
  for dimension, (letter, size) in enumerate(zip(axes, shape, strict=True)):
    if letter not in RULES:
      raise ValueError(f"{name}: axis letter {letter!r} is not in RULES")
    # A mesh axis may split one dimension only: of ("D", "D") the first.
    over = tuple(a for a in RULES[letter] if a not in used)
    parts = math.prod(mesh.shape[a] for a in over)
    if size % parts:
      sizes = " * ".join(f"{a}={mesh.shape[a]}" for a in over)
      raise UserError(
        f"{name}: dimension {dimension} ({letter}) of shape {shape} does not "
        f"divide over the mesh's {sizes}: change config.mesh or that size"
      )
    used.update(over)
    entries.append(over or None)
  return PartitionSpec(*entries)


def logical_to_sharding(mesh: AnyMesh, axes_tree: Any, shapes_tree: Any) -> Any:
  """Shardings of a tree of arrays from their axis letters.

  Args:
    mesh: from `make_mesh`.
    axes_tree: as `shapes_tree`, each leaf a tuple of letters (None for an
      unsplit dimension), or None for an array replicated whole.
    shapes_tree: arrays or jax.ShapeDtypeStruct.

  Returns:
    `shapes_tree` with a NamedSharding for each leaf.

  Raises:
    UserError: a dimension that its mesh axes do not divide.
    ValueError: an unknown letter, or axes of another rank than the shape.
  """

  def one(path, leaf, axes):
    name = leaf_name(path) or "array"
    return NamedSharding(mesh, _spec(mesh, name, axes, leaf.shape))

  return jax.tree_util.tree_map_with_path(one, shapes_tree, axes_tree)


def tree_shardings(mesh: AnyMesh, abstract_boxed: Any) -> Any:
  """Shardings of a tree whose arrays carry Linen's logical axis names.

  Args:
    mesh: from `make_mesh`.
    abstract_boxed: from `jax.eval_shape`: parameters, or a whole train state
      with optimizer moments. Leaves without a box are replicated.

  Returns:
    The unboxed tree with a NamedSharding for each leaf.
  """

  def is_box(x):
    return isinstance(x, nn.Partitioned)

  def map_boxes(f):
    return jax.tree.map(f, abstract_boxed, is_leaf=is_box)

  shapes = map_boxes(lambda x: x.value if is_box(x) else x)
  axes = map_boxes(lambda x: x.names if is_box(x) else None)
  return logical_to_sharding(mesh, axes, shapes)


def placing(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
  """Entered while a step is traced: intermediate arrays follow RULES too."""

  def place(x: jax.Array, letters: tuple[str | None, ...]) -> jax.Array:
    spec = _spec(mesh, "an intermediate array", letters, x.shape)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return placement.using(place)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
  """Sharding of [B, ...]: the batch over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(RULES["B"]))


def replicated(mesh: AnyMesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def put_global(local: Any, sharding: NamedSharding) -> Any:
  """Global arrays from each process's own rows.

  Args:
    local: tree of numpy arrays [B / processes, ...], this process's part of
      the batch in the order of processes; whole arrays if replicated.
    sharding: of every array in the tree.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), local
  )


def abstract_mesh(config: ConfigDict, devices: int) -> AbstractMesh:
  """The config's mesh over so many devices, without any."""
  sizes = mesh_sizes(config.mesh, devices)
  return AbstractMesh(sizes, MESH_AXES)
