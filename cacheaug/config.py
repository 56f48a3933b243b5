"""Every key of an experiment, set once and commented; and their checks.

A config file starts from `base()`, changes what it needs and returns it. Code
never reads a key with a default, so a key that is not here is an error.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from cacheaug import optim, sharding
from cacheaug.augment import kinds, point_sampling, traces
from cacheaug.augment.kinds import Kind
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.kernels import dispatch
from cacheaug.model import config as model_config
from cacheaug.model import lora, transformer
from cacheaug.model.config import ModelConfig
from cacheaug.objectives import (
  draws_points,
  has_decoder,
  lora_rank,
  validate_start,
)
from cacheaug.run import profiling

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


def base() -> ConfigDict:
  """The config all others start from."""
  from cacheaug.data.sources import source_defaults

  c = ConfigDict()
  # What is trained: a coprocessor for a frozen decoder, or (language_model) a
  # decoder itself, from nothing or, with decoder.path, on from the one there.
  c.objective = "coprocessor"
  c.seed = 0  # of parameters, data order and points
  c.runlocal = False  # put `local` in place: runs anywhere, same code

  # The frozen decoder: a directory (config.json + safetensors), or
  # 'shipped:NAME' for one in the package; '' makes a random one of `family`
  # and `shape`. With a path, what `shape` says must hold of the weights there.
  c.decoder = ConfigDict()
  c.decoder.path = ""
  c.decoder.family = "gemma2"
  c.decoder.shape = ConfigDict()  # of the keys of model.config.ModelConfig
  for field in dataclasses.fields(ModelConfig):
    if field.name not in ("family", "layer_kinds", "rope_scaling"):
      # None, of the field's own type: the family's default.
      c.decoder.shape[field.name] = config_dict.placeholder(field.type)
  # How to get the weights, shown where `path` is missing. Where it says
  # something, an empty `path` is refused.
  c.decoder.how_to_get = ""

  c.coprocessor = ConfigDict()
  # Or what it is compared with: pause, prefix, handover, activations; see
  # augment/coprocessor.py.
  c.coprocessor.kind = "coprocessor"
  c.coprocessor.latents = 16  # N, soft tokens and latents a trace
  # What its network begins as: a copy of the 'decoder', 'scratch' (random), or
  # a trained coprocessor of this decoder: a workdir, an export, shipped:NAME.
  c.coprocessor.init = "decoder"
  # 0: the whole network is trained; r: it stays as it begins, and a LoRA of
  # rank r on it is trained.
  c.coprocessor.lora_rank = 0
  c.coprocessor.start = "harmless"  # or 'as_is', see augment/coprocessor.py
  c.coprocessor.positions = "replace"  # or insert, overlay, see augment/traces

  c.language_model = ConfigDict()
  # tokens: the plain mean over all of them; traces: over the tokens that a
  # coprocessor's traces would predict, each as often (`traces` and
  # `coprocessor` say which), so that the two losses are over the same.
  c.language_model.loss = "tokens"
  c.language_model.lora_rank = 0  # r: a LoRA on decoder.path's decoder

  # Of either LoRA: W + alpha / rank * a b, as peft's defaults have it.
  c.lora = ConfigDict()
  c.lora.alpha = 16.0
  c.lora.kernels = ("q", "k", "v", "o", "gate", "up", "down")

  c.traces = ConfigDict()
  c.traces.count = 128  # M, points a sequence
  c.traces.ahead = 16  # A, tokens predicted after each
  c.traces.law = "uniform"  # the paper's, or 'stratified': one a bucket
  c.traces.min_ahead = 1  # fewest ahead tokens left in the point's document
  c.traces.tail = 0  # points this near a document's end are drawn first
  c.traces.mask_documents = True  # a sequence's documents do not see each other
  # Latents come 0 to so many tokens after what the coprocessor has read, drawn
  # uniformly for each trace (see augment/traces.py); 0: never late.
  c.traces.late_max = 0
  # Rounds of latents a trace, each on top of those before, and the tokens from
  # one to the next; stride 0: all at one point. See augment/rounds.py.
  c.traces.rounds = 1
  c.traces.stride = 0

  c.data = ConfigDict()
  c.data.sources = ConfigDict()  # name -> see data/sources.py source_defaults
  c.data.tokenizer = (
    "decoder"  # the decoder's own, or byte, hf:, sentencepiece:
  )
  c.data.sequence = 2048  # S
  c.data.batch = 1024  # B, over all devices
  # Train on, and evaluate over, answers' tokens alone: points stand where an
  # answer comes next, first of all where it begins. All sources in use have
  # some: problems, and those with an answer_field.
  c.data.answers_only = False
  c.data.cache_dir = ""  # '' is ~/.cache/cacheaug
  c.data.validation_fraction = 0.05  # of documents, never trained on
  c.data.workers = 2  # processes that tokenise
  # Further tries where packed data cannot be read, after 1, 2, 4, ... s.
  c.data.retries = 4

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
  # TPU slices (or groups of hosts) joined by a slow network; split mesh.data.
  c.mesh.slices = 1

  c.precision = ConfigDict()
  c.precision.compute = "auto"  # bfloat16 on accelerators, float32 on CPU
  c.precision.decoder = "auto"  # storage of the frozen decoder
  # What the backward pass computes again: lean (what lies between matrix
  # products), none, or full (everything; least memory).
  c.remat = "lean"
  # Attention over the context: auto (by device and shape, and logged), or
  # plain, xla, tpu, gpu, see kernels/dispatch.py.
  c.attention = "auto"

  c.log_every = 100  # steps
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps
  c.checkpoint.keep = 2  # newest kept
  # Steps to trace for XProf, '10:13' with both ends, into workdir/profile.
  c.profile = ""
  c.watchdog = ConfigDict()
  # A step that takes longer, compiling and saving included, ends the process;
  # 0 for never.
  c.watchdog.seconds = 1800
  # With several processes: one that is silent for so long is taken for dead
  # and ends the others.
  c.watchdog.host_seconds = 45

  c.eval = ConfigDict()
  c.eval.sequences = 256  # held-out sequences in the final report
  c.eval.batch = 8  # of them at once
  c.eval.ahead = 32  # tokens after the latents that the table covers
  # Tokens that must precede and include a point of the table, so that runs of
  # different N are compared on the same tokens; 0: the coprocessor's own need.
  c.eval.context = 0
  c.eval.problems = 0  # generated problems answered, 0 for none

  c.export = ""  # directory to export the result to at the end, '' for none

  # What runlocal=True puts in place of the keys of the same names, but for
  # those given on the command line: a random decoder, text that every Python
  # brings, a few steps.
  c.local = ConfigDict(
    {
      "decoder": {
        "path": "",
        "how_to_get": "",
        "shape": {
          "vocab_size": 260,
          "width": 32,
          "layers": 2,
          "heads": 2,
          "kv_heads": 1,
          "head_dim": 16,
          "mlp_width": 64,
          "max_positions": 1024,
          "window": 32,
        },
      },
      "coprocessor": {"latents": 4},
      "language_model": {"lora_rank": 0},  # there is nothing to adapt
      "traces": {"count": 8},
      "data": {
        "sources": {"code": source_defaults()},
        "tokenizer": "byte",
        "sequence": 64,
        "batch": 8,
        "validation_fraction": 0.05,
      },
      "optimizer": {"steps": 20, "warmup": 2, "accumulation": 1},
      "precision": {"compute": "auto", "decoder": "auto"},
      "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "slices": 1},
      "remat": "lean",
      "log_every": 5,
      "checkpoint": {"every": 10},
      "eval": {"sequences": 8, "batch": 8, "ahead": 8, "problems": 0},
    }
  )
  return c


def resolve(config: ConfigDict, given: Iterable[str] = ()) -> ConfigDict:
  """The config to run: its keys checked, `local` applied if asked for.

  Args:
    config: from a file's get_config.
    given: keys set on the command line, which `local` does not touch.

  Raises:
    UserError: a key that is not in `base()`, or one of its keys missing.
  """
  check_keys(config)
  if not config.runlocal:
    return config
  given = set(given)
  config = ConfigDict(config.copy_and_resolve_references())
  config.unlock()
  for key, value in _leaves(config.local):
    if key not in given and not key.startswith("data.sources."):
      parent, _, name = key.rpartition(".")
      (_at(config, parent) if parent else config)[name] = value
  if not any(key.startswith("data.sources.") for key in given):
    config.data.sources = config.local.data.sources
  return config


def check_keys(config: ConfigDict) -> None:
  """Refuses a key that `base()` does not have, and a missing one.

  Raises:
    UserError: naming the key and those most like it.
  """
  from cacheaug.data.sources import source_defaults

  # Below these the keys are the experiment's own; a source's are checked.
  free = ("data.sources.", "optimizer.multipliers.", "local.")
  known = [k for k, _ in _leaves(base()) if not k.startswith(free)]
  found = [k for k, _ in _leaves(config) if not k.startswith(free)]
  if "sources" in config.get("data", {}):
    for name, source in config.data.sources.items():
      prefix = f"data.sources.{name}."
      known += [prefix + key for key in source_defaults()]
      found += [prefix + key for key in source]
  for key in found:
    if key not in known:
      raise UserError(f"unknown config key {key}{nearest(key, known)}")
  for key in known:
    if key not in found:
      raise UserError(
        f"config key {key} is missing: start from cacheaug.config.base(), a "
        "source from cacheaug.data.sources.source_defaults()"
      )


def nearest(key: str, known: list[str]) -> str:
  """'; did you mean a, b?' with the known keys most like `key`, or ''."""
  known = [k for k in known if not k.startswith("local.")]
  # By the last part first: a key given at the wrong level is found by it.
  last = key.rpartition(".")[2]
  found = [k for k in known if k.rpartition(".")[2] == last]
  found += difflib.get_close_matches(key, known, n=3, cutoff=0.6)
  unique = list(dict.fromkeys(found))[:3]
  return f"; did you mean {', '.join(unique)}?" if unique else ""


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Every key that is not a dictionary, as (`a.b.c`, value)."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def model_of(config: ConfigDict) -> ModelConfig:
  """The random decoder's ModelConfig, of `decoder.family` and `shape`."""
  shape = {k: v for k, v in config.decoder.shape.items() if v is not None}
  return model_config.make(config.decoder.family, **shape)


