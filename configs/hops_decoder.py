"""A small decoder that looks one letter up, trained from scratch on `hops`.

  python -m cacheaug.main --config=configs/hops_decoder.py \
      --workdir=runs/hops_decoder --config.export=runs/hops_decoder/export

Each row is one random cycle of 5 to 8 of 26 letters and 16 questions that ask
for one lookup. The answers alone are learned: facts are random, and so is what
is asked. `hops_decoder.py:4,all` is a decoder of four layers that is asked for
1 to 4 lookups in one row of three. Gemma-2's architecture without soft caps,
bytes as tokens. Hardware, time and figures: docs/results/depth.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config(which: str = "2") -> ConfigDict:
  """A decoder of so many layers; 'LAYERS,all' is asked for 1 to 4 lookups."""
  layers, _, asked = which.partition(",")
  c = configs.base()
  c.objective = "language_model"
  c.decoder.shape.update(
    vocab_size=260,
    width=48,
    layers=int(layers),
    heads=3,
    kv_heads=3,
    head_dim=16,
    mlp_width=96,
    max_positions=1024,
    window=1024,
    attention_softcap=0.0,
    final_softcap=0.0,
  )
  hops, once = source_defaults(), source_defaults()
  for source in (hops, once):
    source.kind = "problems"
    source.kinds = ("hops",)
    source.size_min = 5
    source.size_max = 8
    source.questions = 16
  once.steps_max = 1
  once.weight = 2.0
  hops.weight = 1.0 if asked == "all" else 0.0
  c.data.sources = ConfigDict({"hops": hops, "once": once})
  c.data.answers_only = True
  c.data.tokenizer = "byte"
  c.data.sequence = 89
  c.data.batch = 32
  c.optimizer.steps = 3_000 if asked else 1_500
  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.02
  c.optimizer.b2 = 0.95
  c.eval.sequences = 64
  c.eval.batch = 64
  c.eval.problems = 1024
  c.log_every = 100
  return c
