"""The paper's set-up: a coprocessor for the frozen Gemma-2 2B (pretrained).

  python -m cacheaug.main --config=configs/gemma2b.py --workdir=runs/gemma2b \
      --config.decoder.path=/path/to/gemma-2-2b

Anywhere, in under a minute, through the same code (a tiny random Gemma-2, the
source of Python's standard library as text, 20 steps):

  python -m cacheaug.main --config=configs/gemma2b.py --config.runlocal=True

Weights: accept Gemma's licence at huggingface.co/google/gemma-2-2b, then
`hf download google/gemma-2-2b --local-dir=DIR`; Kaggle has the
same files (google/gemma-2, transformers, gemma-2-2b).

Text: the paper's is Gemma-2's own pretraining mixture, which is not public.
This is C4's English part (ODC-BY, about 800 GB of text), by way of
tensorflow-datasets. Prepare it once where every host can read it, with
`pip install datasets` besides:

  python -c "import tensorflow_datasets as tfds; tfds.builder( \
      'huggingface:allenai__c4/en', data_dir='DATA', \
      file_format='array_record').download_and_prepare()"

and give --config.data.sources.c4.path=DATA/allenai__c4/en/VERSION. A part of it
will do for shorter runs: --config.data.sources.c4.split='train[:10%]'. Its
tokens are packed at first use to data.cache_dir, 4 bytes a token.

Hardware: meant for 256 TPU v5e or similar; devices x optimizer.accumulation =
1024 puts one sequence on a device at a time. mesh.fsdp must divide the number
of devices: on 8 give --config.mesh.fsdp=8 --config.optimizer.accumulation=128.
By shapes, 7.9 GiB of a v5e's 15.75, of which 4 are an estimate (`python -m
cacheaug.plan --config=configs/gemma2b.py --topology=v5e:16x16 --nocompile`;
v6e:16x16 alike; v5p:4x4x8 with --config.optimizer.accumulation=8).
Time: not measured. Neither are figures: nobody has run this configuration of
ours to its end yet.

N: --config.coprocessor.latents=4, 8, 16 (here), 32 or 64. The paper does not
state positions or start; the defaults are base()'s, the literal reading is
--config.coprocessor.positions=insert --config.coprocessor.start=as_is.

Expected, from the paper's table 1 (perplexity against the frozen decoder, %):

  token after the latents     1      2      4      8     16     32
  N=8                     -1.53  -1.67  -1.39  -1.22  -0.85  -0.55
  N=16                    -2.48  -2.41  -1.98  -1.56  -1.08  -0.64
  N=32                    -3.28  -3.15  -2.66  -2.11  -1.50  -0.88
  N=64                    -3.94  -3.70  -3.17  -2.61  -1.88  -1.20
"""

from ml_collections import ConfigDict

from cacheaug.weights import published


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = published.experiment("gemma2_2b")
  c.traces.count = 128
  c.data.batch = 1024
  c.optimizer.steps = 100_000
  c.optimizer.accumulation = 4
  c.mesh.fsdp = 16
  c.eval.sequences = 512
  c.eval.batch = 16
  return c