def layout_of(config: ConfigDict) -> Layout:
  """The trace layout that a config asks for."""
  return Layout(
    latents=config.coprocessor.latents,
    ahead=config.traces.ahead,
    positions=config.coprocessor.positions,
    start=config.coprocessor.start,
    mask_documents=config.traces.mask_documents,
    kind=config.coprocessor.kind,
    rounds=config.traces.rounds,
    stride=config.traces.stride,
  )


def draw_of(config: ConfigDict) -> Draw:
  """How a config's training draws traces of `layout_of`.

  Raises:
    UserError: no such trace can be drawn; names the keys.
  """
  draw = Draw(
    count=config.traces.count,
    law=config.traces.law,
    min_ahead=config.traces.min_ahead,
    tail=config.traces.tail,
    late_max=config.traces.late_max,
  )
  draw.check(layout_of(config))
  return draw


def validate(config: ConfigDict, devices: int) -> None:
  """Refuses what cannot run, before any device work.

  What depends on the decoder's own shape is `validate_model`.

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
    if _at(config, key) < 1:
      raise UserError(f"{key}={_at(config, key)} must be at least 1")
  if not 0.0 <= config.optimizer.average < 1.0:
    raise UserError(
      f"optimizer.average={config.optimizer.average} must be from 0 (none) to "
      "below 1"
    )
  for key in ("watchdog.seconds", "data.retries", "eval.context"):
    if _at(config, key) < 0:
      raise UserError(f"{key}={_at(config, key)} must be 0 or more")
  profiling.parse_steps(config.profile)
  optim.make_schedule(config.optimizer, config.optimizer.steps)
  if not config.data.sources:
    raise UserError("data.sources is empty: name at least one source")
  if config.decoder.how_to_get and not config.decoder.path:
    raise UserError(f"decoder.path is empty: {config.decoder.how_to_get}")
  validate_start(config)
  data, fsdp, tensor = sharding.mesh_sizes(config.mesh, devices)
  batch, k = config.data.batch, config.optimizer.accumulation
  if batch % (k * data * fsdp):
    raise UserError(
      f"data.batch={batch} does not divide over optimizer.accumulation={k} x "
      f"mesh.data={data} x mesh.fsdp={fsdp}: change one of them"
    )
  if draws_points(config):
    _validate_traces(config)
  # A decoder trained on from another is compared with it after every token.
  if has_decoder(config):
    validate_eval(config, layout_of(config))


def _validate_traces(config: ConfigDict) -> None:
  kind, init = config.coprocessor.kind, config.coprocessor.init
  if not Kind.of(kind).network and init == "scratch":
    raise UserError(
      f"coprocessor.init={init!r}: coprocessor.kind={kind!r} has no network "
      "that could begin so; leave it 'decoder'"
    )
  s, spec, draw = config.data.sequence, layout_of(config), draw_of(config)
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
  needed, more = spec.context_needed + spec.reach, ""
  if spec.stride:
    more = f", traces.rounds={spec.rounds} and traces.stride={spec.stride}"
  if needed > s:
    raise UserError(
      f"traces.ahead={spec.ahead} with coprocessor.latents={spec.latents}"
      f"{more} needs sequences of {needed} tokens, data.sequence={s}"
    )


def validate_eval(config: ConfigDict, spec: Layout) -> None:
  """Refuses a table by position that sequences have no room for.

  Args:
    config: its `eval` and `data.sequence`.
    spec: of the coprocessor that is evaluated.

  Raises:
    UserError: naming the key and the numbers.
  """
  for key in _EVAL_POSITIVE:
    if _at(config, key) < 1:
      raise UserError(f"{key}={_at(config, key)} must be at least 1")
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


def validate_model(config: ConfigDict, model: ModelConfig) -> None:
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
  if rank := lora_rank(config):
    name = f"{config.objective}.lora_rank"
    lora.check(model, rank, tuple(config.lora.kernels), label=name)
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


def _at(config: ConfigDict, key: str) -> Any:
  for part in key.split("."):
    config = config[part]
  return config


def _one_of(config: ConfigDict, key: str, known: tuple[str, ...]) -> None:
  value = _at(config, key)
  if value not in known:
    raise UserError(f"{key}={value!r} is not one of {', '.join(known)}")
