"""LoRA on the coprocessor against LoRA on Gemma-2 2B, on GSM8K and MATH.

  python -m cacheaug.main --config=configs/downstream_gemma2b.py:coprocessor \
      --workdir=runs/downstream_coprocessor \
      --config.decoder.path=/path/to/gemma-2-2b \
      --config.coprocessor.init=runs/gemma2b \
      --config.data.sources.gsm8k.path=gsm8k/train.jsonl \
      --config.data.sources.math.path=math/train.jsonl
  python -m cacheaug.main --config=configs/downstream_gemma2b.py:decoder ...

with the same flags but --config.coprocessor.init. The files are of a JSON
object a line: {"question", "answer"} as openai/grade-school-math has them,
{"problem", "solution"} as hendrycks/math. --config.data.sources.math.weight=0
leaves one out. One GPU of 80 GB; not measured: the paper shows a figure only,
rank 128 for both, and says nothing of steps or learning rates.
"""

from ml_collections import ConfigDict

from cacheaug.data.sources import source_defaults
from cacheaug.errors import UserError
from cacheaug.weights import published

ADAPTED = ("coprocessor", "decoder")


def get_config(adapted: str = "coprocessor") -> ConfigDict:
  """See the module docstring."""
  if adapted not in ADAPTED:
    raise UserError(f"{adapted!r} is not one of {', '.join(ADAPTED)}")
  c = published.experiment("gemma2_2b")
  if adapted == "decoder":
    c.objective = "language_model"
    c.language_model.lora_rank = 128
  else:
    c.coprocessor.init = "runs/gemma2b"  # of configs/gemma2b.py
    c.coprocessor.lora_rank = 128
  c.lora.alpha = 128.0
  gsm8k, math = source_defaults(), source_defaults()
  for source in (gsm8k, math):
    source.kind = "jsonl"
    source.prompt = "Question: {}\nAnswer: "
  gsm8k.field, gsm8k.answer_field = "question", "answer"
  math.field, math.answer_field = "problem", "solution"
  c.data.sources = ConfigDict({"gsm8k": gsm8k, "math": math})
  c.data.answers_only = True
  c.data.validation_fraction = 0.05
  c.data.sequence = 1024
  c.data.batch = 32
  c.traces.count = 32
  c.optimizer.steps = 2_000
  c.optimizer.warmup = 100
  c.optimizer.accumulation = 8
  c.log_every = 20
  c.checkpoint.every = 200
  c.eval.batch = 4
  # A tiny random decoder, for which rank 128 is too large, is no other's.
  c.local.coprocessor.init = "decoder"
  c.local.coprocessor.lora_rank = 8
  c.local.data.answers_only = False
  return c
