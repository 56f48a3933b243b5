"""The shape that the training step is measured at on a CPU; nothing to learn.

  python -m cacheaug.benchmark --config=configs/benchmark.py --gradients

Two CPU cores, under two minutes; figures: docs/results/speed.md. Random weights
and tokens, so no data is read.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs


def get_config() -> ConfigDict:
  """One sequence of 512 tokens with 32 traces, a decoder of 4 layers."""
  c = configs.base()
  c.decoder.family = "gemma2"
  c.decoder.shape.update(
    vocab_size=8192,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp_width=1024,
    max_positions=8192,
    window=4096,
  )
  c.coprocessor.latents = 16
  c.traces.count = 32
  c.traces.ahead = 16
  c.data.sources = configs.base().local.data.sources
  c.data.tokenizer = "byte"
  c.data.sequence = 512
  c.data.batch = 1
  return c
