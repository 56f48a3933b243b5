"""Decoders that others publish, and the paper's experiment on each.

Shapes are those of the files on huggingface.co, which is how weights of
another model are refused; other tools plan by them without having any.
"""

from typing import Any

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults
from cacheaug.errors import UserError

# Repository, licence to accept there ('' = none), family, shape.
PUBLISHED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
  "gemma2_2b": (
    "google/gemma-2-2b",
    "Gemma's",
    "gemma2",
    dict(
      vocab_size=256_000,
      width=2304,
      layers=26,
      heads=8,
      kv_heads=4,
      head_dim=256,
      mlp_width=9216,
      max_positions=8192,
      window=4096,
    ),
  ),
  "gemma2_9b": (
    "google/gemma-2-9b",
    "Gemma's",
    "gemma2",
    dict(
      vocab_size=256_000,
      width=3584,
      layers=42,
      heads=16,
      kv_heads=8,
      head_dim=256,
      mlp_width=14_336,
      max_positions=8192,
      window=4096,
    ),
  ),
  "gemma3_1b": (
    "google/gemma-3-1b-pt",
    "Gemma's",
    "gemma3",
    dict(
      vocab_size=262_144,
      width=1152,
      layers=26,
      heads=4,
      kv_heads=1,
      head_dim=256,
      mlp_width=6912,
      max_positions=32_768,
      window=512,
    ),
  ),
  "gemma3_270m": (
    "google/gemma-3-270m",
    "Gemma's",
    "gemma3",
    dict(
      vocab_size=262_144,
      width=640,
      layers=18,
      heads=4,
      kv_heads=1,
      head_dim=256,
      mlp_width=2048,
      max_positions=32_768,
      window=512,
    ),
  ),
  "llama32_1b": (
    "meta-llama/Llama-3.2-1B",
    "Meta's",
    "llama",
    dict(
      vocab_size=128_256,
      width=2048,
      layers=16,
      heads=32,
      kv_heads=8,
      head_dim=64,
      mlp_width=8192,
      max_positions=131_072,
    ),
  ),
  "qwen3_06b": (
    "Qwen/Qwen3-0.6B-Base",
    "",
    "qwen3",
    dict(
      vocab_size=151_936,
      width=1024,
      layers=28,
      heads=16,
      kv_heads=8,
      head_dim=128,
      mlp_width=3072,
      max_positions=32_768,
    ),
  ),
  "smollm2_135m": (
    "HuggingFaceTB/SmolLM2-135M",
    "",
    "llama",
    dict(
      vocab_size=49_152,
      width=576,
      layers=30,
      heads=9,
      kv_heads=3,
      head_dim=64,
      mlp_width=1536,
      max_positions=8192,
      rope_base=100_000.0,
    ),
  ),
}


def how_to_get(name: str) -> str:
  """One line: where the weights are and what to do with them."""
  repository, licence, _, _ = _published(name)
  accept = (
    f"accept {licence} licence at huggingface.co/{repository} and run `hf auth "
    "login`, then "
  )
  return (
    f"{accept if licence else ''}give --config.decoder.path={repository}, "
    "which is downloaded, or the directory of a copy (`hf download "
    f"{repository} --local-dir=DIR`); without weights, try "
    "--config.runlocal=True"
  )


def experiment(name: str) -> ConfigDict:
  """The paper's set-up on a published decoder, one directory short of running.

  N=16, A=16, sequences of 2048 tokens of C4; what fits a machine (batch, M,
  mesh) is left to the config file.

  Raises:
    UserError: an unknown name.
  """
  _, _, family, shape = _published(name)
  c = configs.base()
  c.decoder.how_to_get = how_to_get(name)
  c.decoder.family = family
  c.decoder.shape.update(shape)
  c.coprocessor.latents = 16
  c.traces.ahead = 16
  text = source_defaults()
  text.kind = "tfds"
  text.path = "huggingface:allenai__c4/en"
  c.data.sources = ConfigDict({"c4": text})
  c.data.validation_fraction = 0.001
  c.data.sequence = 2048
  c.precision.compute = "bfloat16"
  c.precision.decoder = "bfloat16"
  c.remat = "full"
  if family == "gemma3":
    c.local.decoder.shape.layers = 6  # the last is its pattern's global one
  return c


def _published(name: str) -> tuple[str, str, str, dict[str, Any]]:
  if name not in PUBLISHED:
    raise UserError(f"decoder {name!r} is not one of {', '.join(PUBLISHED)}")
  return PUBLISHED[name]
