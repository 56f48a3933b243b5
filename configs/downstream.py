"""A LoRA on the coprocessor against a LoRA on the decoder, on one task.

  python -m cacheaug.main --config=configs/downstream.py:coprocessor \
      --workdir=runs/downstream_coprocessor
  python -m cacheaug.main --config=configs/downstream.py:decoder \
      --workdir=runs/downstream_decoder

The paper's figure (it gives no numbers) in small, on the pair that ships in the
package: generated problems of 6 to 8 steps, longer than decoder (1 to 4) or
coprocessor (4 to 6) were trained on. Both learn from answers alone, from the
same batches. `configs/downstream_gemma2b.py` is the paper's own setting.

Your own task: a file of {"question": ..., "answer": ...} lines, by
--config.data.sources.problems.kind=jsonl
--config.data.sources.problems.path=FILE
--config.data.sources.problems.field=question
--config.data.sources.problems.answer_field=answer --config.eval.problems=0.

Hardware, time and figures: docs/results/baselines.md.
"""

from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data.sources import source_defaults
from cacheaug.errors import UserError

ADAPTED = ("coprocessor", "decoder")


def get_config(adapted: str = "coprocessor") -> ConfigDict:
  """See the module docstring."""
  if adapted not in ADAPTED:
    raise UserError(f"{adapted!r} is not one of {', '.join(ADAPTED)}")
  c = configs.base()
  c.decoder.path = "shipped:tiny"
  c.coprocessor.latents = 4
  if adapted == "decoder":
    c.objective = "language_model"
    c.language_model.lora_rank = 8
  else:
    c.coprocessor.init = "shipped:tiny_coprocessor"
    c.coprocessor.lora_rank = 8
  # Answers have one or two digits and a line's end.
  c.traces.count = 8
  c.traces.ahead = 3
  problems = source_defaults()
  problems.kind = "problems"
  problems.steps_min = 6
  problems.steps_max = 8
  c.data.sources = ConfigDict({"problems": problems})
  c.data.answers_only = True
  c.data.sequence = 128  # as the decoder was trained
  c.data.batch = 16
  c.optimizer.steps = 2_000
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup = 100
  c.optimizer.final_fraction = 0.0
  c.optimizer.b2 = 0.99
  c.log_every = 100
  c.checkpoint.every = 500
  c.eval.sequences = 64
  c.eval.batch = 16
  c.eval.ahead = 3
  c.eval.problems = 2048
  # A random decoder is no other's.
  c.local.coprocessor.init = "decoder"
  c.local.data.sources = ConfigDict({"problems": problems})
  c.local.data.sequence = 128
  return c
