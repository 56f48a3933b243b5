"""From a config or a path to a model, a tokenizer, a decoder, an LM.

Nobody else builds one: training, evaluation, export, planning and the commands
call these functions.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import optim, sharding, trainable, validate
from cacheaug.augment import coprocessor
from cacheaug.data import tokenizers
from cacheaug.errors import UserError
from cacheaug.kernels import dispatch, self_check
from cacheaug.lm import DTYPES, LM
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import agreement
from cacheaug.run.workdir import read_config
from cacheaug.step import abstract_state
from cacheaug.weights import leaves, pretrained, trained

_DECODER, _COPROCESSOR = "shipped:tiny", "shipped:tiny_coprocessor"

# --- of a config ------------------------------------------------------------


def open_model(
  config: ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> tuple[Transformer, tokenizers.Tokenizer]:
  """The architecture and the tokenizer; reads no weights yet.

  With a mesh, attention's kernels run on each of its devices' own part.

  Raises:
    UserError: no such decoder, or a tokenizer or config that does not fit it.
  """
  spec = config.data.tokenizer
  if not config.decoder.path:
    model_config = configs.model_of(config)
    tokenizer = tokenizers.load("byte" if spec == "decoder" else spec)
  else:
    try:
      directory = pretrained.resolve(config.decoder.path)
    except UserError as e:
      how = config.decoder.how_to_get
      raise UserError(f"decoder.path: {e}{': ' + how if how else ''}") from e
    model_config = pretrained.read_config(directory)
    tokenizer = tokenizers.load(str(directory) if spec == "decoder" else spec)
  validate.check_model(config, model_config)
  _check_vocabulary(f"tokenizer {tokenizer.name}", tokenizer, model_config)
  return make_model(config, model_config, mesh), tokenizer


def make_model(
  config: ConfigDict,
  model_config: ModelConfig,
  mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
  """The architecture as the config wants it run, on the mesh's devices."""
  devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
  dtype = _dtype(config.precision.compute, devices[0].platform)
  shapes = self_check.Shapes(
    model_config.head_dim,
    model_config.heads // model_config.kv_heads,
    model_config.attention_softcap,
    dtype.name,
  )
  name, why = self_check.choose(config.attention, shapes, devices)
  logging.info("attention over the context: %s (%s)", name, why)
  kernel = dispatch.Kernel(name)
  if mesh is not None:
    kernel = dispatch.Kernel(
      name, mesh, batch=sharding.RULES["B"], heads=sharding.RULES["K"]
    )
  return Transformer(
    model_config, dtype=dtype, remat=config.remat, attention=kernel
  )


def describe_decoder(config: ConfigDict) -> dict[str, str]:
  """A digest of the decoder's files, for comparing what hosts see."""
  path = config.decoder.path
  if not path:
    return {}
  return {"decoder.path": agreement.of_directory(pretrained.resolve(path))}


def name_decoder(config: ConfigDict, fingerprint: str) -> str:
  """The decoder for a report: where it is from, which, and whether quantised.

  A dequantised decoder's fingerprint is of the weights as they are used.
  """
  path = config.decoder.path
  if not path:
    return f"random ({fingerprint})"
  kinds = pretrained.quantisation(pretrained.resolve(path))
  return (
    f"{path} ({fingerprint}{f', dequantised from {kinds}' if kinds else ''})"
  )


def load_decoder(
  config: ConfigDict, model: Transformer, mesh: jax.sharding.Mesh
) -> tuple[Params | None, str]:
  """The frozen decoder's sharded parameters and their fingerprint.

  (None, '') where a decoder is to be trained from nothing.
  """
  if not configs.has_decoder(config):
    return None, ""
  abstract = abstract_decoder(config, model, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  storage = _dtype(config.precision.decoder, _platform(mesh))
  if config.decoder.path:
    decoder = pretrained.load(
      pretrained.resolve(config.decoder.path),
      model.config,
      dtype=storage,
      shardings=shardings,
    )
  else:
    make = partial(trainable.random_decoder, config, model, storage)
    decoder = jax.jit(make, out_shardings=shardings)()
  return decoder, leaves.fingerprint(decoder)


def load_initial(
  config: ConfigDict,
  model: Transformer,
  mesh: jax.sharding.Mesh,
  decoder: Params | None,
  fingerprint: str,
) -> Params | None:
  """The trained coprocessor that the run begins as; None where it is none.

  Raises:
    UserError: none there, or one of another layout or decoder.
  """
  if not configs.begins_as_trained(config):
    return None
  path = config.coprocessor.init
  try:
    found = trained.open_coprocessor(path, model.config, decoder)
  except UserError as e:
    raise UserError(f"coprocessor.init={path!r}: {e}") from e
  validate.check_initial(config, found.spec, found.fingerprint, fingerprint)
  make = partial(coprocessor.init_boxed, model, configs.layout_of(config))
  boxed = jax.eval_shape(make, jax.random.key(0))
  host = jax.device_get(found.params)
  return jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
    host,
    sharding.tree_shardings(mesh, boxed),
  )


def abstract_decoder(
  config: ConfigDict, model: Transformer, mesh: sharding.AnyMesh
) -> Params:
  """Shapes of the frozen decoder's arrays, each with its sharding."""
  boxed = jax.eval_shape(partial(transformer.init, model), jax.random.key(0))
  storage = _dtype(config.precision.decoder, _platform(mesh))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, storage, sharding=s),
    nn.unbox(boxed),
    sharding.tree_shardings(mesh, boxed),
  )


