"""The one trainer, top to bottom, for a coprocessor or a decoder itself."""

import json
import os
from functools import partial

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cacheaug import (
  build,
  flops,
  optim,
  sharding,
  trainable,
  validate,
)
from cacheaug import config as configs
from cacheaug.data import opening, tokenizers
from cacheaug.errors import UserError
from cacheaug.evals import run_report
from cacheaug.kernels import dispatch
from cacheaug.model import lora
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import agreement, files, machine, profiling
from cacheaug.run import workdir as workdirs
from cacheaug.run.checkpoint import Checkpoints
from cacheaug.run.heartbeat import Heartbeat
from cacheaug.run.lock import Lock
from cacheaug.run.metrics import (
  MetricWriter,
  Progress,
  check_finite,
  log_step,
)
from cacheaug.run.preemption import StopOnSignal
from cacheaug.step import (
  abstract_state,
  init_state,
  make_baseline,
  make_step,
)
from cacheaug.weights import coprocessor_files, huggingface, transformers_files


def train(config: ConfigDict, workdir: str) -> None:
  """Trains to config.optimizer.steps in `workdir`, resuming what is there.

  Raises:
    UserError: bad input, before anything is written; a loss that is not
      finite, with the checkpoints before it kept.
  """
  workdir = os.fspath(files.expanded(workdir))
  with Lock(workdir) as lock:
    _train(config, workdir, lock)


def _train(config: ConfigDict, workdir: str, lock: Lock) -> None:
  # --- mesh, workdir --------------------------------------------------------
  agreement.check(lambda: agreement.of_config(config))
  validate.check_config(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  agreement.on_process_zero(lock.acquire)
  workdirs.check(config, workdir)

  # --- model, tokenizer -----------------------------------------------------
  model, tokenizer = build.open_model(config, mesh)

  # --- data -----------------------------------------------------------------
  batches = opening.open_batches(
    config.data,
    tokenizer,
    split="train",
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  agreement.check(lambda: batches.describe() | build.describe_decoder(config))

  # --- decoder, state -------------------------------------------------------
  decoder, fingerprint = build.load_decoder(config, model, mesh)
  begin = partial(build.load_initial, config, model, mesh, decoder, fingerprint)
  # Before anything is written; a run that has begun needs it no more.
  initial = None if workdirs.has_checkpoints(workdir) else begin()
  steps = config.optimizer.steps
  optimizer, _ = optim.make_optimizer(config.optimizer, steps)
  key = jax.random.key(config.seed)
  wanted = abstract_state(config, model, optimizer, decoder, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, wanted)

  # --- restore: 1. newest whole checkpoint, 2. fresh --------------------------
  workdirs.claim(config, workdir, lock)
  checkpoints = Checkpoints(
    epath.Path(workdir) / "checkpoints",
    keep=config.checkpoint.keep,
    save_every=config.checkpoint.every,
  )
  heartbeat = Heartbeat(workdir, limit=config.watchdog.seconds)
  restored = checkpoints.restore_latest(wanted)
  if restored is None:
    fresh = partial(init_state, config, model, optimizer, False)
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
  step_fn = make_step(config, model, optimizer, mesh, shardings)
  baseline_fn = make_baseline(config, model, mesh)
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
          shown = log(step, metrics, baseline, batch, times)
          progress.update(step, **shown)
      trace.after(step, state)
      stopping = stop.requested(step)
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
  text = report(config, workdir, model, decoder, params, tokenizer, fingerprint)
  heartbeat.enter_phase("finished")
  if text:
    print(text)  # last: whoever should read it may be gone


def report(
  config: ConfigDict,
  workdir: str,
  model: Transformer,
  decoder: Params | None,
  params: Params,
  tokenizer: tokenizers.Tokenizer,
  fingerprint: str,
) -> str:
  """The last words of a run: tables on disk and on the terminal, exports.

  `params` are a coprocessor or a decoder as trainable.effective makes it,
  `fingerprint` is the frozen decoder's.
  """
  if jax.process_count() > 1:
    params, decoder = multihost_utils.process_allgather(
      (params, decoder), tiled=True
    )
  if jax.process_index():
    return ""
  # On this process's own device: the others are not here to join a mesh.
  model = model.clone(attention=dispatch.Kernel(model.attention.name))
  rank = configs.lora_rank(config)
  meta = {
    "decoder": build.name_decoder(config, fingerprint),
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
    with files.disk_errors(path, "write the report"):
      files.write_whole(path, json.dumps(figures, indent=2).encode())
    if config.export:
      huggingface.save(config.export, model.config, params, tokenizer=tokenizer)
    return text
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
  if spec.window:
    meta["context that latents' readers see"] = f"{spec.window} tokens"
  text = run_report.coprocessor_report(
    config, workdir, model, decoder, params, tokenizer, spec, meta
  )
  if config.export:
    coprocessor_files.save_coprocessor(
      config.export,
      model_config=model.config,
      spec=spec,
      params=params,
      decoder_fingerprint=fingerprint,
      source=config.decoder.path,
      draw=configs.draw_of(config),
      lora_rank=rank,
      report=transformers_files.report_of(workdir),
    )
  return text
