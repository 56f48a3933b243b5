"""What a config's keys say about what is trained; config.py has the keys."""

import os

from ml_collections import ConfigDict

from cacheaug.augment import coprocessor
from cacheaug.errors import UserError


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


def validate_start(config: ConfigDict) -> None:
  """Refuses what nothing can begin as, and LoRAs on nothing.

  Raises:
    UserError: naming the key.
  """
  init = config.coprocessor.init
  if begins_as_trained(config) and not (
    os.sep in init or init.startswith("shipped:") or os.path.isdir(init)
  ):
    raise UserError(
      f"coprocessor.init={init!r} is not one of "
      f"{', '.join(coprocessor.INITS)}, nor the directory of a trained "
      "coprocessor"
    )
  rank, name = lora_rank(config), f"{config.objective}.lora_rank"
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
