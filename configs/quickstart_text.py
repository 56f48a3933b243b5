"""A coprocessor for the shipped nano decoder on text, in minutes on a laptop.

  python -m cacheaug.main --config=configs/quickstart_text.py

Text: Python's standard library, which is on every machine. Two CPU cores are
enough; time and figures, with what other choices gave: docs/results/text.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.decoder.path = "shipped:nano"
  # Few latents, few ahead tokens and many cheap steps: what the first tokens
  # gain in minutes. More of either gains later (docs/results/text.md).
  c.coprocessor.latents = 1
  c.traces.ahead = 2
  c.traces.count = 48
  c.data.sources = ConfigDict({"code": source_defaults()})
  c.data.sequence = 64
  c.data.batch = 16
  c.optimizer.steps = 20_000
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.0
  c.optimizer.b2 = 0.99
  c.log_every = 500
  c.checkpoint.every = 5_000
  c.eval.sequences = 2048
  c.eval.batch = 32
  return c
