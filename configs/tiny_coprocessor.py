"""The coprocessor that ships in the package, for the shipped tiny decoder.

  python -m cacheaug.main --config=configs/tiny_coprocessor.py \
      --config.export=cacheaug/assets/tiny_coprocessor

Text: Python's standard library and generated problems, half and half. Points
near the end of a problem are drawn first (`traces.tail`): its answer is there.
Hardware, time and figures: docs/results/shipped.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.decoder.path = "shipped:tiny"
  c.coprocessor.latents = 4
  c.traces.count = 24
  c.traces.ahead = 8
  c.traces.tail = 4
  problems = source_defaults()
  problems.kind = "problems"
  # The decoder was trained on 1 to 4 steps and half-knows these.
  problems.steps_min = 4
  problems.steps_max = 6
  c.data.sources = ConfigDict({"code": source_defaults(), "problems": problems})
  c.data.sequence = 128
  c.data.batch = 8
  c.optimizer.steps = 12_000
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.0
  c.optimizer.b2 = 0.99
  c.log_every = 200
  c.checkpoint.every = 1_000
  c.eval.sequences = 1024
  c.eval.batch = 16
  c.eval.problems = 2048
  return c
