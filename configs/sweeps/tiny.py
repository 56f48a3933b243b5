"""Latents against every baseline, for the shipped tiny decoder, on a laptop.

  python -m cacheaug.sweep --config=configs/sweeps/tiny.py --workers=2

configs/tiny_coprocessor.py on its problems alone (4 to 6 steps, the decoder was
trained on 1 to 4), all rows for the same number of steps, fewer than its own,
so that the whole takes about 100 minutes of a laptop's core. Rows of several
seeds are the main ones. `base_flop` is the decoder trained on for the FLOP that
N8's training takes; `base_steps` for as many steps. Figures:
docs/results/baselines.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_SEEDS = (0, 1, 2)
# Over the same tokens, each as often as the rows with latents train on it.
_MODEL = {"objective": "language_model", "language_model.loss": "traces"}


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c = base_of(__file__, "../tiny_coprocessor.py")
  c.data.sources.code.weight = 0.0
  c.coprocessor.latents = 8
  c.optimizer.steps = 1_000
  c.optimizer.warmup = 100
  c.log_every = 100
  c.checkpoint.every = 500
  c.eval.sequences = 256
  c.eval.batch = 16
  c.eval.context = 16  # what the largest N needs
  c.eval.problems = 1024
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  handover = {"coprocessor.kind": "handover"}
  return Sweep(
    rows=(
      *(
        Row(f"N{n}", {"coprocessor.latents": n}, _SEEDS) for n in (2, 4, 8, 16)
      ),
      Row("pause", {"coprocessor.kind": "pause"}, _SEEDS),
      Row("prefix", {"coprocessor.kind": "prefix"}),
      Row("handover", handover, _SEEDS),
      Row("activations", {"coprocessor.kind": "activations"}),
      Row("lora8", {"coprocessor.lora_rank": 8}),
      Row("scratch", {"coprocessor.init": "scratch"}),
      Row("base_steps", _MODEL),
      Row("base_flop", _MODEL, flop_of="N8"),
      Row("base_lora8", {**_MODEL, "language_model.lora_rank": 8}),
    ),
    reference="pause",
    axis="coprocessor.latents",
  )
