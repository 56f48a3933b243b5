"""A coprocessor for a pretrained story teller of 656,000 parameters.

  python -m cacheaug.main --config=configs/tinystories656k.py \
      --workdir=runs/tinystories656k --config.decoder.path=DIR \
      --config.data.sources.stories.path=stories.txt

Any machine will do: the decoder (raincandy-u/TinyStories-656K, Apache-2.0, a
Llama of 2 layers, 128 wide, 2,048 tokens) was trained by others, and it is the
smallest whose sentences make sense.

Weights:
`hf download raincandy-u/TinyStories-656K --local-dir=DIR`.
Text: a file of TinyStories, a line <|endoftext|> between stories, as
roneneldan/TinyStories has it; a megabyte (1,000 stories) is read several times.

Hardware: one CPU core, about seven minutes. Figures: docs/results/baselines.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults


def get_config() -> ConfigDict:
  """See the module docstring."""
  c = configs.base()
  c.decoder.how_to_get = (
    "give the directory of TinyStories-656K: run `hf download "
    "raincandy-u/TinyStories-656K --local-dir=DIR`, then "
    "--config.decoder.path=DIR; without weights, try --config.runlocal=True"
  )
  c.decoder.family = "llama"
  c.decoder.shape.update(
    vocab_size=2048,
    width=128,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=16,
    mlp_width=384,
    max_positions=512,
  )
  c.coprocessor.latents = 4
  c.traces.count = 16
  c.traces.ahead = 8
  stories = source_defaults()
  stories.kind = "text"
  stories.separator = "<|endoftext|>"
  c.data.sources = ConfigDict({"stories": stories})
  c.data.sequence = 128
  c.data.batch = 8
  c.optimizer.steps = 3_000
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup = 200
  c.optimizer.final_fraction = 0.0
  c.optimizer.b2 = 0.99
  c.log_every = 100
  c.checkpoint.every = 1_000
  c.eval.sequences = 256
  c.eval.batch = 16
  return c
