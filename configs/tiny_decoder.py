"""The small decoders that ship in the package, trained from scratch.

  python -m cacheaug.main --config=configs/tiny_decoder.py \
      --workdir=runs/tiny_decoder --config.export=cacheaug/assets/tiny
  python -m cacheaug.main --config=configs/tiny_decoder.py:nano \
      --workdir=runs/nano_decoder --config.export=cacheaug/assets/nano

Hardware, time, loss curves and exact match: docs/results/shipped.md.
Gemma-2's architecture without soft caps (half a step's time at this size goes
into element-wise work), bytes as tokens; Python's standard library and
generated problems as text.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults

SHAPES = {
  "nano": dict(
    width=48, layers=1, heads=3, kv_heads=1, head_dim=16, mlp_width=192
  ),
  "tiny": dict(
    width=64, layers=3, heads=2, kv_heads=1, head_dim=32, mlp_width=256
  ),
}


def get_config(name: str = "tiny") -> ConfigDict:
  """A decoder of SHAPES, by name."""
  c = configs.base()
  c.objective = "language_model"
  c.decoder.shape.update(
    SHAPES[name],
    vocab_size=260,
    max_positions=1024,
    window=64,
    attention_softcap=0.0,
    final_softcap=0.0,
  )
  code = source_defaults()
  problems = source_defaults()
  problems.kind = "problems"
  c.data.sources = ConfigDict({"code": code})
  if name == "tiny":
    c.data.sources.problems = problems
    c.eval.problems = 1024
  c.data.tokenizer = "byte"
  c.data.sequence = {"nano": 64, "tiny": 128}[name]
  c.data.batch = {"nano": 64, "tiny": 32}[name]
  c.optimizer.steps = {"nano": 9_000, "tiny": 9_000}[name]
  c.optimizer.learning_rate = {"nano": 6e-3, "tiny": 4e-3}[name]
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.02
  c.optimizer.weight_decay = 0.01
  c.optimizer.b2 = 0.99
  c.eval.sequences = 1024
  c.eval.batch = 64
  c.log_every = 100
  return c
