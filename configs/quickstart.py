"""Latents that let a frozen decoder look further, in minutes on a laptop.

  python -m cacheaug.main --config=configs/quickstart.py

The shipped decoder of two layers looks one letter up in a cycle ("1b") and is
at chance where it has to go on from there ("2b", "3b", "4b"). This trains a
coprocessor for it and compares both, and pause tokens, on cycles that none of
them has seen. Two CPU cores are enough; time and figures:
docs/results/depth.md. The same for text: configs/quickstart_text.py.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.decoder.path = "shipped:hops"
  c.coprocessor.latents = 4
  # A point before each of the four answers; its one letter is predicted.
  c.traces.count = 4
  c.traces.ahead = 1
  hops = source_defaults()
  hops.kind = "problems"
  hops.kinds = ("hops",)
  hops.questions = 4
  c.data.sources = ConfigDict({"hops": hops})
  c.data.answers_only = True
  c.data.sequence = 41
  c.data.batch = 32
  c.optimizer.steps = 3_000
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup = 100
  c.optimizer.final_fraction = 0.02
  c.optimizer.b2 = 0.95
  c.log_every = 100
  c.checkpoint.every = 500
  c.eval.sequences = 64
  c.eval.batch = 32
  c.eval.ahead = 2
  c.eval.problems = 1_024
  c.eval.beside = ConfigDict({"pause tokens": "shipped:hops_pause"})
  return c
