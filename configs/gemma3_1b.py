"""A coprocessor for the frozen Gemma-3 1B (pretrained), on one GPU of 40 GB.

  python -m cacheaug.main --config=configs/gemma3_1b.py \
      --workdir=runs/gemma3_1b --config.decoder.path=/path/to/gemma-3-1b-pt

Anywhere, in under a minute, through the same code: --config.runlocal=True.

Weights: accept Gemma's licence at huggingface.co/google/gemma-3-1b-pt, then
`hf download google/gemma-3-1b-pt --local-dir=DIR`.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware: one GPU of 40 GB, by arithmetic (nothing of it is measured):

  frozen decoder, bfloat16         1.00e9 x 2 bytes                   2.0 GB
  coprocessor, float32 with Adam's two moments and gradient
                                   0.70e9 x 16 bytes                 11.2 GB
  a second gradient, summed over micro-batches      0.70e9 x 4        2.8 GB
  per sequence of a micro-batch    64 x (16 + 31) = 3,008 rows:
    layers' inputs kept (remat)    3,008 x 1152 x 26 x 2              0.2 GB
    cache                          26 x 2 x 2048 x 1 x 256 x 2        0.1 GB
    scores of one layer            4 x 1,984 x 2,079 x 4, about 5x    0.3 GB
  8 sequences at once, and 1 GB of logits                               6 GB
                                                                --------------
                                                               about 22 GB

By `python -m cacheaug.plan --topology=T --nocompile`, GiB on a device:

  T            overrides                              GiB on a device   of
  h100:1                                                    22.0      74.5
  h100:1       optimizer.accumulation=1                     58.7      74.5
  rtx4090:1    optimizer.accumulation=64                    17.1      22.4
  v5e:2x4      (does not fit)                               17.1      15.8
  v5e:2x4      mesh.fsdp=8                                   4.7      15.8
  v5e:2x4      mesh.fsdp=8 optimizer.accumulation=1          9.3      15.8

As it is it fills a card of 24 GB to the last (22.0 GiB): give the accumulation.
Several devices: --config.mesh.data=-1 (the default) splits the batch; on a TPU
v5e slice of 16 give --config.mesh.fsdp=16 --config.data.batch=128.
Time: not measured. Figures: not measured.
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("gemma3_1b")
  c.traces.count = 64
  c.data.batch = 64
  c.optimizer.steps = 50_000
  c.optimizer.accumulation = 8
  c.eval.batch = 4
  return c
