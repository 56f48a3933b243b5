"""Weights in and out, by family: Hugging Face directories.

A directory holds config.json and model.safetensors, or its sharded index.
Google's own Gemma-2 checkpoints, which have neither, are google_gemma.py's.
What is particular to a family is in families.py, the file format in
safetensor_files.py. Tensors are read one at a time and go straight to their
sharding and dtype.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run.checksum import checksums, named_leaves
from cacheaug.run.files import staged
from cacheaug.weights import families
from cacheaug.weights import safetensors_io as files
from cacheaug.weights.families import Family

SHIPPED = "shipped:"
_SPECIALS = ("bos", "eos", "pad")
_ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"


def resolve(path: str) -> pathlib.Path:
  """The directory that `path` names; 'shipped:NAME' is one in the package.

  Raises:
    UserError: there is no such directory.
  """
  if path.startswith(SHIPPED):
    found = _ASSETS / path.removeprefix(SHIPPED)
    if not (found / "config.json").exists():
      names = sorted(p.parent.name for p in _ASSETS.glob("*/config.json"))
      known = ", ".join(SHIPPED + name for name in names) or "none"
      raise UserError(f"{path}: no such decoder in the package ({known})")
    return found
  found = pathlib.Path(path).expanduser()
  if not found.is_dir():
    raise UserError(f"{path}: no such directory of weights")
  return found


def _reader(directory: pathlib.Path) -> ModuleType | None:
  """google_gemma where `directory` is one of Google's, else None."""
  if (directory / "config.json").exists():
    return None
  # Here, because it builds on this module.
  from cacheaug.weights import google_gemma

  return google_gemma if google_gemma.find(directory) else None


# --- config.json ------------------------------------------------------------


def read_config(directory: str | pathlib.Path) -> ModelConfig:
  """ModelConfig of a Hugging Face directory's config.json, or of Google's.

  Both what transformers 5 writes (`rope_parameters`, `layer_types`) and the
  keys before it (`rope_theta`, `rope_scaling`, `sliding_window_pattern`) are
  understood.

  Raises:
    UserError: no config.json, another family, or a feature that is not
      supported; names the file and the key.
  """
  path = pathlib.Path(directory) / "config.json"
  if reader := _reader(path.parent):
    return reader.read_config(directory)
  if not path.exists():
    raise UserError(f"{path}: missing; give a Hugging Face model directory")
  return families.config_from_entries(files.read_json(path), path)


# --- names ------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _decoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Leaf path ('blocks/mlp/up/kernel') -> shape, in a fixed order."""
  model = Transformer(config)
  boxed = jax.eval_shape(
    lambda k: transformer.init(model, k), jax.random.key(0)
  )
  return {name: x.shape for name, x in named_leaves(nn.unbox(boxed)).items()}


def _nest(flat: Mapping[str, Any]) -> dict:
  tree: dict = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of our tree and the tensors it is made of."""

  path: str
  shape: tuple[int, ...]  # with L first in blocks
  names: tuple[str, ...]  # L of them in blocks, else one

  @property
  def stacked(self) -> bool:
    """Whether the leaf has L in front."""
    return self.path.startswith("blocks/")

  @property
  def part(self) -> tuple[int, ...]:
    """Shape of one layer's part."""
    return self.shape[1:] if self.stacked else self.shape

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each tensor."""
    return families.tensor_shape(self.path, self.part)

  def ours(self, tensor: np.ndarray) -> np.ndarray:
    """A tensor -> one layer's part, without a copy."""
    if self.path.endswith("/kernel"):
      tensor = tensor.T
    return tensor.reshape(self.part)

  def theirs(self, part: np.ndarray) -> np.ndarray:
    """One layer's part -> a tensor."""
    if self.path.endswith("/kernel"):
      return part.reshape(self.tensor_shape[::-1]).T
    return part.reshape(self.tensor_shape)


def leaves_of(config: ModelConfig) -> list[Leaf]:
  """Every leaf of a decoder, in a fixed order."""
  leaves = []
  for path, shape in _decoder_shapes(config).items():
    count = config.layers if path.startswith("blocks/") else 1
    name = families.tensor_name(path, families.TABLE[config.family])
    names = tuple(name.format(i) for i in range(count))
    leaves.append(Leaf(path, shape, names))
  return leaves


