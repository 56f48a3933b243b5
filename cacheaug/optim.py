"""Adam with decoupled weight decay, a schedule, and multipliers by path."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cacheaug.errors import UserError
from cacheaug.run.checksum import leaf_name

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Scanned layers give norms and biases a second dimension, [L, D], so rank
# alone does not tell a matrix.
_NO_DECAY = re.compile(r"norm|scale|bias|soft_tokens|prefix")


def make_schedule(config: ConfigDict, total_steps: int) -> Schedule:
  """Learning rate by step: a linear warm-up, then the named decay.

  Args:
    config: `learning_rate` (the peak), `schedule` (cosine, linear or
      constant), `warmup` in steps, `final_fraction` of the peak that the
      decay ends at.
    total_steps: at which the decay ends; constant from there.

  Raises:
    UserError: naming the key out of range.
  """
  shapes = {
    "cosine": lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
    "linear": lambda t: 1.0 - t,
    "constant": jnp.ones_like,
  }
  if config.schedule not in shapes:
    raise UserError(
      f"config.optimizer.schedule: {config.schedule!r} is not one of "
      f"{', '.join(shapes)}"
    )
  if not 0 <= config.warmup <= total_steps:
    raise UserError(
      f"config.optimizer.warmup: {config.warmup} must be from 0 to the "
      f"{total_steps} steps of the run"
    )
  if not 0.0 <= config.final_fraction <= 1.0:
    raise UserError(
      f"config.optimizer.final_fraction: {config.final_fraction} must be "
      "from 0 to 1"
    )
  if not config.learning_rate > 0.0:
    raise UserError(
      f"config.optimizer.learning_rate: {config.learning_rate} must be positive"
    )
  peak, final = config.learning_rate, config.final_fraction
  warmup, shape = config.warmup, shapes[config.schedule]
  decay_steps = max(total_steps - warmup, 1)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    # step + 1: the first step of a warm-up already moves the parameters.
    ramp = jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))
    progress = jnp.clip((step - warmup) / decay_steps, 0.0, 1.0)
    return peak * ramp * (final + (1.0 - final) * shape(progress))

  return schedule


def parameter_name(path: tuple) -> str:
  """`a/b/c` of a tree path, without the key of a Linen box."""
  if path and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return leaf_name(path)


def multiplier_tree(multipliers: Mapping[str, float], params: Any) -> Any:
  """Each parameter's learning-rate multiplier.

  Args:
    multipliers: regular expression searched for in the parameter's path ->
      multiplier, 0 for frozen. The longest expression that matches wins (a
      ConfigDict sorts its keys, so their order cannot decide); the empty one
      matches every parameter.
    params: tree of arrays or shapes, boxed or not.

  Raises:
    UserError: a parameter that none matches, a broken expression, or a
      negative multiplier.
  """
  patterns = []
  for text in sorted(multipliers, key=lambda k: (-len(k), k)):
    if not multipliers[text] >= 0.0:
      raise UserError(
        f"config.optimizer.multipliers: {text!r} has {multipliers[text]}, "
        "must be 0 (frozen) or more"
      )
    try:
      patterns.append((re.compile(text), float(multipliers[text])))
    except re.error as e:
      raise UserError(
        f"config.optimizer.multipliers: {text!r} is not a regular "
        f"expression: {e}"
      ) from e

  def one(path, _):
    name = parameter_name(path)
    for pattern, multiplier in patterns:
      if pattern.search(name):
        return multiplier
    raise UserError(
      f"config.optimizer.multipliers: none matches the parameter {name!r}: "
      "add one ('' matches all the rest, 0 freezes)"
    )

  return jax.tree_util.tree_map_with_path(one, params)


def _decayed(params: Any) -> Any:
  """True for the matrices that weight decay applies to."""

  def one(path, leaf):
    return leaf.ndim >= 2 and not _NO_DECAY.search(parameter_name(path))

  return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(
  config: ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
  """The optimizer and its learning rate by step, before multipliers.

  In order: global-norm clipping over every parameter that is not frozen,
  Adam, weight decay on matrices, learning rate times multiplier. Frozen
  parameters get zero updates and no state. Gradients are expected already
  averaged over micro-batches; `config.accumulation` is the trainer's.

  Args:
    config: `learning_rate`, `schedule`, `warmup`, `final_fraction`, `b1`,
      `b2`, `eps`, `weight_decay`, `clip` (global norm, 0 for none),
      `multipliers` (see `multiplier_tree`).
    total_steps: of the run.

  Raises:
    UserError: from the schedule at once, from multipliers at `init`.
  """
  schedule = make_schedule(config, total_steps)
  multipliers = config.multipliers.to_dict()

  def scale(updates, params):
    del params
    factors = multiplier_tree(multipliers, updates)
    return jax.tree.map(lambda f, u: f * u, factors, updates)

  steps = [
    optax.scale_by_adam(config.b1, config.b2, config.eps),
    optax.add_decayed_weights(config.weight_decay, _decayed),
    optax.scale_by_learning_rate(schedule),
    optax.stateless(scale),
  ]
  if config.clip > 0.0:
    steps.insert(0, optax.clip_by_global_norm(config.clip))

  def labels(params):
    return jax.tree.map(
      lambda m: "trained" if m else "frozen",
      multiplier_tree(multipliers, params),
    )

  optimizer = optax.multi_transform(
    {"trained": optax.chain(*steps), "frozen": optax.set_to_zero()}, labels
  )
  return optimizer, schedule
