"""A coprocessor for the frozen SmolLM2-135M, on one GPU of 24 GB.

  python -m cacheaug.main --config=configs/smollm2_135m.py \
      --workdir=runs/smollm2_135m --config.decoder.path=/path/to/SmolLM2-135M

Anywhere, in under a minute, through the same code: --config.runlocal=True.

Weights: no licence to accept (Apache-2.0):
`huggingface-cli download HuggingFaceTB/SmolLM2-135M --local-dir=DIR`.
A .gguf file of the same model serves as well (--config.decoder.path=FILE.gguf);
quantised weights are expanded to precision.decoder when they are read.

Text: C4's English part, prepared once as configs/gemma2b.py says, then
--config.data.sources.c4.path=DATA/allenai__c4/en/VERSION; or your own files:
--config.data.sources.c4.kind=text --config.data.sources.c4.path=DIR.

Hardware, by `python -m cacheaug.plan` (nothing of it is measured):

@TABLE@
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
