"""Checks a config's values before any device work.

Each message is one line that names the key, its value and the remedy. Unknown
and missing keys are refused in config.check_keys; `Layout`, `Draw`, `Terms` and
`Kind` refuse values of their own.
"""

import math
import os

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import optim, sharding
from cacheaug.augment import coprocessor, kinds, point_sampling, traces
from cacheaug.augment.kinds import Kind
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.kernels import dispatch
from cacheaug.model import lora, transformer
from cacheaug.model.config import SLIDING, ModelConfig
from cacheaug.run import files, profiling

OBJECTIVES = ("coprocessor", "language_model")
LOSSES = ("tokens", "traces")
DTYPES = ("auto", "float32", "bfloat16")
_EVAL_POSITIVE = ("eval.sequences", "eval.batch", "eval.ahead")
_POSITIVE = (
  "coprocessor.latents",
  "traces.count",
  "traces.ahead",
  "traces.min_ahead",
  "traces.rounds",
  "data.sequence",
  "data.batch",
  "optimizer.steps",
  "optimizer.accumulation",
  "log_every",
  "checkpoint.every",
  "checkpoint.keep",
  "watchdog.host_seconds",
  *_EVAL_POSITIVE,
)
_NOT_NEGATIVE = (
  "watchdog.seconds",
  "data.retries",
  "data.workers",
  "eval.context",
  "eval.problems",
  "lora.alpha",
  "optimizer.clip",
  "optimizer.eps",
  "optimizer.weight_decay",
)

# What of a trained coprocessor's layout a run that begins as it must share.
_SHARED = (
  ("kind", "coprocessor.kind"),
  ("latents", "coprocessor.latents"),
  ("start", "coprocessor.start"),
  ("positions", "coprocessor.positions"),
)


def check_config(config: ConfigDict, devices: int) -> None:
  """Refuses what cannot run, before any device work.

  What depends on the decoder's own shape is `check_model`.

  Raises:
    UserError: naming the key and the numbers.
  """
  _one_of(config, "objective", OBJECTIVES)
  _one_of(config, "coprocessor.kind", kinds.NAMES)
  _one_of(config, "language_model.loss", LOSSES)
  _one_of(config, "coprocessor.start", traces.STARTS)
  _one_of(config, "coprocessor.positions", traces.POSITIONS)
  _one_of(config, "traces.law", point_sampling.LAWS)
  _one_of(config, "precision.compute", DTYPES)
  _one_of(config, "precision.decoder", DTYPES)
  _one_of(config, "remat", tuple(transformer.REMAT_POLICIES))
  _one_of(config, "attention", dispatch.NAMES)
  for key in _POSITIVE:
    if configs.at(config, key) < 1:
      raise UserError(f"{key}={configs.at(config, key)} must be at least 1")
  if not 0.0 <= config.optimizer.average < 1.0:
    raise UserError(
      f"optimizer.average={config.optimizer.average} must be from 0 (none) to "
      "below 1"
    )
  _check_numbers(config)
  _check_places(config)
  profiling.parse_steps(config.profile)
  optim.make_schedule(config.optimizer, config.optimizer.steps)
  if not config.data.sources:
    raise UserError("data.sources is empty: name at least one source")
  if config.decoder.how_to_get and not config.decoder.path:
    raise UserError(f"decoder.path is empty: {config.decoder.how_to_get}")
  _check_start(config)
  data, fsdp, tensor = sharding.mesh_sizes(config.mesh, devices)
  batch, k = config.data.batch, config.optimizer.accumulation
  if batch % (k * data * fsdp):
    raise UserError(
      f"data.batch={batch} does not divide over optimizer.accumulation={k} x "
      f"mesh.data={data} x mesh.fsdp={fsdp}: change one of them"
    )
  if configs.draws_points(config):
    _check_traces(config)
  # A decoder trained on from another is compared with it after every token.
  if configs.has_decoder(config):
    check_eval(config, configs.layout_of(config))


