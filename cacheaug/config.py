"""Every key of an experiment, set once and commented; and their checks.

A config file starts from `base()`, changes what it needs and returns it. Code
never reads a key with a default, so a key that is not here is an error.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from cacheaug.augment import coprocessor, traces
from cacheaug.augment.traces import TraceSpec
from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig

OBJECTIVES = ("coprocessor", "language_model")
DTYPES = ("auto", "float32", "bfloat16")


def base() -> ConfigDict:
  """The config all others start from."""
  from cacheaug.data.sources import source_defaults

  c = ConfigDict()
  # What is trained: a coprocessor for a frozen decoder, or (language_model) a
  # decoder itself.
  c.objective = "coprocessor"
  c.seed = 0  # of parameters, data order and points
  c.runlocal = False  # shrink everything to run anywhere, same code

  # The frozen decoder: a directory (config.json + safetensors), or
  # 'shipped:NAME' for one in the package; '' makes a random one of `family`
  # and `shape` (what the language_model objective trains).
  c.decoder = ConfigDict()
  c.decoder.path = ""
  c.decoder.family = "gemma2"
  c.decoder.shape = ConfigDict()  # of the keys of model.config.ModelConfig
  for field in dataclasses.fields(ModelConfig):
    if field.name not in ("family", "layer_kinds", "rope_scaling"):
      # None, of the field's own type: the family's default.
      c.decoder.shape[field.name] = config_dict.placeholder(field.type)
  c.decoder.how_to_get = ""  # shown where `path` is missing

  c.coprocessor = ConfigDict()
  c.coprocessor.latents = 16  # N, soft tokens and latents a trace
  c.coprocessor.init = "decoder"  # or 'scratch'
  c.coprocessor.start = "harmless"  # or 'as_is', see augment/coprocessor.py
  c.coprocessor.positions = "replace"  # or insert, overlay, see augment/traces

  c.traces = ConfigDict()
  c.traces.count = 128  # M, points a sequence
  c.traces.ahead = 16  # A, tokens predicted after each
  c.traces.law = "uniform"  # the paper's, or 'stratified': one a bucket
  c.traces.min_ahead = 1  # fewest ahead tokens left in the point's document
  c.traces.mask_documents = True  # a sequence's documents do not see each other

  c.data = ConfigDict()
  c.data.sources = ConfigDict()  # name -> see data/sources.py source_defaults
  c.data.tokenizer = (
    "decoder"  # the decoder's own, or byte, hf:, sentencepiece:
  )
  c.data.sequence = 2048  # S
  c.data.batch = 1024  # B, over all devices
  c.data.cache_dir = ""  # '' is ~/.cache/cacheaug
  c.data.validation_fraction = 0.05  # of documents, never trained on
  c.data.workers = 2  # processes that tokenise

  c.optimizer = ConfigDict()
  c.optimizer.steps = 100_000
  c.optimizer.learning_rate = 1e-4  # peak
  c.optimizer.schedule = "cosine"  # or linear, constant
  c.optimizer.warmup = 1000  # steps
  c.optimizer.final_fraction = 0.1  # of the peak, at the end
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.95
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0  # of matrices
  c.optimizer.clip = 1.0  # global gradient norm, 0 for none
  c.optimizer.accumulation = 1  # micro-batches a step
  # Parameter path (regular expression) -> multiple of the learning rate.
  c.optimizer.multipliers = ConfigDict({"": 1.0})
  c.optimizer.average = 0.0  # decay of a running average of weights, 0 for none

  c.mesh = ConfigDict()
  c.mesh.data = -1  # the devices left over by the other axes
  c.mesh.fsdp = 1
  c.mesh.tensor = 1

  c.precision = ConfigDict()
  c.precision.compute = "auto"  # bfloat16 on accelerators, float32 on CPU
  c.precision.decoder = "auto"  # storage of the frozen decoder
  c.remat = "none"  # or full, dots: what the backward pass recomputes

  c.log_every = 100  # steps
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps
  c.checkpoint.keep = 2  # newest kept

  c.eval = ConfigDict()
  c.eval.sequences = 256  # held-out sequences in the final report
  c.eval.batch = 8  # of them at once
  c.eval.ahead = 32  # tokens after the latents that the table covers
  c.eval.problems = 0  # generated problems answered, 0 for none
  c.eval.every = 0  # steps between tables while training, 0 for the end only

  c.export = ""  # directory to export the result to at the end, '' for none
  return c


def model_of(config: ConfigDict) -> ModelConfig:
  """The random decoder's ModelConfig, of `decoder.family` and `shape`."""
  shape = {k: v for k, v in config.decoder.shape.items() if v is not None}
  return model_config.make(config.decoder.family, **shape)


def spec_of(config: ConfigDict) -> TraceSpec:
  """The trace layout that a config asks for."""
  return TraceSpec(
    latents=config.coprocessor.latents,
    ahead=config.traces.ahead,
    scheme=config.coprocessor.positions,
    start=config.coprocessor.start,
    count=config.traces.count,
    law=config.traces.law,
    min_ahead=config.traces.min_ahead,
    mask_documents=config.traces.mask_documents,
  )


def validate(config: ConfigDict, devices: int) -> None:
  """Refuses what cannot run, before any device work.

  Raises:
    UserError: naming the key and the numbers.
  """
  _one_of("objective", config.objective, OBJECTIVES)
  _one_of("coprocessor.init", config.coprocessor.init, coprocessor.INITS)
  _one_of("precision.compute", config.precision.compute, DTYPES)
  _one_of("precision.decoder", config.precision.decoder, DTYPES)
  _one_of("remat", config.remat, ("none", *transformer.REMAT_POLICIES))
  positive = (
    "data.sequence data.batch optimizer.steps optimizer.accumulation log_every "
    "checkpoint.every checkpoint.keep eval.sequences eval.batch eval.ahead"
  )
  for key in positive.split():
    if _at(config, key) < 1:
      raise UserError(f"{key}={_at(config, key)} must be at least 1")
  if not config.data.sources:
    raise UserError("data.sources is empty: name at least one source")
  batch, k = config.data.batch, config.optimizer.accumulation
  shards = devices // config.mesh.tensor
  if batch % (k * shards):
    raise UserError(
      f"data.batch={batch} does not divide over optimizer.accumulation={k} x "
      f"{shards} (mesh data x fsdp): change one of them"
    )
  if config.objective == "coprocessor":
    _validate_traces(config)


def _validate_traces(config: ConfigDict) -> None:
  spec, s = spec_of(config), config.data.sequence
  points = s - spec.min_ahead - spec.context_needed + 1
  if spec.count > points:
    raise UserError(
      f"traces.count={spec.count} exceeds the {max(points, 0)} possible points "
      f"of a sequence of data.sequence={s} with coprocessor.latents="
      f"{spec.latents} and traces.min_ahead={spec.min_ahead}"
    )
  if spec.law == "stratified" and s % spec.count:
    raise UserError(
      f"traces.law='stratified' wants data.sequence={s} to be a multiple of "
      f"traces.count={spec.count}"
    )
  needed = spec.context_needed + config.eval.ahead
  if needed > s:
    raise UserError(
      f"eval.ahead={config.eval.ahead} with coprocessor.latents={spec.latents} "
      f"needs sequences of {needed} tokens, data.sequence={s}"
    )


def _at(config: ConfigDict, key: str) -> Any:
  for part in key.split("."):
    config = config[part]
  return config


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise UserError(f"{key}={value!r} is not one of {', '.join(known)}")
