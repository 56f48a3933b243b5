"""A coprocessor for the frozen Llama-3.2 1B, on one GPU of 80 GB.

  python -m cacheaug.main --config=configs/llama32_1b.py \
      --workdir=runs/llama32_1b --config.decoder.path=/path/to/Llama-3.2-1B

Anywhere, in under a minute, through the same code: --config.runlocal=True.

Weights: accept Meta's licence at huggingface.co/meta-llama/Llama-3.2-1B, then
`hf download meta-llama/Llama-3.2-1B --local-dir=DIR`.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware: one GPU of 80 GB, by arithmetic (nothing of it is measured):

  frozen decoder, bfloat16         1.24e9 x 2 bytes                   2.5 GB
  coprocessor, float32 with Adam's two moments and gradient
                                   0.98e9 x 16 bytes                 15.6 GB
  a second gradient, summed over micro-batches      0.98e9 x 4        3.9 GB
  per sequence of a micro-batch    64 x (16 + 31) = 3,008 rows:
    layers' inputs kept (remat)    3,008 x 2048 x 16 x 2              0.2 GB
    cache                          16 x 2 x 2048 x 8 x 64 x 2         0.1 GB
    scores of one layer            32 x 1,984 x 2,079 x 4, about 5x   2.6 GB
  8 sequences at once, and 1 GB of logits                              24 GB
                                                                --------------
                                                               about 46 GB

A GPU of 40 GB: --config.traces.count=16, or optimizer.accumulation=64 (one
sequence at once). A TPU v5e slice of 16: --config.mesh.fsdp=16
--config.data.batch=128. Time: not measured. Figures: not measured.
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("llama32_1b")
  c.traces.count = 64
  c.data.batch = 64
  c.optimizer.steps = 50_000
  c.optimizer.accumulation = 8
  c.eval.batch = 4
  return c