def _check_start(config: ConfigDict) -> None:
  """Refuses what nothing can begin as, and LoRAs on nothing.

  Raises:
    UserError: naming the key.
  """
  init = config.coprocessor.init
  if configs.begins_as_trained(config) and not (
    os.sep in init or init.startswith("shipped:") or os.path.isdir(init)
  ):
    raise UserError(
      f"coprocessor.init={init!r} is not one of "
      f"{', '.join(coprocessor.INITS)}, nor the directory of a trained "
      "coprocessor"
    )
  rank, name = configs.lora_rank(config), f"{config.objective}.lora_rank"
  if rank < 0:
    raise UserError(f"{name}={rank} must be 0 (everything is trained) or more")
  if rank and not config.lora.alpha > 0.0:
    raise UserError(f"lora.alpha={config.lora.alpha} must be positive")
  if rank and config.objective == "language_model" and not config.decoder.path:
    raise UserError(
      f"{name}={rank} adapts a decoder that is there: give decoder.path, or "
      "set it to 0"
    )
  if (
    rank
    and config.coprocessor.init == "scratch"
    and (config.objective == "coprocessor")
  ):
    raise UserError(
      f"{name}={rank} with coprocessor.init='scratch' would leave a random "
      "network as it is: use init='decoder', or rank 0"
    )


def _check_traces(config: ConfigDict) -> None:
  if config.coprocessor.init == "scratch":
    Kind.of(config.coprocessor.kind).check("scratch")
  s, spec = config.data.sequence, configs.layout_of(config)
  draw = configs.draw_of(config)
  points = s - draw.min_ahead - spec.context_needed + 1
  if draw.count > points:
    raise UserError(
      f"traces.count={draw.count} exceeds the {max(points, 0)} possible points "
      f"of a sequence of data.sequence={s} with coprocessor.latents="
      f"{spec.latents} and traces.min_ahead={draw.min_ahead}"
    )
  if draw.late_max >= points:
    raise UserError(
      f"traces.late_max={draw.late_max}: no trace of a sequence of "
      f"data.sequence={s} can be so late with coprocessor.latents="
      f"{spec.latents} and traces.min_ahead={draw.min_ahead}; at most "
      f"{points - 1}"
    )
  if draw.law == "stratified" and s % draw.count:
    raise UserError(
      f"traces.law='stratified' wants data.sequence={s} to be a multiple of "
      f"traces.count={draw.count}"
    )
  added = configs.terms_of(config).on
  if added and config.objective != "coprocessor":
    raise UserError(
      f"{added[0]}={configs.at(config, added[0])} is of latents' training, "
      f"objective={config.objective!r} has no frozen decoder to go by: leave "
      "it out"
    )
  if config.supervision.weight and not config.data.results:
    raise UserError(
      f"supervision.weight={config.supervision.weight} with data.results="
      "False: the labels are the results of steps; set it to True, or the "
      "weight to 0"
    )
  if spec.kv_bias and config.eval.problems:
    raise UserError(
      f"eval.problems={config.eval.problems} with coprocessor.kv_bias=True: "
      "decoding has no bias of attention; set the problems to 0"
    )
  if spec.window >= s:
    raise UserError(
      f"traces.window={spec.window} hides nothing of sequences of "
      f"data.sequence={s}: lower it, or 0 for no window"
    )
  needed, more = spec.context_needed + spec.tokens_predicted, ""
  if spec.stride:
    more = f", traces.rounds={spec.rounds} and traces.stride={spec.stride}"
  if needed > s:
    raise UserError(
      f"traces.ahead={spec.ahead} with coprocessor.latents={spec.latents}"
      f"{more} needs sequences of {needed} tokens, data.sequence={s}"
    )


def check_eval(config: ConfigDict, spec: Layout) -> None:
  """Refuses a table by position that sequences have no room for.

  Args:
    config: its `eval` and `data.sequence`.
    spec: of the coprocessor that is evaluated.

  Raises:
    UserError: naming the key and the numbers.
  """
  for key in _EVAL_POSITIVE:
    if configs.at(config, key) < 1:
      raise UserError(f"{key}={configs.at(config, key)} must be at least 1")
  s, ahead = config.data.sequence, config.eval.ahead
  context, before = config.eval.context, f"eval.context={config.eval.context}"
  if context:
    if context < spec.context_needed:
      raise UserError(
        f"eval.context={context} is less than the {spec.context_needed} tokens "
        f"that coprocessor.latents={spec.latents} need before a point: raise "
        "it, or 0 for as many"
      )
  else:
    context, before = spec.context_needed, f"coprocessor.latents={spec.latents}"
  if context + ahead > s:
    raise UserError(
      f"eval.ahead={ahead} with {before} needs sequences of {context + ahead} "
      f"tokens, data.sequence={s}"
    )


