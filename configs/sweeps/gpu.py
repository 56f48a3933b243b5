"""The paper's table 1 with its N, and pause tokens, on one GPU.

  python -m cacheaug.sweep --config=configs/sweeps/gpu.py \
      --config.decoder.path=runs/gpu_decoder/export

for the decoder of configs/gpu_decoder.py (train that first). Meant for tens of
minutes on one 80 GB GPU; not measured.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.projects.sweep.rows import Row, Sweep, base_of


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c, trained = configs.base(), base_of(__file__, "../gpu_decoder.py")
  c.decoder.shape = trained.decoder.shape
  c.data.sources = trained.data.sources
  c.data.sequence = trained.data.sequence
  c.decoder.how_to_get = (
    "train it by `python -m cacheaug.main --config=configs/gpu_decoder.py "
    "--workdir=runs/gpu_decoder --config.export=runs/gpu_decoder/export`, then "
    "--config.decoder.path=runs/gpu_decoder/export"
  )
  c.coprocessor.latents = 32
  c.traces.count = 32
  c.data.batch = 32
  c.optimizer.steps = 3_000
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup = 200
  c.checkpoint.every = 500
  c.eval.context = 64  # what the largest N needs
  c.eval.batch = 16
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  sizes = (4, 8, 16, 32, 64)
  return Sweep(
    rows=(
      *(Row(f"N{n}", {"coprocessor.latents": n}) for n in sizes),
      Row("pause", {"coprocessor.kind": "pause"}),
    ),
    reference="pause",
    axis="coprocessor.latents",
  )
