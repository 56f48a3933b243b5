"""A coprocessor for the frozen Gemma-2 2B, on one GPU of 80 GB.

  python -m cacheaug.main --config=configs/gemma2_2b.py \
      --workdir=runs/gemma2_2b --config.decoder.path=/path/to/gemma-2-2b

Anywhere, in under a minute, through the same code: --config.runlocal=True.
The paper's own batch, for a TPU slice, is configs/gemma2b.py; what is smaller
here is the step: 64 sequences x 64 traces, a 32nd of the paper's.

Weights: accept Gemma's licence at huggingface.co/google/gemma-2-2b, then
`hf download google/gemma-2-2b --local-dir=DIR`.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware: one GPU of 80 GB, by arithmetic (nothing of it is measured):

  frozen decoder, bfloat16         2.61e9 x 2 bytes                   5.2 GB
  coprocessor, float32 with Adam's two moments and gradient
                                   2.03e9 x 16 bytes                 32.5 GB
  a second gradient, summed over micro-batches      2.03e9 x 4        8.1 GB
  per sequence of a micro-batch    64 x (16 + 31) = 3,008 rows:
    layers' inputs kept (remat)    3,008 x 2304 x 26 x 2              0.4 GB
    cache                          26 x 2 x 2048 x 4 x 256 x 2        0.2 GB
    scores of one layer            8 x 1,984 x 2,079 x 4, about 5x    0.7 GB
  8 sequences at once, and 1 GB of logits                              11 GB
                                                                --------------
                                                               about 57 GB

Less memory: --config.traces.count=32, or optimizer.accumulation=64 (one
sequence at once). Several GPUs: --config.mesh.fsdp=8 splits the first three
rows by 8. A TPU v5e slice of 16: --config.mesh.fsdp=16 with
--config.data.batch=128, which puts one sequence on each chip at once.
Time: not measured. Figures: not measured.
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("gemma2_2b")
  c.traces.count = 64
  c.data.batch = 64
  c.optimizer.steps = 50_000
  c.optimizer.accumulation = 8
  c.eval.batch = 4
  return c
