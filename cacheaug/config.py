"""Every key of an experiment, set once and commented.

A config file starts from `base()`, changes what it needs and returns it. Code
never reads a key with a default, so a key that is not here is an error. What a
config may not say is in validate.py.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from cacheaug.augment import coprocessor
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.terms import Terms
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.model import config as model_config
from cacheaug.model.config import ModelConfig


def base() -> ConfigDict:
  """The config all others start from."""
  from cacheaug.data.sources import source_defaults

  c = ConfigDict()
  # What is trained: a coprocessor for a frozen decoder, or (language_model) a
  # decoder itself, from nothing or, with decoder.path, on from the one there.
  c.objective = "coprocessor"
  c.seed = 0  # of parameters, data order and points
  c.runlocal = False  # put `local` in place: runs anywhere, same code

  # The frozen decoder: a directory (config.json + safetensors), FILE.gguf, a
  # name on the hub, or 'shipped:NAME'; '' makes a random one of `family` and
  # `shape`. With a path, what `shape` says must hold of the weights there.
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
  # Of handover and prefix: a trained bias of attention to latents, by layer,
  # entry and key head. Decoding has none: eval.problems must be 0.
  c.coprocessor.kv_bias = False
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
  # W: rows after a point see the last W context tokens and the latents only,
  # which stand for the context before them; 0: the whole context.
  c.traces.window = 0
  # Weight of ahead token y_j: decay ** (j - 1), scaled to a mean of 1.
  c.traces.decay = 1.0

  # Labels of latents: the results of an answer's steps (data.results), read off
  # them by the frozen head (augment/terms.py).
  c.supervision = ConfigDict()
  c.supervision.weight = 0.0  # of a label beside an ahead token, 0 for none
  c.supervision.until = 0  # step at which the weight is down to 0; 0: it stays
  # Whose rows they are read off: the 'decoder''s of the latents, or the
  # 'coprocessor''s own.
  c.supervision.at = "decoder"

  # With traces.window: KL to the frozen decoder that sees the whole context.
  c.teacher = ConfigDict()
  c.teacher.weight = 0.0  # of it beside the nll, 0 for none
  c.teacher.top = 32  # over so many tokens, and all others together

  c.data = ConfigDict()
  c.data.sources = ConfigDict()  # name -> see data/sources.py source_defaults
  # The decoder's own, or byte, hf:PATH, sentencepiece:PATH, FILE.gguf.
  c.data.tokenizer = "decoder"
  c.data.sequence = 2048  # S
  c.data.batch = 1024  # B, over all devices
  # Train on, and evaluate over, answers' tokens alone: points stand where an
  # answer comes next, first of all where it begins. All sources in use have
  # some: problems, and those with an answer_field.
  c.data.answers_only = False
  # Batches say what each step of a problem results in, for objectives that
  # learn it; problems of serial kinds (data/serial.py) alone have that.
  c.data.results = False
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
  # plain, xla, tpu, gpu, mosaic (Hopper), see kernels/dispatch.py.
  c.attention = "auto"
  # On GPUs: the same bits in every run of a step, at some price. The kernels
  # add in one order in any case; a CPU and a TPU do everywhere.
  c.deterministic = False

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
  # Questions answered, of each source that has answers: generated problems, or
  # documents with an answer_field; 0 for none.
  c.eval.problems = 0
  # Other trained coprocessors of this decoder that answer the same questions:
  # column -> a workdir, an export, shipped:NAME.
  c.eval.beside = ConfigDict()

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
  for key, value in leaves(config.local):
    if key not in given and not key.startswith("data.sources."):
      parent, _, name = key.rpartition(".")
      (at(config, parent) if parent else config)[name] = value
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
  free = ("data.sources.", "optimizer.multipliers.", "eval.beside.", "local.")
  known = [k for k, _ in leaves(base()) if not k.startswith(free)]
  found = [k for k, _ in leaves(config) if not k.startswith(free)]
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


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Every key that is not a dictionary, as (`a.b.c`, value)."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{key}.")
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
    window=config.traces.window,
    kv_bias=config.coprocessor.kv_bias,
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


def terms_of(config: ConfigDict) -> Terms:
  """What a config adds to the plain objective.

  Raises:
    UserError: the layout does not have it; names the keys.
  """
  terms = Terms(
    supervision=config.supervision.weight,
    supervision_until=config.supervision.until,
    supervision_at=config.supervision.at,
    teacher=config.teacher.weight,
    teacher_top=config.teacher.top,
    decay=config.traces.decay,
  )
  terms.check(layout_of(config))
  return terms


def lora_rank(config: ConfigDict) -> int:
  """Rank of the LoRA that is trained; 0 where everything is."""
  if config.objective == "language_model":
    return config.language_model.lora_rank
  return config.coprocessor.lora_rank


def begins_as_trained(config: ConfigDict) -> bool:
  """Whether coprocessor.init is the path of a trained coprocessor."""
  own = config.objective == "coprocessor"
  return own and config.coprocessor.init not in coprocessor.INITS


def has_decoder(config: ConfigDict) -> bool:
  """False where a decoder is trained from nothing."""
  return config.objective == "coprocessor" or bool(config.decoder.path)


def draws_points(config: ConfigDict) -> bool:
  """Whether the loss is over traces."""
  traced = config.language_model.loss == "traces"
  return config.objective == "coprocessor" or traced


def at(config: ConfigDict, key: str) -> Any:
  """The value of a key given as `a.b.c`."""
  for part in key.split("."):
    config = config[part]
  return config
