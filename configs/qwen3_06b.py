"""A coprocessor for the frozen Qwen3 0.6B (base), on one GPU of 24 GB.

  python -m cacheaug.main --config=configs/qwen3_06b.py \
      --workdir=runs/qwen3_06b --config.decoder.path=/path/to/Qwen3-0.6B-Base

Anywhere, in under a minute, through the same code: --config.runlocal=True.

Weights: no licence to accept (Apache-2.0):
`hf download Qwen/Qwen3-0.6B-Base --local-dir=DIR`.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware: one GPU of 24 GB, by arithmetic (nothing of it is measured):

  frozen decoder, bfloat16         0.60e9 x 2 bytes                   1.2 GB
  coprocessor, float32 with Adam's two moments and gradient
                                   0.44e9 x 16 bytes                  7.1 GB
  a second gradient, summed over micro-batches      0.44e9 x 4        1.8 GB
  per sequence of a micro-batch    32 x (16 + 31) = 1,504 rows:
    layers' inputs kept (remat)    1,504 x 1024 x 28 x 2              0.1 GB
    cache                          28 x 2 x 2048 x 8 x 128 x 2        0.2 GB
    scores of one layer            16 x 992 x 2,079 x 4, about 5x     0.7 GB
  8 sequences at once, and 1 GB of logits                               9 GB
                                                                --------------
                                                               about 19 GB

Less memory: optimizer.accumulation=64 (one sequence at once). More at once, on
a GPU of 80 GB: --config.traces.count=128. A TPU v5e slice of 16:
--config.mesh.fsdp=16 --config.data.batch=128. Time: not measured. Figures: not
measured; Coda-Forno et al. (arXiv 2510.00494) study this decoder.
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("qwen3_06b")
  c.traces.count = 32
  c.data.batch = 64
  c.optimizer.steps = 50_000
  c.optimizer.accumulation = 8
  c.eval.batch = 4
  return c
