"""A coprocessor for the frozen Gemma-2 9B, on eight devices of 80 GB.

  python -m cacheaug.main --config=configs/gemma2_9b.py \
      --workdir=runs/gemma2_9b --config.decoder.path=/path/to/gemma-2-9b

Anywhere, in under a minute, through the same code: --config.runlocal=True.

Weights: accept Gemma's licence at huggingface.co/google/gemma-2-9b, then
`hf download google/gemma-2-9b --local-dir=DIR`.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware: eight GPUs (or TPU v5p chips) of 80 GB or more, parameters split over
them by mesh.fsdp=8. By arithmetic, per device (nothing of it is measured):

  frozen decoder, bfloat16         9.24e9 x 2 / 8                     2.3 GB
  coprocessor, float32 with Adam's two moments and gradient
                                   8.32e9 x 16 / 8                   16.6 GB
  a second gradient, summed over micro-batches      8.32e9 x 4 / 8    4.2 GB
  one sequence                     128 x (16 + 31) = 6,016 rows:
    layers' inputs kept (remat)    6,016 x 3584 x 42 x 2              1.8 GB
    cache                          42 x 2 x 2048 x 8 x 256 x 2        0.7 GB
    scores of one layer            16 x 3,968 x 2,079 x 4, about 5x   2.6 GB
    logits and a layer's weights, gathered                            2.0 GB
                                                                --------------
                                                               about 30 GB

The batch is the paper's, 1024 sequences; optimizer.accumulation x mesh.fsdp =
1024 puts one on a device at once. 128 TPU v5p: --config.mesh.fsdp=16
--config.optimizer.accumulation=8, 19.7 GiB of 95.73 by shapes (`python -m
cacheaug.plan`, which see; 5.8 of them estimated). 256 TPU v5e:
--config.mesh.fsdp=32 --config.optimizer.accumulation=4. Time: not measured. The
paper's figures for 9B: GSM8K 64.7 -> 69.4, MMLU 71.3 -> 74.5; ours: not
measured.
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("gemma2_9b")
  c.traces.count = 128
  c.data.batch = 1024
  c.optimizer.steps = 100_000
  c.optimizer.accumulation = 128
  c.mesh.fsdp = 8
  c.eval.batch = 8
  return c
