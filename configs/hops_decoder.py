"""A small decoder that looks letters up, trained from scratch on `hops`.

  python -m cacheaug.main --config=configs/hops_decoder.py \
      --workdir=runs/hops_decoder --config.export=runs/hops_decoder/export

Each row is one random cycle of 6 to 10 of 26 letters and 16 questions, 1 to 4
lookups each; every token is learned. Gemma-2's architecture without soft caps,
bytes as tokens. Hardware, time and figures: RESULTS.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config(layers: str = "2") -> ConfigDict:
  """A decoder of so many layers: configs/hops_decoder.py:4."""
  c = configs.base()
  c.objective = "language_model"
  c.decoder.shape.update(
    vocab_size=260,
    width=64,
    layers=int(layers),
    heads=4,
    kv_heads=4,
    head_dim=16,
    mlp_width=256,
    max_positions=1024,
    window=1024,
    attention_softcap=0.0,
    final_softcap=0.0,
  )
  hops = source_defaults()
  hops.kind = "problems"
  hops.kinds = ("hops",)
  hops.size_min = 6
  hops.size_max = 10
  hops.questions = 16
  c.data.sources = ConfigDict({"hops": hops})
  c.data.tokenizer = "byte"
  c.data.sequence = 96
  c.data.batch = 32
  c.optimizer.steps = 8_000
  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.02
  c.optimizer.b2 = 0.99
  c.eval.sequences = 64
  c.eval.batch = 64
  c.eval.problems = 1024
  c.log_every = 100
  return c