def abstract_arguments(
  config: ConfigDict, model_config: ModelConfig, mesh: sharding.AnyMesh
) -> tuple[Any, Any, dict[str, jax.ShapeDtypeStruct]]:
  """(state, decoder, batch) of one step as shapes with shardings.

  Args:
    config: checked.
    model_config: the decoder's.
    mesh: of devices, or an AbstractMesh where none are needed.
  """
  model = shapes_only(config, model_config)
  decoder = None
  if configs.has_decoder(config):
    decoder = abstract_decoder(config, model, mesh)
  optimizer, _ = optim.make_optimizer(config.optimizer, config.optimizer.steps)
  state = abstract_state(config, model, optimizer, decoder, mesh)
  rows = jax.ShapeDtypeStruct(
    (config.data.batch, config.data.sequence),
    jnp.int32,
    sharding=sharding.batch_sharding(mesh),
  )
  return state, decoder, {"tokens": rows, "documents": rows}


def shapes_only(config: ConfigDict, model_config: ModelConfig) -> Transformer:
  """The model for shapes alone: TPU kernels load nowhere else, none matters."""
  if config.attention != "plain":
    config = ConfigDict(config.copy_and_resolve_references())
    config.attention = "xla"
  return make_model(config, model_config)


def described_model(config: ConfigDict) -> ModelConfig:
  """The decoder's ModelConfig, of `decoder.path` or `decoder.shape`.

  Reads config.json alone, no weights.

  Raises:
    UserError: neither says what the decoder is, or they do not agree.
  """
  if config.decoder.path:
    model_config = pretrained.read_config(
      pretrained.resolve(config.decoder.path)
    )
  elif all(value is None for value in config.decoder.shape.values()):
    raise UserError(
      "decoder.shape is empty: give its keys, or decoder.path of a directory "
      "with config.json"
    )
  else:
    model_config = configs.model_of(config)
  validate.check_model(config, model_config)
  return model_config


def parameters(tree: Params) -> int:
  """Numbers in a tree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _check_vocabulary(
  label: str, tokenizer: tokenizers.Tokenizer, model_config: ModelConfig
) -> None:
  """Refuses a tokenizer whose texts have ids that the decoder does not."""
  if tokenizer.vocab_size > model_config.vocab_size:
    raise UserError(
      f"{label} has {tokenizer.vocab_size} entries, the decoder's vocabulary "
      f"{model_config.vocab_size}: give the decoder's own"
    )


def _platform(mesh: sharding.AnyMesh) -> str:
  """Of the mesh's devices; this machine's where it has none."""
  if isinstance(mesh, jax.sharding.Mesh):
    return mesh.devices.flat[0].platform
  return jax.default_backend()


def _dtype(name: str, platform: str) -> Any:
  if name == "auto":
    name = "float32" if platform == "cpu" else "bfloat16"
  return jnp.dtype(name)


# --- of a path --------------------------------------------------------------


def load(path: str | Path, *, dtype: Any = "auto") -> LM:
  """A frozen decoder and its tokenizer.

  Args:
    path: a Hugging Face directory (config.json, safetensors, tokenizer), a
      GGUF file, 'ORG/NAME' on the hub, or 'shipped:NAME' in the package.
    dtype: of weights and activations: 'float32', 'bfloat16', or 'auto', which
      is bfloat16 on accelerators and float32 on the CPU.

  Raises:
    UserError: no such directory, weights of another family or shape, or a
      tokenizer that does not belong to them; names the file.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
  dtype = _dtype(dtype, jax.default_backend())
  directory = pretrained.resolve(str(path))
  config = pretrained.read_config(directory)
  tokenizer = None
  stop_ids = set(pretrained.stop_ids(directory))
  names = ("tokenizer.json", "tokenizer.model")
  if directory.is_file() or any((directory / name).exists() for name in names):
    tokenizer = tokenizers.load(str(directory))
    stop_ids |= {tokenizer.eos_id} - {None}
    _check_vocabulary(f"{directory}: its tokenizer", tokenizer, config)
  decoder = pretrained.load(directory, config, dtype=dtype)
  return LM(
    model=Transformer(config, dtype=dtype),
    decoder=decoder,
    tokenizer=tokenizer,
    fingerprint=leaves.fingerprint(decoder),
    stop_ids=tuple(sorted(stop_ids)),
  )


def open_lm(
  workdir: str, decoder: str, coprocessor: str, latents: bool | None = None
) -> LM:
  """The decoder and, with latents, the coprocessor that the flags name.

  Args:
    workdir: a run, whose decoder and coprocessor are meant, or ''.
    decoder: a directory, or ''.
    coprocessor: an export or a run, or ''.
    latents: False opens the decoder alone, True needs a coprocessor; None
      takes the one that is named, if any.

  Raises:
    UserError: paths that do not fit together, or hold nothing of the kind.
  """
  if workdir and coprocessor:
    raise UserError("--workdir and --coprocessor: give one of the two")
  if workdir:
    coprocessor = workdir
    decoder = decoder or _decoder_of(workdir)
  elif not decoder:
    decoder = _DECODER
    coprocessor = coprocessor or _COPROCESSOR
  if latents and not coprocessor:
    raise UserError(
      "--coprocessor is missing: give the decoder's, or --latents=off"
    )
  lm = load(decoder)
  if latents is False or not coprocessor:
    return lm
  return lm.with_coprocessor(coprocessor)


def latents_of(flag: str | None) -> bool | None:
  """--latents as `open_lm` takes it: 'on', 'off' or unset."""
  return None if flag is None else flag == "on"


def _decoder_of(workdir: str) -> str:
  decoder = read_config(workdir).decoder.path
  if not decoder:
    raise UserError(
      f"{workdir}: this run has no decoder.path (it is random, or the run "
      "trains one: export it with --decoder); give --decoder=DIR"
    )
  return decoder
