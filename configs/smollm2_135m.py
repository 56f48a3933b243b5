"""A coprocessor for the frozen SmolLM2-135M, on one GPU of 24 GB.

  python -m cacheaug.main --config=configs/smollm2_135m.py \
      --workdir=runs/smollm2_135m --config.decoder.path=/path/to/SmolLM2-135M

Anywhere, in under a minute, through the same code: --config.runlocal=True.

Weights: no licence to accept (Apache-2.0):
`hf download HuggingFaceTB/SmolLM2-135M --local-dir=DIR`.
A .gguf file of the same model serves as well (--config.decoder.path=FILE.gguf);
quantised weights are expanded to precision.decoder when they are read.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware, by `python -m cacheaug.plan --config=configs/smollm2_135m.py
--topology=T --nocompile` (arithmetic, nothing of it is measured):

  T            overrides                              GiB on a device   of
  h100:1                                                     4.7      74.5
  h100:1       optimizer.accumulation=1                     19.8      74.5
  rtx4090:1    (any card of 24 GB)                           4.7      22.4
  rtx4090:1    traces.count=128 optimizer.accumulation=64    3.0      22.4
  v5e:2x4                                                    2.8      15.8
  v5e:2x4      optimizer.accumulation=1 mesh.fsdp=8
               traces.count=128                              4.3      15.8

A step is 187 useful TFLOP: 0.5 s on an H100 and 0.3 s on v5e:2x4, if they reach
40 % of their peak, which is assumed.
Time: not measured. Figures: not measured.
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("smollm2_135m")
  c.traces.count = 64
  c.data.batch = 64
  c.optimizer.steps = 50_000
  c.optimizer.accumulation = 8
  c.eval.batch = 4
  return c
