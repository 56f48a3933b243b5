"""The one trainer, top to bottom, for a coprocessor or a decoder itself."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import export, optim, sharding
from cacheaug.augment import coprocessor, objective
from cacheaug.checkpoint import Checkpoints
from cacheaug.data import pipeline, tokenizers
from cacheaug.errors import UserError
from cacheaug.evals import finish
from cacheaug.metrics import MetricWriter, Progress, memory_peak
from cacheaug.model import pretrained, transformer
from cacheaug.model.transformer import Params, Transformer

# Keys that may differ when a run is resumed: they do not change its numbers.
FREE_KEYS = (
  "mesh.",
  "checkpoint.",
  "data.workers",
  "data.cache_dir",
  "eval.",
  "export",
)


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; the frozen decoder is not part of it."""

  step: jax.Array  # []
  params: Params  # trainable tree
  opt_state: Any
  average: Params | None  # running average of params
  nll: jax.Array  # [A], sums since the last log step
  tokens: jax.Array  # [A]


@flax.struct.dataclass
class Frozen:
  """What the loss reads and nothing trains."""

  decoder: Params | None


def train(config: ConfigDict, workdir: str) -> None:
  """Trains to config.optimizer.steps in `workdir`, resuming what is there."""
  # --- mesh, workdir --------------------------------------------------------
  configs.validate(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  claim_workdir(config, Path(workdir))

  # --- decoder, tokenizer ---------------------------------------------------
  model, decoder, tokenizer, fingerprint = load_decoder(config, mesh)

  # --- data -----------------------------------------------------------------
  batches = pipeline.open_batches(
    config.data,
    tokenizer,
    split="train",
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

  # --- state ----------------------------------------------------------------
  steps = config.optimizer.steps
  optimizer, _ = optim.make_optimizer(config.optimizer, steps)
  fresh = partial(init_state, config, model, optimizer)
  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(
    partial(init_state, config, model, optimizer, True), decoder, key
  )
  shardings = sharding.tree_shardings(mesh, abstract)

  # --- restore: 1. newest whole checkpoint, 2. fresh --------------------------
  checkpoints = Checkpoints(
    Path(workdir) / "checkpoints",
    keep=config.checkpoint.keep,
    save_every=config.checkpoint.every,
  )
  wanted = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(abstract),
    shardings,
  )
  restored = checkpoints.restore_latest(wanted)
  if restored is None:
    state = jax.jit(partial(fresh, False), out_shardings=shardings)(
      decoder, key
    )
    start = 0
  else:
    state, meta, start = restored
    if meta["decoder"] != fingerprint:
      raise UserError(
        f"{workdir} was trained for decoder {meta['decoder']}, decoder.path "
        f"holds {fingerprint}: give that decoder, or another --workdir"
      )
    logging.info("resumed from step %d", start)
  meta = {"decoder": fingerprint, "seed": config.seed}

  # --- loop -------------------------------------------------------------------
  step_fn = make_step(config, model, optimizer, shardings)
  baseline_fn = make_baseline(config, model)
  stop = _StopOnSignal()
  writer = MetricWriter(workdir)
  writer.truncate_after(start if start else -1)
  log = partial(log_step, config, writer, mesh)
  pending = None  # metrics are read one step late, to keep the device busy
  began, counted = time.monotonic(), start
  stream = batches.iterate(start)
  with Progress(steps, start, "train") as progress:
    for step in range(start + 1, steps + 1):
      batch = sharding.put_global(next(stream), sharding.batch_sharding(mesh))
      logs = step % config.log_every == 0 or step == steps
      previous = state
      state, metrics = step_fn(previous, decoder, batch, key, np.bool_(logs))
      del previous
      if pending:
        check_finite(*pending)
      pending = step, metrics["loss"]
      if logs:
        check_finite(*pending)
        seconds = (time.monotonic() - began) / (step - counted)
        baseline = baseline_fn(decoder, batch, key, np.int32(step - 1))
        shown = log(step, metrics, baseline, batch["tokens"].shape, seconds)
        progress.update(step, **shown)
        began, counted = time.monotonic(), step
      if stop.asked or step % config.checkpoint.every == 0 or step == steps:
        check_finite(*pending)
        checkpoints.save(step, state, meta, force=True)
      if stop.asked:
        checkpoints.close()
        logging.info(
          "stopped by signal: step %d is saved, run again to go on", step
        )
        raise SystemExit(0)
  checkpoints.close()
  writer.close()

  # --- report -----------------------------------------------------------------
  params = state.params if state.average is None else state.average
  report(config, workdir, model, decoder, params, tokenizer, fingerprint)


def load_decoder(config: ConfigDict, mesh: jax.sharding.Mesh):
  """The model, the frozen decoder's sharded parameters, tokenizer, fingerprint.

  For the language_model objective there is no decoder yet: parameters None.
  """
  compute, storage = (
    _dtype(config.precision[k]) for k in ("compute", "decoder")
  )
  spec = config.data.tokenizer
  if not config.decoder.path:
    model_config = configs.model_of(config)
    tokenizer = tokenizers.load("byte" if spec == "decoder" else spec)
  else:
    try:
      directory = pretrained.resolve(config.decoder.path)
    except UserError as e:
      how = config.decoder.how_to_get
      raise UserError(f"decoder.path: {e}{'. ' + how if how else ''}") from e
    model_config = pretrained.read_config(directory)
    tokenizer = tokenizers.load(str(directory) if spec == "decoder" else spec)
  if tokenizer.vocab_size > model_config.vocab_size:
    raise UserError(
      f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, the "
      f"decoder's vocabulary {model_config.vocab_size}: give the decoder's own"
    )
  model = Transformer(model_config, dtype=compute, remat=config.remat)
  if config.objective == "language_model":
    return model, None, tokenizer, ""
  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(partial(transformer.init, model), key)
  shardings = sharding.tree_shardings(mesh, abstract)
  if config.decoder.path:
    decoder = pretrained.load(
      directory, model_config, dtype=storage, shardings=shardings
    )
  else:
    make = lambda k: jax.tree.map(
      lambda x: x.astype(storage), nn.unbox(transformer.init(model, k))
    )
    decoder = jax.jit(make, out_shardings=shardings)(key)
  return model, decoder, tokenizer, pretrained.fingerprint(decoder)


def _dtype(name: str) -> Any:
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)