def check_model(config: ConfigDict, model: ModelConfig) -> None:
  """Refuses another decoder than meant, and sequences beyond its positions.

  Raises:
    UserError: naming the keys and the numbers.
  """
  for key, wanted in config.decoder.shape.items():
    found = getattr(model, key)
    if wanted is not None and found != wanted:
      raise UserError(
        f"decoder.path={config.decoder.path!r}: {key} is {found}, this config "
        f"is for decoder.shape.{key}={wanted}: give the weights it names"
      )
  if rank := configs.lora_rank(config):
    name = f"{config.objective}.lora_rank"
    lora.check(model, rank, tuple(config.lora.kernels), label=name)
  w = config.traces.window
  if w and SLIDING in model.layer_kinds and w < model.window:
    raise UserError(
      f"traces.window={w} is less than the {model.window} tokens that the "
      "decoder's sliding layers see (window): raise it, or 0 for no window"
    )
  s, n = config.data.sequence, 0
  # 'insert' puts latents, and what follows them, behind the context.
  if config.objective == "coprocessor" and (
    config.coprocessor.positions == "insert"
  ):
    n = config.coprocessor.latents * config.traces.rounds
  if s + n > model.max_positions:
    more, count = "", config.traces.rounds
    if n:
      times = f" x traces.rounds={count}" if count > 1 else ""
      more = f" + coprocessor.latents={n // count}{times} inserted"
    raise UserError(
      f"data.sequence={s}{more} exceeds the decoder's {model.max_positions} "
      "positions (max_positions): lower it"
    )


def _check_numbers(config: ConfigDict) -> None:
  """Refuses numbers that no key can have a use for.

  Raises:
    UserError: naming the key.
  """
  for key, value in configs.leaves(config):
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{key}={value} must be a finite number")
    # Steps, rows and tokens are counted in 32 bits on the devices.
    bits = 63 if key == "seed" else 31
    if isinstance(value, int) and not -(2**bits) <= value < 2**bits:
      raise UserError(f"{key}={value} does not fit {bits + 1} bits: lower it")
  for key in _NOT_NEGATIVE:
    if configs.at(config, key) < 0:
      raise UserError(f"{key}={configs.at(config, key)} must be 0 or more")
  for key in ("optimizer.b1", "optimizer.b2"):
    if not 0 <= configs.at(config, key) < 1:
      raise UserError(
        f"{key}={configs.at(config, key)} must be from 0 to below 1"
      )


def _check_places(config: ConfigDict) -> None:
  """Refuses object storage where it would only fail in the end.

  Raises:
    UserError: naming the key.
  """
  files.refuse_remote(config.decoder.path, "decoder.path")
  files.refuse_remote(config.data.cache_dir, "data.cache_dir")
  for name, source in config.data.sources.items():
    if source.kind != "tfds":  # which reads it by itself
      files.refuse_remote(source.path, f"data.sources.{name}.path")
  if files.is_remote(config.export):
    with files.reading(config.export, "export"):
      files.expanded(config.export).exists()


def check_initial(
  config: ConfigDict,
  spec: Layout,
  found: str,
  wanted: str,
) -> None:
  """Refuses a trained coprocessor of another layout or decoder.

  Args:
    config: of the run that is to begin as it.
    spec: its own.
    found: fingerprint of the decoder that it was trained for.
    wanted: of the run's decoder.

  Raises:
    UserError: naming the key.
  """
  path = config.coprocessor.init
  for field, key in _SHARED:
    theirs = getattr(spec, field)
    ours = getattr(configs.layout_of(config), field)
    if theirs != ours:
      raise UserError(
        f"coprocessor.init={path!r} was trained with {key}={theirs!r}, this "
        f"config has {ours!r}: set --config.{key}={theirs}"
      )
  if found != wanted:
    raise UserError(
      f"coprocessor.init={path!r} was trained for decoder {found}, "
      f"decoder.path holds {wanted}: give that decoder, or its own coprocessor"
    )


def _one_of(config: ConfigDict, key: str, known: tuple[str, ...]) -> None:
  value = configs.at(config, key)
  if value not in known:
    raise UserError(f"{key}={value!r} is not one of {', '.join(known)}")
