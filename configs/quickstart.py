"""A coprocessor for the shipped nano decoder: five minutes on a laptop.

  python -m cacheaug.main --config=configs/quickstart.py

Text: Python's standard library, on every machine. Time and figures: RESULTS.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.decoder.path = "shipped:nano"
  c.coprocessor.latents = 2
  c.traces.count = 32
  c.traces.ahead = 4
  c.data.sources = ConfigDict({"code": source_defaults()})
  c.data.sequence = 64
  c.data.batch = 8
  c.optimizer.steps = 25_000
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.0
  c.optimizer.b2 = 0.99
  c.log_every = 500
  c.checkpoint.every = 5_000
  c.eval.sequences = 1024
  c.eval.batch = 32
  return c
