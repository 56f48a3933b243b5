"""Decoders in Hugging Face's layout, read and written.

A directory holds config.json and model.safetensors, or its sharded index.
families.py has what is particular to a family, leaves.py which tensors a
decoder is made of, safetensors_io.py the file format. Tensors are read one at a
time and go straight to their sharding and dtype.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params
from cacheaug.run.files import staged
from cacheaug.weights import config_json, families, gguf_io, leaves
from cacheaug.weights import safetensors_io as files
from cacheaug.weights.families import Family
from cacheaug.weights.leaves import Leaf

_SPECIALS = ("bos", "eos", "pad")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What stands in a tensor's name after the prefix of its decoder.
_PARTS = ("embed_tokens.", "layers.", "norm.")

Where = Mapping[str, tuple[pathlib.Path, str]]  # name -> file, its name there


def read_config(directory: str | pathlib.Path) -> ModelConfig:
  """ModelConfig of a directory's config.json.

  Both what transformers 5 writes (`rope_parameters`, `layer_types`) and the
  keys before it (`rope_theta`, `rope_scaling`, `sliding_window_pattern`) are
  understood.

  Raises:
    UserError: no config.json, another family, or a feature that is not
      supported; names the file and the key.
  """
  path = pathlib.Path(directory) / "config.json"
  if not path.exists():
    raise UserError(f"{path}: missing; give a Hugging Face model directory")
  return config_json.config_from_entries(files.read_json(path), path)


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
    directory: of Hugging Face's layout.
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
  where = _plain_names(directory, families.TABLE[config.family])
  wanted = leaves.leaves_of(config)
  head = where.pop(_HEAD, None) if config.tied_head else None
  if head:
    # One of the two names is kept where a shared tensor is saved once.
    where.setdefault(_EMBEDDING, head)
  check_tensors(directory, wanted, where)
  if head and head != where[_EMBEDDING]:
    _check_tied(head, where[_EMBEDDING])
  return leaves.read_leaves(wanted, where, dtype, shardings, files.read)


def _plain_names(directory: pathlib.Path, family: Family) -> Where:
  """Tensors by the names of a plain decoder, whatever they stand in."""
  located = files.locate(directory)
  prefix = _prefix(directory, located, family)
  plain = {}
  for name, path in located.items():
    # Old Llama releases store the RoPE frequencies too.
    if name.startswith(family.ignored) or name.endswith(".rotary_emb.inv_freq"):
      continue
    key = name
    if name.endswith(_HEAD):
      key = _HEAD
    elif name.startswith(tuple(prefix + part for part in _PARTS)):
      key = family.prefixes[0] + name.removeprefix(prefix)
    plain[key] = (path, name)
  return plain


def _prefix(
  directory: pathlib.Path, located: Mapping[str, pathlib.Path], family: Family
) -> str:
  """What stands before 'embed_tokens' and 'layers': '' in a bare model.

  Raises:
    UserError: the prefix of a wrapper, whose weights may not be plain ones.
  """
  for prefix in (*family.prefixes, ""):
    if any(prefix + part + "weight" in located for part in _PARTS):
      return prefix
  for name in located:
    prefix, found, _ = name.partition("embed_tokens.")
    if not found:
      prefix, found, _ = name.partition("layers.")
    if found:
      raise UserError(
        f"{directory}: its tensors' names begin with {prefix!r}, which a "
        "wrapper (torch.compile, DataParallel, peft) puts there: save the "
        "model that it wraps, merged, with save_pretrained"
      )
  return family.prefixes[0]


def _check_tied(
  head: tuple[pathlib.Path, str], embedding: tuple[pathlib.Path, str]
) -> None:
  """Compares a stored head with the embedding that it should be.

  Raises:
    UserError: they differ, so that the model has a head of its own.
  """
  found = [files.headers([path])[name] for path, name in (head, embedding)]
  shapes = [shape for shape, _ in found]
  if shapes[0] != shapes[1] or not files.equal(head, embedding):
    raise UserError(
      f"{head[0]}: {head[1]} is not the embedding, though config.json has "
      '"tie_word_embeddings": true: set it to false if the head was trained '
      "apart, or remove the tensor"
    )


def check_tensors(
  source: pathlib.Path, wanted: list[Leaf], where: Where
) -> None:
  """Looks at all tensors' names, shapes and dtypes before any is read.

  Raises:
    UserError: one that is missing, unexpected, misshapen or quantised.
  """
  shapes = {name: leaf.tensor_shape for leaf in wanted for name in leaf.names}
  by_file = {
    path: files.headers([path]) for path in {path for path, _ in where.values()}
  }
  found = {}
  for name, (path, stored) in where.items():
    if stored not in by_file[path]:
      raise UserError(
        f"{path}: has no tensor {stored}, though {files.INDEX} names it: "
        "download both again"
      )
    found[name] = by_file[path][stored]
  labels = {name: f"{path}: {stored}" for name, (path, stored) in where.items()}
  have = {name: shape for name, (shape, _) in found.items()}
  leaves.check_shapes(source, shapes, have, labels=labels)
  for name, (path, stored) in where.items():
    files.check_dtype(path, stored, found[name][1])


# --- writing ----------------------------------------------------------------


def save(
  directory: str | pathlib.Path,
  config: ModelConfig,
  params: Params,
  *,
  tokenizer: Any = None,
  stops: Sequence[int] = (),
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
    stops: ids of the tokens that end generation; by default those that the
      files beside the tokenizer name.
    dtype: of the written tensors.

  Raises:
    UserError: a config that its family cannot express, or a directory that
      cannot be written.
  """
  with staged(directory) as local:
    _save(local, config, params, tokenizer, jnp.dtype(dtype), stops)


