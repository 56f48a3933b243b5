"""The paper's objective on a small published decoder, at the size of a laptop.

  python -m cacheaug.main --config=configs/mixture.py:DIR \
      --config.decoder.path=FILE.gguf --workdir=runs/mixture

DIR holds JSON lines (NAME.jsonl or NAME.jsonl.gz, the text in `text`); each
file is a source, all with equal weight. Files called NAME.heldout.* are not
read: they stay for evaluation. NAME has no dot, and no two files have the same
one. The decoder is any that `decoder.path` takes.

N=8 latents, A=16 ahead tokens, M=16 points a sequence of 256 tokens. Seconds a
step with SmolLM2-135M and Gemma 3 270M on two CPU cores, and PyTorch's beside
them: docs/results/real_decoders.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults
from cacheaug.errors import UserError


def get_config(directory: str = "") -> ConfigDict:
  """See the module docstring; UserError: no such files, or their names."""
  c = configs.base()
  c.decoder.how_to_get = "give --config.decoder.path=NAME, DIR or FILE.gguf"
  c.coprocessor.latents = 8
  c.traces.ahead = 16
  c.traces.count = 16
  c.data.sequence = 256
  c.data.batch = 4
  c.data.validation_fraction = 0.01
  c.optimizer.steps = 50
  c.optimizer.warmup = 10
  c.log_every = 10
  c.checkpoint.every = 25
  c.eval.sequences = 32
  c.eval.ahead = 16
  c.data.sources = ConfigDict()
  found = Path(directory).expanduser().glob("*.jsonl*") if directory else ()
  for path in sorted(found):
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    if not path.is_file() or name.endswith(".heldout"):
      continue
    if "." in name or name in c.data.sources:
      raise UserError(
        f"configs/mixture.py: {path}: a source is called NAME.jsonl or "
        "NAME.jsonl.gz, NAME without a dot and once: rename the file"
      )
    if path.name.endswith((".jsonl", ".jsonl.gz")):
      source = source_defaults()
      source.kind = "jsonl"
      source.path = str(path)
      c.data.sources[name] = source
  if directory and not c.data.sources:
    raise UserError(
      f"configs/mixture.py:{directory} has no NAME.jsonl or NAME.jsonl.gz: "
      "give a directory of JSON lines"
    )
  if not directory:
    c.data.sources = c.local.data.sources
  return c