def init_state(
  config: ConfigDict,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  boxed: bool,
  decoder: Params | None,
  key: jax.Array,
) -> TrainState:
  """A fresh state; `boxed` keeps the parameters' logical axes (shardings)."""
  key = jax.random.fold_in(key, 2**31 - 1)  # no step's key
  if config.objective == "language_model":
    params = transformer.init(model, key)
    ahead = 1
  else:
    spec = configs.spec_of(config)
    if boxed:
      params = coprocessor.init_boxed(model, spec, key)
    else:
      params = coprocessor.init(
        model, spec, key, decoder, config.coprocessor.init
      )
    ahead = spec.ahead
  if not boxed:
    params = nn.unbox(params)
  average = None
  if config.optimizer.average:
    average = jax.tree.map(jnp.array, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    average=average,
    nll=jnp.zeros(ahead),
    tokens=jnp.zeros(ahead),
  )


def make_step(config, model, optimizer, shardings):
  """step(state, decoder, batch, key, reset) -> state, metrics. Donates state.

  Gradients are those of the trainable tree alone. `reset` starts the running
  sums of the next log line.
  """
  k = config.optimizer.accumulation
  decay = config.optimizer.average

  def loss(params, decoder, batch, key):
    if config.objective == "language_model":
      mask = config.traces.mask_documents
      nll, tokens = objective.language_model_loss(model, params, batch, mask)
    else:
      nll, tokens = objective.coprocessor_loss(
        model, decoder, params, batch, key, configs.spec_of(config)
      )
    return nll.sum(), (nll, tokens)

  def sums(params, decoder, batch, key):
    grads, (nll, tokens) = jax.grad(loss, has_aux=True)(
      params, decoder, batch, key
    )
    return grads, nll, tokens

  def accumulate(params, decoder, batch, key):
    # Row r of the batch goes to micro-batch r % k, which keeps every
    # device's rows on that device.
    micro = jax.tree.map(
      lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(carry, i):
      part = jax.tree.map(lambda x: x[i], micro)
      new = sums(params, decoder, part, jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, carry, new), None

    zeros = jax.tree.map(
      jnp.zeros_like,
      jax.eval_shape(
        sums, params, decoder, jax.tree.map(lambda x: x[0], micro), key
      ),
    )
    return jax.lax.scan(body, zeros, jnp.arange(k))[0]

  def step(state, decoder, batch, key, reset):
    key = jax.random.fold_in(key, state.step)
    run = sums if k == 1 else accumulate
    grads, nll, tokens = run(state.params, decoder, batch, key)
    count = jnp.maximum(tokens.sum(), 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if decay:
      average = optax.incremental_update(params, average, 1.0 - decay)
    running = state.nll + nll, state.tokens + tokens
    metrics = {
      "loss": nll.sum() / count,
      "batch": (nll, tokens),
      "running": running,
      "gradient_norm": optax.global_norm(grads),
    }
    keep = jnp.where(reset, 0.0, 1.0)
    return TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      average=average,
      nll=running[0] * keep,
      tokens=running[1] * keep,
    ), metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_baseline(config, model):
  """baseline(decoder, batch, key, step): frozen nll of that step's tokens."""
  if config.objective == "language_model":
    return lambda *_: None
  spec, k = configs.spec_of(config), config.optimizer.accumulation

  @jax.jit
  def baseline(decoder, batch, key, step):
    key = jax.random.fold_in(key, step)
    if k == 1:
      return objective.frozen_loss(model, decoder, batch, key, spec)
    nll, tokens = 0.0, 0.0
    for i in range(k):
      part = jax.tree.map(lambda x: x[i::k], batch)
      some = objective.frozen_loss(
        model, decoder, part, jax.random.fold_in(key, i), spec
      )
      nll, tokens = nll + some[0], tokens + some[1]
    return nll, tokens

  return baseline


def log_step(config, writer, mesh, step, metrics, baseline, shape, seconds):
  """Writes one line of metrics; returns what the progress line shows."""
  metrics, baseline = jax.device_get((metrics, baseline))
  mean = lambda sums: float(sums[0].sum() / max(sums[1].sum(), 1.0))
  running = metrics["running"]
  line = {
    "loss": mean(metrics["running"]),  # mean since the last line
    "nll": running[0] / np.maximum(running[1], 1.0),
    "gradient_norm": float(metrics["gradient_norm"]),
    "batch_loss": mean(metrics["batch"]),  # this step's tokens
  }
  speed = {
    "step_time": seconds,
    "tokens_per_second": shape[0] * shape[1] / seconds,
    "memory_peak": memory_peak(),
  }
  shown = {"loss": line["loss"]}
  if baseline is not None:
    line["baseline_loss"] = mean(baseline)  # frozen decoder, the same tokens
    shown["against_frozen"] = line["batch_loss"] - line["baseline_loss"]
    speed["traces_per_second"] = shape[0] * config.traces.count / seconds
  writer.write(step, line, speed)
  return shown


def report(config, workdir, model, decoder, params, tokenizer, fingerprint):
  """The last words of a run: tables on disk and on the terminal, exports."""
  if jax.process_count() > 1:
    params, decoder = multihost_utils.process_allgather(
      (params, decoder), tiled=True
    )
  if jax.process_index():
    return
  if config.objective == "language_model":
    figures, text = finish.language_model_report(
      config, model, params, tokenizer
    )
    path = Path(workdir) / "report.json"
    path.write_text(json.dumps(figures, indent=2))
    if config.export:
      pretrained.save(config.export, model.config, params, tokenizer=tokenizer)
    print(text)
    return
  spec = configs.spec_of(config)
  meta = {
    "decoder": f"{config.decoder.path or 'random'} ({fingerprint})",
    "latents N": spec.latents,
    "ahead tokens A": spec.ahead,
    "positions": spec.scheme,
    "start": spec.start,
    "steps": config.optimizer.steps,
    "sequences a step": config.data.batch,
    "traces a sequence": spec.count,
    "seed": config.seed,
  }
  text = finish.coprocessor_report(
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
    )
  print(text)


def check_finite(step: int, loss: jax.Array) -> None:
  """Stops the run at a loss that is not finite; nothing is overwritten."""
  if not np.isfinite(loss):
    raise UserError(
      f"loss is {loss} at step {step} (batch {step - 1} of the data): the last "
      "checkpoint is kept; lower optimizer.learning_rate or raise "
      "optimizer.warmup, and run again"
    )


class _StopOnSignal:
  """`asked` turns true at SIGTERM, which preemption sends; then save, exit 0."""

  def __init__(self):
    self.asked = False
    signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_):
    self.asked = True


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
  """Writes config.json, or checks that the one there is of this experiment."""
  path = workdir / "config.json"
  text = json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if path.exists():
      _same_experiment(json.loads(path.read_text()), json.loads(text), workdir)
    elif jax.process_index() == 0:
      temporary = workdir / "config.json.tmp"
      temporary.write_text(text)
      os.replace(temporary, path)
  except OSError as e:
    raise UserError(
      f"--workdir={workdir} cannot be written to ({e.strerror}): give another"
    ) from e


def _same_experiment(old: dict, new: dict, workdir: Path) -> None:
  flat = lambda tree: dict(_flatten(tree, ""))
  old, new = flat(old), flat(new)
  other = sorted(
    k
    for k in old.keys() | new.keys()
    if old.get(k, "absent") != new.get(k, "absent")
    and not k.startswith(FREE_KEYS)
  )
  if other:
    shown = ", ".join(
      f"{k} ({old.get(k, 'absent')!r} there, {new.get(k, 'absent')!r} here)"
      for k in other[:4]
    )
    raise UserError(
      f"--workdir={workdir} holds another experiment: {shown}"
      f"{' and more' if len(other) > 4 else ''}; give another --workdir"
    )


def _flatten(tree: Any, prefix: str):
  if isinstance(tree, dict) and tree:
    for key, value in tree.items():
      yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
  else:
    yield prefix, tree
