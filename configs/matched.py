"""Baselines of another config's coprocessor, at equal cost, on its data.

  python -m cacheaug.main --config=configs/matched.py:BASELINE[,NAME]

NAME is of the config beside this file that trains a coprocessor
(tiny_coprocessor by default), BASELINE is of:

  continued        its decoder trained on, as many steps
  continued_flops  its decoder trained on, as many FLOP
  lora             a LoRA on its decoder, as many steps
  larger           one decoder with the parameters of both, from nothing

`python -m cacheaug.projects.sweep.equal_cost --config=configs/NAME.py` prints
what is matched. Runs that train the decoder on end with the same tables as the
coprocessor's, over the same tokens. By default they learn from every token;
--config.language_model.loss=traces has them learn from those that the
coprocessor's traces predict, as often. A learning rate that suits a coprocessor
need not suit them: try --config.optimizer.learning_rate. Where the config wants
the decoder's directory, so does this: --config.decoder.path=DIR, for `larger`
--config.data.tokenizer=DIR.

Hardware, time and figures: docs/results/baselines.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from cacheaug.errors import UserError
from cacheaug.projects.sweep import equal_cost

BASELINES = ("continued", "continued_flops", "lora", "larger")
RANK = 8


def get_config(which: str = "continued") -> ConfigDict:
  """See the module docstring."""
  baseline, _, name = which.partition(",")
  if baseline not in BASELINES:
    raise UserError(f"{baseline!r} is not one of {', '.join(BASELINES)}")
  path = Path(__file__).parent / f"{name or 'tiny_coprocessor'}.py"
  if not path.exists():
    raise UserError(f"{path}: no such config")
  config = runpy.run_path(str(path))["get_config"]()
  model_config = equal_cost.decoder_config(config)
  if baseline == "larger":
    return equal_cost.larger(config, model_config)
  if baseline == "continued_flops":
    return equal_cost.continued(config, model_config, "flops")
  config = equal_cost.continued(config, model_config)
  if baseline == "lora":
    config.language_model.lora_rank = RANK
  return config
