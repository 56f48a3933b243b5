"""One training step: state, loss, gradients, update, its line of metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import sharding, trainable
from cacheaug.augment import objective, point_sampling, terms
from cacheaug.augment.objective import Sums
from cacheaug.model.transformer import Params, Transformer

Batch = dict[str, jax.Array]  # tokens, documents [B, S], maybe answers
Summed = TypeVar("Summed")


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; the frozen decoder is not part of it."""

  step: jax.Array  # []
  params: Params  # trainable tree
  opt_state: Any
  average: Params | None  # running average of params
  frozen: Params | None  # what a LoRA adapts, where it is not the decoder
  nll: jax.Array  # [A], sums since the last log step
  tokens: jax.Array  # [A]


def init_state(
  config: ConfigDict,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  boxed: bool,
  decoder: Params | None,
  key: jax.Array,
  initial: Params | None = None,
) -> TrainState:
  """A fresh state; `boxed` keeps the parameters' logical axes (shardings).

  `initial` is the trained coprocessor that coprocessor.init names, if any.
  """
  key = jax.random.fold_in(key, 2**31 - 1)  # no step's key
  ahead = (
    configs.layout_of(config).tokens_predicted
    if configs.draws_points(config)
    else 1
  )
  params, frozen = trainable.init(
    config, model, key, decoder, initial, boxed=boxed
  )
  average = None
  if config.optimizer.average:
    average = jax.tree.map(jnp.array, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    average=average,
    frozen=frozen,
    nll=jnp.zeros(ahead),
    tokens=jnp.zeros(ahead),
  )


def abstract_state(
  config: ConfigDict,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  decoder: Params | None,
  mesh: sharding.AnyMesh,
) -> TrainState:
  """Shapes of a fresh state's arrays, each with its sharding on the mesh."""
  boxed = jax.eval_shape(
    partial(init_state, config, model, optimizer, True),
    decoder,
    jax.random.key(0),
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(boxed),
    sharding.tree_shardings(mesh, boxed),
  )


def make_step(
  config: ConfigDict,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  shardings: TrainState,
  sums: Callable[..., Sums] = objective.coprocessor_loss,
) -> jax.stages.Wrapped:
  """step(state, decoder, batch, key, reset) -> state, metrics. Donates state.

  Gradients are those of the trainable tree alone. `reset` starts the running
  sums of the next log line; `sums` is the coprocessor objective's function.
  """
  k = config.optimizer.accumulation
  decay = config.optimizer.average

  def loss(params, frozen, decoder, step, batch):
    whole = trainable.effective(config, params, frozen, decoder)
    if config.objective == "language_model":
      adapts = configs.lora_rank(config) > 0  # and so leaves the head alone
      nll, tokens = _language_model(
        config, model, whole, batch, frozen_head=adapts
      )
    else:
      args = model, decoder, whole, batch, batch["points"]
      layout, added = configs.layout_of(config), configs.terms_of(config)
      if added.on:
        total, plain, extras = terms.coprocessor_loss(
          *args, layout, terms=added, step=step
        )
        return total, (*plain, extras)
      nll, tokens = sums(*args, layout)
    return nll.sum(), (nll, tokens, {})

  def step(state, decoder, batch, key, reset):
    batch = add_points(config, batch, key, state.step)
    gradient = partial(
      jax.grad(loss, has_aux=True),
      state.params,
      state.frozen,
      decoder,
      state.step,
    )
    with sharding.placing(mesh):
      grads, (nll, tokens, extras) = summed(gradient, batch, k)
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
      "terms": extras,
      "running": running,
      "gradient_norm": optax.tree.norm(grads),
      "parameter_norm": optax.tree.norm(params),
    }
    keep = jnp.where(reset, 0.0, 1.0)
    return TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      average=average,
      frozen=state.frozen,
      nll=running[0] * keep,
      tokens=running[1] * keep,
    ), metrics

  out = shardings, sharding.replicated(mesh)
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=out,
    compiler_options=_compiler_options(config, mesh),
  )


def _compiler_options(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, bool] | None:
  """XLA's options beside its own choice.

  A GPU's scatters add by atomic operations in whatever order they come, and
  what is fastest is looked for anew in each process; this flag does without.
  """
  if not config.deterministic or mesh.devices.flat[0].platform == "tpu":
    return None
  return {"xla_gpu_deterministic_ops": True}


def _language_model(config, model, params, batch, *, frozen_head):
  """Sums of the language_model objective: nll and tokens."""
  if configs.draws_points(config):
    spec = configs.layout_of(config)
    return objective.plain_traces_loss(
      model, params, batch, batch["points"], spec, frozen_head=frozen_head
    )
  mask = config.traces.mask_documents
  return objective.language_model_loss(
    model, params, batch, mask, frozen_head=frozen_head
  )


def make_baseline(
  config: ConfigDict, model: Transformer, mesh: jax.sharding.Mesh
) -> Callable[..., Sums | None]:
  """baseline(decoder, batch, key, step): frozen nll of that step's tokens.

  None where there is no decoder: one is trained from nothing.
  """
  spec, k = configs.layout_of(config), config.optimizer.accumulation

  @partial(
    jax.jit,
    out_shardings=sharding.replicated(mesh),
    compiler_options=_compiler_options(config, mesh),
  )
  def baseline(decoder, batch, key, step):
    def part(batch):
      if not configs.draws_points(config):
        return _language_model(config, model, decoder, batch, frozen_head=True)
      return objective.frozen_loss(model, decoder, batch, batch["points"], spec)

    with sharding.placing(mesh):
      return summed(part, add_points(config, batch, key, step), k)

  def maybe(decoder, *arguments):
    return None if decoder is None else baseline(decoder, *arguments)

  return maybe


def add_points(
  config: ConfigDict, batch: Batch, key: jax.Array, step: jax.Array | int
) -> Batch:
  """The batch with step's points and lateness [B, M], where it has any.

  Drawn for the whole batch, so that micro-batches do not change them.
  """
  if not configs.draws_points(config):
    return batch
  key = jax.random.fold_in(key, step)
  spec, draw = configs.layout_of(config), configs.draw_of(config)
  documents = batch["documents"]
  answers = batch.get("answers")
  points = point_sampling.sample_points(key, documents, spec, draw, answers)
  batch = batch | {"points": points}
  if draw.late_max:
    key = jax.random.fold_in(key, 1)
    batch["late"] = point_sampling.sample_late(
      key, documents, points, spec, draw.late_max
    )
  return batch


def summed(function: Callable[[Batch], Summed], batch: Batch, k: int) -> Summed:
  """function(batch), which is a sum over rows, by way of k micro-batches."""
  if k == 1:
    return function(batch)
  # Row r of the batch goes to micro-batch r % k, which keeps every device's
  # rows on that device.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), batch
  )
  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(jnp.zeros_like, shapes)

  def body(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  return jax.lax.scan(body, zeros, parts)[0]