# --- reading ----------------------------------------------------------------


def load(
  directory: str | pathlib.Path,
  config: ModelConfig,
  *,
  dtype: Any,
  shardings: Params | None = None,
) -> Params:
  """A decoder's parameters, from safetensors.

  One leaf is in host memory at a time, and of it what this process's devices
  hold; of a file, one tensor.

  Args:
    directory: of Hugging Face's layout, or Google's of Gemma-2.
    config: from `read_config`, or what is expected.
    dtype: of every leaf.
    shardings: tree of shardings, as the result; the default device by
      default.

  Returns:
    The unboxed tree of `transformer.init`.

  Raises:
    UserError: files missing or damaged, or tensors of other names or shapes.
  """
  directory = pathlib.Path(directory)
  if reader := _reader(directory):
    return reader.load(directory, config, dtype=dtype, shardings=shardings)
  family = families.TABLE[config.family]
  where = _plain_names(files.locate(directory), family)
  leaves = leaves_of(config)
  if config.tied_head and "lm_head.weight" in where:
    # One of the two names is kept where a shared tensor is saved once.
    where.setdefault("model.embed_tokens.weight", where.pop("lm_head.weight"))
  check_tensors(directory, leaves, where)
  return read_leaves(leaves, where, dtype, shardings)


Where = Mapping[str, tuple[pathlib.Path, str]]  # name -> file, its name there


def _plain_names(
  located: Mapping[str, pathlib.Path], family: Family
) -> dict[str, tuple[pathlib.Path, str]]:
  """Tensors by the names of a plain decoder, whatever they stand in."""
  prefix = next(
    (p for p in family.prefixes if f"{p}embed_tokens.weight" in located),
    family.prefixes[0],
  )
  plain = {}
  for name, path in located.items():
    # Old Llama releases store the RoPE frequencies too.
    if name.startswith(family.ignored) or name.endswith(".rotary_emb.inv_freq"):
      continue
    key = name
    if name.startswith(prefix):
      key = family.prefixes[0] + name.removeprefix(prefix)
    elif name.endswith("lm_head.weight"):
      key = "lm_head.weight"
    plain[key] = (path, name)
  return plain


def check_tensors(
  source: pathlib.Path, leaves: list[Leaf], where: Where
) -> None:
  """Looks at all tensors' names, shapes and dtypes before any is read.

  Raises:
    UserError: one that is missing, unexpected, misshapen or quantised.
  """
  wanted = {name: leaf for leaf in leaves for name in leaf.names}
  for problem, names in (
    ("has no", [n for n in wanted if n not in where]),
    ("has an unexpected", [n for n in where if n not in wanted]),
  ):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(
        f"{source}: {problem} tensor {names[0]}{more}: do config.json and the "
        "weights belong together?"
      )
  found = files.headers(path for path, _ in where.values())
  for name, leaf in wanted.items():
    path, stored = where[name]
    if stored not in found:
      raise UserError(
        f"{path}: has no tensor {stored}, though {files.INDEX} names it: "
        "download both again"
      )
    if found[stored][0] != leaf.tensor_shape:
      raise UserError(
        f"{path}: {stored} is {list(found[stored][0])}, config.json wants "
        f"{list(leaf.tensor_shape)}: do they belong together?"
      )
  files.check_dtypes({s: p for p, s in where.values()}, found)


def read_leaves(
  leaves: list[Leaf],
  where: Mapping[str, tuple],
  dtype: Any,
  shardings: Params | None,
  read: Callable[..., np.ndarray] = files.read,
) -> Params:
  """The tree of `leaves`, of tensors `read(*where[name])`; see `load`."""
  flat = None if shardings is None else named_leaves(shardings)
  tree = {}
  for leaf in leaves:
    sharding = None if flat is None else flat[leaf.path]
    tree[leaf.path] = _read_leaf(leaf, where, dtype, sharding, read)
  return _nest(tree)


