r"""Baselines of equal cost: steps of equal FLOP, a model of equal parameters.

  python -m cacheaug.projects.sweep.equal_cost \
      --config=configs/tiny_coprocessor.py

prints, for a coprocessor's config, its parameters and FLOP a step, how many
steps of training its decoder on cost the same (on as many sequences a step),
and the layers of a single model with as many parameters as decoder and
coprocessor have together. configs/matched.py makes configs of them.
"""

import dataclasses
from functools import partial

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from cacheaug import config as configs
from cacheaug import flops
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import command
from cacheaug.weights import pretrained

EQUAL = ("steps", "flops")


def decoder_config(config: ConfigDict) -> ModelConfig:
  """Of decoder.path, or of decoder.shape where no path is given (yet)."""
  if not config.decoder.path:
    return configs.model_of(config)
  return pretrained.read_config(pretrained.resolve(config.decoder.path))


def _numbers(tree: Params) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def continued(
  config: ConfigDict, model_config: ModelConfig, equal: str = "steps"
) -> ConfigDict:
  """The config with its decoder trained on instead, on the same data.

  Args:
    config: a coprocessor's.
    model_config: its decoder's.
    equal: 'steps': as many; 'flops': as many as cost the same by
      flops.of_step, each of as many sequences.

  Raises:
    UserError: another objective, or an unknown `equal`.
  """
  if equal not in EQUAL:
    raise UserError(f"equal={equal!r} is not one of {', '.join(EQUAL)}")
  _needs_coprocessor(config)
  other = ConfigDict(config.copy_and_resolve_references())
  other.objective = "language_model"
  if equal == "flops":
    steps = equal_flop_steps(config, model_config)
    other.optimizer.steps = steps
    other.optimizer.warmup = min(other.optimizer.warmup, steps)
  return other


def equal_flop_steps(config: ConfigDict, model_config: ModelConfig) -> int:
  """Steps of training the decoder on that cost what the config's run costs.

  Both are useful FLOP, without what memory is saved by computing again; at
  least one step. `language_model.*` says how it is trained.
  """
  whole = flops.of_step(config, model_config).total * config.optimizer.steps
  each = flops.of_step(continued(config, model_config), model_config).total
  return max(1, round(whole / each))


def larger_layers(config: ConfigDict, model_config: ModelConfig) -> int:
  """Layers of the single model nearest in parameters to the pair.

  It has the decoder's width, heads and vocabulary: of all shapes with as many
  parameters the one that changes the least.
  """
  _needs_coprocessor(config)
  found = flops.parameters(config, model_config)
  one, two = (
    _numbers(
      jax.eval_shape(
        partial(transformer.init, Transformer(_deep(model_config, layers))),
        jax.random.key(0),
      )
    )
    for layers in (1, 2)
  )
  return 1 + round((found.total - one) / (two - one))


def larger(config: ConfigDict, model_config: ModelConfig) -> ConfigDict:
  """The config of that single model, trained from nothing on the same data.

  The tokenizer stays the decoder's. RoPE scaling is left out: it stretches the
  positions of a model that was trained on shorter text first.
  """
  other = continued(config, model_config)
  deep = _deep(model_config, larger_layers(config, model_config))
  if config.data.tokenizer == "decoder":
    path = config.decoder.path
    other.data.tokenizer = (
      str(pretrained.resolve(path)) if path else "THE_DECODERS_DIRECTORY"
    )
  other.decoder.path = other.decoder.how_to_get = ""
  other.decoder.family = deep.family
  for name in other.decoder.shape:
    other.decoder.shape[name] = getattr(deep, name)
  return other


def _deep(model_config: ModelConfig, layers: int) -> ModelConfig:
  return dataclasses.replace(
    model_config, layers=layers, layer_kinds=(), rope_scaling=()
  )


def _needs_coprocessor(config: ConfigDict) -> None:
  if config.objective != "coprocessor":
    raise UserError(
      f"objective={config.objective!r}: give a config that trains a coprocessor"
    )


def lines(config: ConfigDict, model_config: ModelConfig) -> list[str]:
  """What the command prints."""
  found, steps = flops.parameters(config, model_config), config.optimizer.steps
  step = flops.of_step(config, model_config).total
  plain = continued(config, model_config)
  own = flops.of_step(plain, model_config).total
  deep = larger(config, model_config)
  shape = configs.model_of(deep)
  single = _numbers(
    jax.eval_shape(
      partial(transformer.init, Transformer(shape)), jax.random.key(0)
    )
  )
  return [
    f"decoder: {found.decoder:,} parameters",
    f"coprocessor: {found.coprocessor:,} parameters, {found.trained:,} trained",
    f"a step: {step:.4g} FLOP; training the decoder on: {own:.4g}",
    f"equal steps: --config.optimizer.steps={steps}",
    "equal FLOP: --config.optimizer.steps="
    f"{equal_flop_steps(config, model_config)}",
    f"single model of equal parameters: {shape.layers} layers for "
    f"{model_config.layers}, {single:,} parameters "
    f"({100 * single / (found.total) - 100:+.1f} %); a "
    f"step: {flops.of_step(deep, shape).total:.4g} FLOP",
  ]


def main() -> None:
  """Reads the flags that are defined below."""
  flag = flags.FLAGS["config"]
  given = config_flags.get_override_values(flag)
  config = configs.resolve(flag.value, given=given)
  print("\n".join(lines(config, decoder_config(config))))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "a coprocessor's experiment")
  command.run(main, __doc__)
