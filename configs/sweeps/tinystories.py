"""Latents against every baseline, for a pretrained decoder that others made.

  python -m cacheaug.sweep --config=configs/sweeps/tinystories.py --workers=2 \
      --config.decoder.path=DIR --config.data.sources.stories.path=stories.txt

configs/tinystories656k.py (which says where weights and text are) with twice
its ahead tokens, all rows trained for the same number of steps, fewer than its
own. Rows as in configs/sweeps/tiny.py. Figures: docs/results/baselines.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_SEEDS = (0, 1, 2)
_MODEL = {"objective": "language_model", "language_model.loss": "traces"}


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c = base_of(__file__, "../tinystories656k.py")
  c.coprocessor.latents = 8
  c.traces.ahead = 16
  c.optimizer.steps = 1_000
  c.optimizer.warmup = 100
  c.eval.context = 16  # what the largest N needs
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  kinds = ("prefix", "handover", "activations")
  return Sweep(
    rows=(
      Row("N8", {"coprocessor.latents": 8}, _SEEDS),
      *(Row(f"N{n}", {"coprocessor.latents": n}) for n in (2, 4, 16)),
      Row("pause", {"coprocessor.kind": "pause"}, _SEEDS),
      *(Row(kind, {"coprocessor.kind": kind}) for kind in kinds),
      Row("lora8", {"coprocessor.lora_rank": 8}),
      Row("scratch", {"coprocessor.init": "scratch"}),
      Row("base_steps", _MODEL),
      Row("base_flop", _MODEL, flop_of="N8"),
      Row("base_lora8", {**_MODEL, "language_model.lora_rank": 8}),
    ),
    reference="pause",
    axis="coprocessor.latents",
  )
