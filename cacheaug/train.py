"""The one trainer, top to bottom, for a coprocessor or a decoder itself."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import export, flops, objectives, optim, sharding, trainable
from cacheaug import step as stepping
from cacheaug.augment import coprocessor
from cacheaug.augment.objective import Sums
from cacheaug.data import pipeline, tokenizers
from cacheaug.errors import UserError
from cacheaug.evals import run_report
from cacheaug.kernels import dispatch
from cacheaug.model import lora, transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import files, machine, profiling
from cacheaug.run import workdir as workdirs
from cacheaug.run.checkpoint import Checkpoints
from cacheaug.run.heartbeat import Heartbeat
from cacheaug.run.metrics import MetricWriter, Progress, memory_peak
from cacheaug.run.preemption import StopOnSignal
from cacheaug.weights import huggingface


def train(config: ConfigDict, workdir: str) -> None:
  """Trains to config.optimizer.steps in `workdir`, resuming what is there.

  Raises:
    UserError: bad input, before anything is written; a loss that is not
      finite, with the checkpoints before it kept.
  """
  # --- mesh, workdir --------------------------------------------------------
  configs.validate(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  workdirs.check(config, workdir)

  # --- model, tokenizer -----------------------------------------------------
  model, tokenizer = open_model(config, mesh)

  # --- data -----------------------------------------------------------------
  batches = pipeline.open_batches(
    config.data,
    tokenizer,
    split="train",
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

  # --- decoder, state -------------------------------------------------------
  decoder, fingerprint = load_decoder(config, model, mesh)
  begin = partial(load_initial, config, model, mesh, decoder, fingerprint)
  # Before anything is written; a run that has begun needs it no more.
  initial = None if workdirs.has_checkpoints(workdir) else begin()
  steps = config.optimizer.steps
  optimizer, _ = optim.make_optimizer(config.optimizer, steps)
  key = jax.random.key(config.seed)
  wanted = stepping.abstract_state(config, model, optimizer, decoder, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, wanted)

  # --- restore: 1. newest whole checkpoint, 2. fresh --------------------------
  workdirs.claim(config, workdir)
  checkpoints = Checkpoints(
    epath.Path(workdir) / "checkpoints",
    keep=config.checkpoint.keep,
    save_every=config.checkpoint.every,
  )
  heartbeat = Heartbeat(workdir, limit=config.watchdog.seconds)
  restored = checkpoints.restore_latest(wanted)
  if restored is None:
    fresh = partial(stepping.init_state, config, model, optimizer, False)
    initial = initial or begin()  # no checkpoint that is there was whole
    state = jax.jit(fresh, out_shardings=shardings)(decoder, key, initial)
    start = 0
  else:
    state, meta, start = restored
    if meta["decoder"] != fingerprint:
      raise UserError(
        f"{workdir} was trained for decoder {meta['decoder']}, decoder.path "
        f"holds {fingerprint}: give that decoder, or another --workdir"
      )
    logging.info("resumed from step %d", start)
  del initial
  meta = {"decoder": fingerprint, "seed": config.seed}

  # --- loop -------------------------------------------------------------------
  step_fn = stepping.make_step(config, model, optimizer, mesh, shardings)
  baseline_fn = stepping.make_baseline(config, model, mesh)
  writer = MetricWriter(workdir)
  writer.truncate_after(start if start else -1)
  peak = machine.peak_flops(mesh.devices.flat)
  useful = flops.of_step(config, model.config).total
  log = partial(log_step, config, writer, useful / peak if peak else None)
  heartbeat.start(start)
  pending = None  # metrics are read one step late, to keep the device busy
  stream = batches.iterate(start, retries=config.data.retries)
  progress = Progress(steps, start, "train")
  trace = profiling.Trace(workdir, config.profile)
  clock = profiling.Clock()
  clock.reset(start)
  with heartbeat, checkpoints, writer, progress, trace, StopOnSignal() as stop:
    for step in range(start + 1, steps + 1):
      trace.before(step)
      with clock.part("data"):
        batch = sharding.put_global(next(stream), sharding.batch_sharding(mesh))
      logs = step % config.log_every == 0 or step == steps
      with clock.part("dispatch"):
        state, metrics = step_fn(state, decoder, batch, key, np.bool_(logs))
      with clock.part("device"):
        if pending:
          check_finite(*pending)
        pending = step, metrics
        if logs:
          check_finite(*pending)
      if logs:
        times = clock.read(step)
        clock.reset(step)
        with clock.part("log"):
          baseline = baseline_fn(decoder, batch, key, np.int32(step - 1))
          shown = log(step, metrics, baseline, batch["tokens"].shape, times)
          progress.update(step, **shown)
      trace.after(step, state)
      stopping = stop.asked(step)
      if stopping or step % config.checkpoint.every == 0 or step == steps:
        with clock.part("checkpoint"):
          heartbeat.beat(step, "saving")
          check_finite(*pending)
          checkpoints.save(step, state, meta, force=True)
          heartbeat.saving(step)
      heartbeat.beat(step)
      if stopping:
        checkpoints.close()
        logging.info(
          "stopped by signal: step %d is saved, run again to go on", step
        )
        raise SystemExit(0)

  # --- report -----------------------------------------------------------------
  params = state.params if state.average is None else state.average
  params = trainable.effective(
    config, params, state.frozen, decoder, lora.merge
  )
  report(config, workdir, model, decoder, params, tokenizer, fingerprint)
  heartbeat.say("finished")


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
      directory = huggingface.resolve(config.decoder.path)
    except UserError as e:
      how = config.decoder.how_to_get
      raise UserError(f"decoder.path: {e}{': ' + how if how else ''}") from e
    model_config = huggingface.read_config(directory)
    tokenizer = tokenizers.load(str(directory) if spec == "decoder" else spec)
  configs.validate_model(config, model_config)
  if tokenizer.vocab_size > model_config.vocab_size:
    raise UserError(
      f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, the "
      f"decoder's vocabulary {model_config.vocab_size}: give the decoder's own"
    )
  return make_model(config, model_config, mesh), tokenizer


def make_model(
  config: ConfigDict,
  model_config: ModelConfig,
  mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
  """The architecture as the config wants it run, on the mesh's devices."""
  platform = jax.default_backend()
  if mesh is not None:
    platform = mesh.devices.flat[0].platform
  dtype = _dtype(config.precision.compute, platform)
  name, why = dispatch.choose(
    config.attention, platform, model_config.head_dim, dtype
  )
  logging.info("attention over the context: %s (%s)", name, why)
  kernel = dispatch.Kernel(name)
  if mesh is not None:
    kernel = dispatch.Kernel(
      name, mesh, batch=sharding.RULES["B"], heads=sharding.RULES["K"]
    )
  return Transformer(
    model_config, dtype=dtype, remat=config.remat, attention=kernel
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
    decoder = huggingface.load(
      huggingface.resolve(config.decoder.path),
      model.config,
      dtype=storage,
      shardings=shardings,
    )
  else:
    make = partial(trainable.random_decoder, config, model, storage)
    decoder = jax.jit(make, out_shardings=shardings)()
  return decoder, huggingface.fingerprint(decoder)


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
  if not objectives.begins_as_trained(config):
    return None
  path = config.coprocessor.init
  try:
    found = export.open_coprocessor(path, model.config, decoder)
  except UserError as e:
    raise UserError(f"coprocessor.init={path!r}: {e}") from e
  trainable.check_initial(config, found.spec, found.fingerprint, fingerprint)
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


def _platform(mesh: sharding.AnyMesh) -> str:
  """Of the mesh's devices; this machine's where it has none."""
  if isinstance(mesh, jax.sharding.Mesh):
    return mesh.devices.flat[0].platform
  return jax.default_backend()


def _dtype(name: str, platform: str) -> Any:
  if name == "auto":
    name = "float32" if platform == "cpu" else "bfloat16"
  return jnp.dtype(name)


def log_step(
  config: ConfigDict,
  writer: MetricWriter,
  floor: float | None,
  step: int,
  metrics: Mapping[str, Any],
  baseline: Sums | None,
  shape: tuple[int, int],
  times: Mapping[str, float],
) -> dict[str, float]:
  """Writes one line of metrics; returns what the progress line shows.

  Args:
    config: of the run.
    writer: of the line.
    floor: seconds that the devices' peak would need, where it is known.
    step: steps taken.
    metrics: of stepping.make_step.
    baseline: the frozen decoder's sums over this step's tokens, where there
      is one.
    shape: (B, S) of a step's tokens.
    times: of profiling.Clock.
  """
  metrics, baseline = jax.device_get((metrics, baseline))
  running = metrics["running"]

  def mean(sums):
    return float(sums[0].sum() / max(sums[1].sum(), 1.0))

  line = {
    "loss": mean(running),  # mean since the last line
    "nll": running[0] / np.maximum(running[1], 1.0),
    "gradient_norm": float(metrics["gradient_norm"]),
    "parameter_norm": float(metrics["parameter_norm"]),
    "batch_loss": mean(metrics["batch"]),  # this step's tokens
  }
  seconds = times["step_time"]
  speed = {
    **times,
    "tokens_per_second": shape[0] * shape[1] / seconds,
    "memory_peak": memory_peak(),
  }
  if floor:
    speed["mfu"] = floor / seconds
  shown = {"loss": line["loss"]}
  if baseline is not None:
    line["baseline_loss"] = mean(baseline)  # frozen decoder, the same tokens
    shown["against_frozen"] = line["batch_loss"] - line["baseline_loss"]
  if config.objective == "coprocessor":
    speed["traces_per_second"] = shape[0] * config.traces.count / seconds
  writer.write(step, line, speed)
  return shown


def report(
  config: ConfigDict,
  workdir: str,
  model: Transformer,
  decoder: Params | None,
  params: Params,
  tokenizer: tokenizers.Tokenizer,
  fingerprint: str,
) -> None:
  """The last words of a run: tables on disk and on the terminal, exports.

  `params` are a coprocessor or a decoder as adaptation.effective makes it,
  `fingerprint` is the frozen decoder's.
  """
  if jax.process_count() > 1:
    params, decoder = multihost_utils.process_allgather(
      (params, decoder), tiled=True
    )
  if jax.process_index():
    return
  # On this process's own device: the others are not here to join a mesh.
  model = model.clone(attention=dispatch.Kernel(model.attention.name))
  rank = configs.lora_rank(config)
  meta = {
    "decoder": f"{config.decoder.path or 'random'} ({fingerprint})",
    "LoRA rank": rank or "none, all is trained",
    "steps": config.optimizer.steps,
    "sequences a step": config.data.batch,
    "seed": config.seed,
  }
  if config.objective == "language_model":
    meta["loss over"] = config.language_model.loss
    figures, text = run_report.language_model_report(
      config, workdir, model, params, tokenizer, decoder, meta
    )
    path = epath.Path(workdir) / "report.json"
    files.write_whole(path, json.dumps(figures, indent=2).encode())
    if config.export:
      huggingface.save(config.export, model.config, params, tokenizer=tokenizer)
    print(text)
    return
  spec = configs.layout_of(config)
  meta |= {
    "kind": spec.kind.value,
    "latents N": spec.latents,
    "ahead tokens A": spec.ahead,
    "rounds of latents": spec.rounds,
    "tokens between rounds": spec.stride,
    "positions": spec.positions,
    "start": spec.start,
    "began as": config.coprocessor.init,
    "traces a sequence": config.traces.count,
  }
  text = run_report.coprocessor_report(
    config, workdir, model, decoder, params, tokenizer, spec, meta
  )
  if config.export:
    export.save_coprocessor(
      config.export,
      model_config=model.config,
      spec=spec,
      params=params,
      decoder_fingerprint=fingerprint,
      source=config.decoder.path,
      lora_rank=rank,
    )
  print(text)


def check_finite(step: int, metrics: dict[str, Any]) -> None:
  """Stops the run at a number that is not finite; nothing is overwritten.

  The new parameters are looked at too: the loss of their own step may still
  be finite, and a checkpoint of them would be beyond use.

  Raises:
    UserError: naming the number, the step and its batch.
  """
  for name in ("loss", "gradient_norm", "parameter_norm"):
    if not np.isfinite(metrics[name]):
      raise UserError(
        f"{name} is {metrics[name]} at step {step} (batch {step - 1} of the "
        "data): stopped, the last checkpoint is kept; start anew in another "
        "--workdir with a lower optimizer.learning_rate or a longer "
        "optimizer.warmup"
      )
