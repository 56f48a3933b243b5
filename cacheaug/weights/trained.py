"""What runs have trained: a coprocessor or a decoder from a run's directory."""

import dataclasses
import pathlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from etils import epath
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import trainable
from cacheaug.augment import coprocessor
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError, one_line
from cacheaug.model import lora, transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import checkpoint, files
from cacheaug.run import workdir as workdirs
from cacheaug.run.checksum import leaf_name
from cacheaug.weights import coprocessor_files, hub, leaves, pretrained


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's directory holds, of its newest whole checkpoint."""

  workdir: epath.Path  # local or gs://
  config: ConfigDict
  spec: Layout | None  # None where the run trains a decoder
  flat: dict[str, jax.Array]  # 'a/b/c' -> weights, 'frozen/...' among them
  decoder_fingerprint: str  # '' where the run had no frozen decoder
  step: int


def read_run(workdir: str | pathlib.Path) -> Run:
  """Config and weights of a run, from the directory alone.

  Raises:
    UserError: no run there, one without a checkpoint that can be read, or a
      config.json of another version; names the file.
  """
  workdir = files.expanded(workdir)
  config = workdirs.read_config(workdir)
  try:
    trains_decoder = config.objective == "language_model"
    spec = None if trains_decoder else configs.layout_of(config)
  except (ValueError, TypeError, AttributeError, KeyError) as e:
    raise UserError(
      f"{workdir / 'config.json'}: not a run's config ({one_line(e)}); give "
      "the --workdir of a run of this version"
    ) from e
  with files.reading(workdir):
    found = checkpoint.read_params(workdir / "checkpoints")
  if found is None:
    raise UserError(
      f"{workdir}/checkpoints: no checkpoint that can be read; let the run "
      "reach its first (checkpoint.every), or give another --workdir"
    )
  flat, meta, step = found
  return Run(workdir, config, spec, flat, meta["decoder"], step)


def run_params(
  run: Run, model_config: ModelConfig, decoder: Params | None = None
) -> Params:
  """The run's weights as a tree of that architecture, a LoRA merged.

  Args:
    run: from `read_run`.
    model_config: of its decoder.
    decoder: the frozen decoder's weights, which a LoRA may adapt; read from
      where the run had them by default.

  Raises:
    UserError: they are of another shape; names the first that differs.
  """
  model = Transformer(model_config)
  if not adapts(run):
    if run.spec is None:
      make = partial(transformer.init, model)
    else:
      make = partial(coprocessor.init_boxed, model, run.spec)
    return _tree(run, nn.unbox(jax.eval_shape(make, jax.random.key(0))))
  shapes = jax.eval_shape(
    lambda key: trainable.init(run.config, model, key, None, boxed=True),
    jax.random.key(0),
  )
  params, frozen = nn.unbox(shapes)
  tree = _tree(run, params if frozen is None else params | {"frozen": frozen})
  frozen = tree.pop("frozen", None)
  if frozen is None and decoder is None:
    decoder = _decoder_params(run, model)
  return trainable.effective(run.config, tree, frozen, decoder, lora.merge)


def adapts(run: Run) -> bool:
  """Whether a LoRA was trained; the config of an older run has no such key."""
  return any(name.startswith("lora/") for name in run.flat)


def _tree(run: Run, wanted: Params) -> Params:
  """The run's arrays in the form of `wanted`, whose shapes they must have."""
  for name, x in leaves.flatten(wanted).items():
    shape = list(run.flat[name].shape) if name in run.flat else "absent"
    if shape != list(x.shape):
      raise UserError(
        f"{run.workdir}/checkpoints/{run.step}: {name} is {shape}, the decoder "
        f"given wants {list(x.shape)}: give the decoder of this run"
      )
  return jax.tree_util.tree_map_with_path(
    lambda path, _: run.flat[leaf_name(path)], wanted
  )


def _decoder_params(run: Run, model: Transformer) -> Params:
  """The weights of the run's decoder, float32.

  Raises:
    UserError: they are not there, or others.
  """
  path = run.config.decoder.path
  if path:
    try:
      directory = pretrained.resolve(path)
      decoder = pretrained.load(directory, model.config, dtype="float32")
    except UserError as e:
      raise UserError(
        f"decoder of {run.workdir}: {e}; give --decoder_path=DIR"
      ) from e
  else:
    make = partial(trainable.random_decoder, run.config, model, "float32")
    decoder = jax.jit(make)()
  if leaves.fingerprint(decoder) != run.decoder_fingerprint:
    raise UserError(
      f"{run.workdir} adapts decoder {run.decoder_fingerprint}, {path!r} holds "
      "another now: give --decoder_path=DIR"
    )
  return decoder


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained coprocessor, from wherever it was."""

  params: Params
  spec: Layout
  draw: Draw
  fingerprint: str  # of its decoder
  source: str  # where that came from


def open_coprocessor(
  path: str | pathlib.Path,
  model_config: ModelConfig,
  decoder: Params | None,
  *,
  dtype: Any = "float32",
) -> Trained:
  """A trained coprocessor.

  Args:
    path: an exported directory, 'shipped:NAME', or a run's workdir, whose
      newest whole checkpoint is read.
    model_config: of the decoder at hand.
    decoder: its weights.
    dtype: of every leaf.

  Raises:
    UserError: nothing of the kind there.
  """
  directory = _directory(str(path))
  if _has_checkpoints(directory):
    run = read_run(directory)
    if run.spec is None:
      raise UserError(
        f"{directory}: holds a decoder (objective='language_model'), not a "
        "coprocessor; export it with --decoder and give it to cacheaug.load"
      )
    params = run_params(run, model_config, decoder)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    where = run.config.decoder.path
    draw = configs.draw_of(run.config)
    return Trained(params, run.spec, draw, run.decoder_fingerprint, where)
  _, spec, params, meta = coprocessor_files.load_coprocessor(
    directory, dtype=dtype
  )
  fingerprint, source = meta["decoder_fingerprint"], meta["source"]
  return Trained(params, spec, meta["draw"], fingerprint, source)


def _directory(path: str) -> epath.Path:
  if path.startswith(pretrained.SHIPPED):
    return files.expanded(pretrained.resolve(path))
  directory = files.expanded(path)
  with files.reading(path):
    if directory.is_dir():
      return directory
  if hub.is_spec(path):
    return files.expanded(hub.download(path))
  raise UserError(
    f"{path}: no such directory; give an exported coprocessor, a run's "
    "workdir, or a repository of the hub"
  )


def _has_checkpoints(directory: epath.Path) -> bool:
  with files.reading(directory):
    return (directory / "checkpoints").is_dir()
