"""Latents that let a frozen decoder take a second step, in minutes on a laptop.

  python -m cacheaug.main --config=configs/quickstart.py

The shipped decoder of two layers looks one letter up in a cycle ("1b"); it was
never asked to look up twice ("2b"), and has no layer for it. This trains a
coprocessor for it on questions of two lookups and compares the two, and pause
tokens, on cycles that none of them has seen. Two CPU cores are enough; time and
figures: docs/results/depth.md. The same for text: configs/quickstart_text.py.
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
  hops.steps_min = 2
  hops.steps_max = 2
  hops.questions = 4
  c.data.sources = ConfigDict({"hops": hops})
  c.data.answers_only = True
  c.data.sequence = 41
  c.data.batch = 32
  c.optimizer.steps = 1_000
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