def _save(
  directory: pathlib.Path,
  config: ModelConfig,
  params: Params,
  tokenizer: Any,
  dtype: np.dtype,
  stops: Sequence[int],
) -> None:
  entries = config_json.config_entries(config) | {"torch_dtype": dtype.name}
  # An absent id would be the family's default, which may lie beyond the table.
  ids = {
    f"{k}_token_id": getattr(tokenizer, f"{k}_id", None) for k in _SPECIALS
  }
  entries |= ids
  if tokenizer is not None:
    stops = stops or _stops_beside(tokenizer)
    if stops:
      known = {*stops} | ({tokenizer.eos_id} - {None})
      ids["eos_token_id"] = sorted(known) if len(known) > 1 else known.pop()
    files.write_json(directory / "generation_config.json", ids)
    tokenizer.save(directory)
  write_leaves(
    directory / files.SINGLE, leaves.leaves_of(config), params, dtype
  )
  files.write_json(directory / "config.json", entries)


def _stops_beside(tokenizer: Any) -> tuple[int, ...]:
  """The stop ids of the directory or GGUF file that a tokenizer came from."""
  source = getattr(tokenizer, "source", None)
  if source is None:  # of bytes, or SentencePiece's: it names its one itself
    return ()
  if gguf_io.is_gguf(source):
    return gguf_io.stop_ids(source)
  return stop_ids(source.parent)


def write_leaves(
  path: pathlib.Path, written: list[Leaf], params: Params, dtype: Any
) -> None:
  """Writes the leaves `written` to one file; `dtype` None keeps theirs."""
  flat = leaves.flatten(params)
  shapes = {
    name: (leaf.tensor_shape, jnp.dtype(dtype or flat[leaf.path].dtype))
    for leaf in written
    for name in leaf.names
  }

  def tensors() -> Iterator[np.ndarray]:
    for leaf in written:
      host = np.asarray(jax.device_get(flat[leaf.path]))
      for part in host if leaf.stacked else host[None]:
        yield leaf.theirs(part).astype(dtype or part.dtype)

  files.write(path, shapes, tensors())


# --- generation ------------------------------------------------------------


def stop_ids(directory: str | pathlib.Path) -> tuple[int, ...]:
  """Ids that end generation: generation_config.json's, else config.json's.

  Raises:
    UserError: an eos_token_id that is neither a number nor a list of them.
  """
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(directory) / name
    ids = files.read_json(path).get("eos_token_id") if path.exists() else None
    if ids is not None:
      ids = ids if isinstance(ids, list) else [ids]
      if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise UserError(f"{path}: eos_token_id {ids!r} holds other than ids")
      return tuple(i for i in ids if i >= 0)
  return ()
