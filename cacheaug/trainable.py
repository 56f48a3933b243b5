"""What a run trains, and what it is built on, for every way of training.

  objective       lora_rank  begins as           trained tree
  coprocessor     0          coprocessor.init    the whole coprocessor
  coprocessor     r          coprocessor.init    {lora, soft_tokens, ...}
  language_model  0          decoder.path, or    the whole decoder
                             random without one
  language_model  r          decoder.path        {lora}

A LoRA's base is the frozen decoder (of which no copy is kept) or, where the
coprocessor begins as a trained one, that one's network: `frozen`, part of the
train state and of checkpoints, so that a run needs no other run's files once
it has begun. Gradients and optimizer state are of the trained tree alone.

`effective` makes of them what objectives and evaluations take: a coprocessor
or a decoder as if it had been trained whole.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.augment import coprocessor
from cacheaug.augment.kinds import Kind
from cacheaug.errors import UserError
from cacheaug.model import lora, transformer
from cacheaug.model.transformer import Params, Transformer


def random_decoder(
  config: ConfigDict, model: Transformer, dtype: jax.typing.DTypeLike
) -> Params:
  """The frozen decoder of a config without decoder.path, of its seed."""
  params = nn.unbox(transformer.init(model, jax.random.key(config.seed)))
  return jax.tree.map(lambda x: x.astype(dtype), params)


def init(
  config: ConfigDict,
  model: Transformer,
  key: jax.Array,
  decoder: Params | None,
  initial: Params | None = None,
  *,
  boxed: bool = False,
) -> tuple[Params, Params | None]:
  """Fresh (trained, frozen) trees.

  Args:
    config: see the module docstring.
    model: the architecture.
    key: of what is random.
    decoder: the frozen decoder; None where a decoder is trained from nothing.
    initial: a trained coprocessor, where coprocessor.init is a path.
    boxed: random numbers with their logical axes instead, for shardings.

  Raises:
    UserError: a LoRA of a kind that has no network.
  """
  if config.objective == "language_model":
    return _init_decoder(config, model, key, decoder, boxed), None
  rank, spec = configs.lora_rank(config), configs.layout_of(config)
  other = configs.begins_as_trained(config)
  if boxed:
    params = coprocessor.init_boxed(model, spec, key)
  elif other:
    params = initial
  else:
    params = coprocessor.init(
      model, spec, key, decoder, config.coprocessor.init
    )
  if not rank:
    whole = jax.tree.map(lambda x: jnp.array(x, model.param_dtype), params)
    return whole, None
  if "transformer" not in params:
    raise UserError(
      f"coprocessor.lora_rank={rank}: coprocessor.kind={spec.kind!r} has no "
      "network to adapt, set it to 0"
    )
  body = params["transformer"]
  own = {k: v for k, v in params.items() if k != "transformer"}
  own = jax.tree.map(lambda x: jnp.array(x, model.param_dtype), own)
  own["lora"] = _init_lora(config, model, key, boxed)
  if not other:
    return own, None
  # In the dtype that it is used in: it will not change.
  return own, jax.tree.map(lambda x: x.astype(model.dtype), body)


def _init_decoder(config, model, key, decoder, boxed):
  if configs.lora_rank(config):
    return {"lora": _init_lora(config, model, key, boxed)}
  if boxed or decoder is None:
    params = transformer.init(model, key)
    return params if boxed else nn.unbox(params)
  return jax.tree.map(
    lambda x: jnp.array(x, model.param_dtype, copy=True), decoder
  )


def _init_lora(config, model, key, boxed):
  key = jax.random.fold_in(key, 1)  # not that of soft tokens
  rank, kernels = configs.lora_rank(config), tuple(config.lora.kernels)
  tree = lora.init_boxed(model, rank, kernels, key)
  return tree if boxed else nn.unbox(tree)


def effective(
  config: ConfigDict,
  params: Params,
  frozen: Params | None,
  decoder: Params | None,
  how: Callable[[Params, Params, float], Params] = lora.attach,
) -> Params:
  """The coprocessor or decoder that the trees of `init` stand for.

  Args:
    config: of the run.
    params: trained.
    frozen: base of a LoRA that the decoder is not.
    decoder: the frozen decoder.
    how: lora.attach to train it, lora.merge for plain weights.
  """
  if "lora" not in params:
    return params
  scale = config.lora.alpha / configs.lora_rank(config)
  own = {k: v for k, v in params.items() if k != "lora"}
  base = decoder if frozen is None else frozen
  adapted = {**base, "blocks": how(base["blocks"], params["lora"], scale)}
  if config.objective == "language_model":
    return adapted
  kind = Kind.of(config.coprocessor.kind)
  return {"transformer": kind.part(adapted), **own}
