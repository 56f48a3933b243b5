"""Latents that carry a published decoder along chains of references in words.

  python -m cacheaug.main --config=configs/chains.py \
      --config.decoder.path=FILE.gguf --workdir=runs/chains

Eight lines such as "B = K", "K = apple", shuffled, chains that nobody asks for
among them, then four questions: "B is" -> " apple". A question is k = 1 to 4
lines long. Held-out facts; exact match by k for the frozen decoder and with
latents. Step supervision: --config.data.results=True
--config.supervision.weight=1. The frozen decoder's figures:
docs/results/real_decoders.md; no coprocessor has been trained on it yet.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.decoder.how_to_get = "give --config.decoder.path=NAME, DIR or FILE.gguf"
  c.coprocessor.latents = 4
  # A point before each answer; its one word is predicted.
  c.traces.count = 4
  c.traces.ahead = 1
  chains = source_defaults()
  chains.kind = "problems"
  chains.kinds = ("chains",)
  chains.questions = 4
  c.data.sources = ConfigDict({"chains": chains})
  c.data.answers_only = True
  c.data.sequence = 64
  c.data.batch = 8
  c.optimizer.steps = 600
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup = 50
  c.optimizer.final_fraction = 0.05
  c.log_every = 10
  c.checkpoint.every = 200
  c.eval.sequences = 64
  c.eval.batch = 16
  c.eval.ahead = 1
  c.eval.problems = 512
  c.local.traces.count = 4
  return c
