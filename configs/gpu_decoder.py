"""A decoder of 48M parameters for one GPU, trained from scratch on bytes.

  python -m cacheaug.main --config=configs/gpu_decoder.py \
      --workdir=runs/gpu_decoder --config.export=runs/gpu_decoder/export

What configs/sweeps/gpu.py trains coprocessors for. Gemma-2's architecture
without soft caps. Text: Python's standard library, which every machine has;
better a larger one of your own, see cacheaug/data/sources.py. Meant for minutes
on one 80 GB GPU; not measured.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.objective = "language_model"
  c.decoder.shape.update(
    width=512,
    layers=12,
    heads=8,
    kv_heads=4,
    head_dim=64,
    mlp_width=2048,
    vocab_size=260,
    max_positions=1024,
    window=256,
    attention_softcap=0.0,
    final_softcap=0.0,
  )
  c.data.sources = ConfigDict({"code": source_defaults()})
  c.data.tokenizer = "byte"
  c.data.sequence = 512
  c.data.batch = 128
  c.optimizer.steps = 3_000
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup = 200
  c.optimizer.weight_decay = 0.1
  c.eval.sequences = 512
  c.eval.batch = 64
  return c