def _read_leaf(
  leaf: Leaf,
  where: Mapping[str, tuple],
  dtype: Any,
  sharding: Sharding | None,
  read: Callable[..., np.ndarray],
) -> jax.Array:
  """Fills this process's shards layer by layer, then hands them over."""
  if sharding is None:
    sharding = SingleDeviceSharding(jnp.zeros(()).devices().pop())
  shape = (len(leaf.names), *leaf.part)  # one that is not stacked has L = 1

  def bounds(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    index = index if leaf.stacked else (slice(None), *index)
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))

  places = sharding.addressable_devices_indices_map(leaf.shape).values()
  shards = {
    place: np.empty([stop - start for start, stop in place], jnp.dtype(dtype))
    for place in map(bounds, places)
  }
  for layer, name in enumerate(leaf.names):
    part = leaf.ours(read(*where[name]))
    for ((first, last), *rest), shard in shards.items():
      if first <= layer < last:
        shard[layer - first] = part[tuple(slice(*s) for s in rest)]

  def shard_of(index: tuple[slice, ...]) -> np.ndarray:
    shard = shards[bounds(index)]
    return shard if leaf.stacked else shard[0]

  array = jax.make_array_from_callback(leaf.shape, sharding, shard_of)
  # Transfers run on by themselves: without waiting, the host would hold the
  # shards of every leaf at once.
  return array.block_until_ready()


# --- writing ----------------------------------------------------------------


def save(
  directory: str | pathlib.Path,
  config: ModelConfig,
  params: Params,
  *,
  tokenizer: Any = None,
  dtype: Any = "float32",
) -> None:
  """Writes a decoder that `load` and transformers read.

  Each file is complete or absent; the weights' bytes depend on the values
  alone. Leaves must be addressable by this process.

  Args:
    directory: made if absent, local or gs://; files of the same names are
      replaced.
    config: of `params`.
    params: as `load` returns.
    tokenizer: its `save(directory)` writes its files, and its special ids go
      into config.json.
    dtype: of the written tensors.

  Raises:
    UserError: a config that its family cannot express, or a directory that
      cannot be written.
  """
  with staged(directory) as local:
    _save(local, config, params, tokenizer, jnp.dtype(dtype))


def _save(
  directory: pathlib.Path,
  config: ModelConfig,
  params: Params,
  tokenizer: Any,
  dtype: np.dtype,
) -> None:
  entries = families.config_entries(config) | {"torch_dtype": dtype.name}
  if tokenizer is not None:
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_id") for k in _SPECIALS}
    entries |= ids
    files.write_json(directory / "generation_config.json", ids)
    tokenizer.save(directory)
  write_leaves(directory / files.SINGLE, leaves_of(config), params, dtype)
  files.write_json(directory / "config.json", entries)


def write_leaves(
  path: pathlib.Path, leaves: list[Leaf], params: Params, dtype: Any
) -> None:
  """Writes `leaves` of `params` to one file; `dtype` None keeps theirs."""
  flat = named_leaves(params)
  shapes = {
    name: (leaf.tensor_shape, jnp.dtype(dtype or flat[leaf.path].dtype))
    for leaf in leaves
    for name in leaf.names
  }

  def tensors() -> Iterator[np.ndarray]:
    for leaf in leaves:
      host = np.asarray(jax.device_get(flat[leaf.path]))
      for part in host if leaf.stacked else host[None]:
        yield leaf.theirs(part).astype(dtype or part.dtype)

  files.write(path, shapes, tensors())


# --- identity ---------------------------------------------------------------


def fingerprint(params: Params) -> str:
  """12 hexadecimal digits that tell a decoder from another.

  Of the names, shapes and weights rounded to bfloat16, so that it is the same
  whether they were loaded as float32 or bfloat16; the same on any mesh.
  """
  flat = named_leaves(params)
  sums = checksums(flat.values(), jnp.bfloat16)
  shapes = [[name, *leaf.shape] for name, leaf in flat.items()]
  text = json.dumps([shapes, sums.tolist()])
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def stop_ids(directory: str | pathlib.Path) -> tuple[int, ...]:
  """Ids that end generation: generation_config.json's, else config.json's."""
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(directory) / name
    ids = files.read_json(path).get("eos_token_id") if path.exists() else None
    if ids is not None:
      return tuple(ids) if isinstance(ids, list) else (ids,)
  return ()
