"""What latents add to a frozen decoder of two layers: serial depth.

  python -m cacheaug.sweep --config=configs/sweeps/hops.py

configs/quickstart.py and what it is compared with, the same problems for all.
`base_steps` and `base_flop` are the decoder itself trained on, for as many
steps and for as many FLOP as N4. Figures: docs/results/depth.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_SEEDS = (0, 1, 2)
_MODEL = {"objective": "language_model"}


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c = base_of(__file__, "../quickstart.py")
  c.eval.beside = ConfigDict()
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  return Sweep(
    rows=(
      Row("N4", {}, _SEEDS),
      Row("pause", {"coprocessor.kind": "pause"}),
      Row("base_steps", _MODEL, _SEEDS),
      Row("handover", {"coprocessor.kind": "handover"}),
      Row("rounds2", {"traces.rounds": 2}),
      Row("base_flop", _MODEL, flop_of="N4"),
      Row("N1", {"coprocessor.latents": 1}),
      Row("N8", {"coprocessor.latents": 8}),
      Row("prefix", {"coprocessor.kind": "prefix"}),
      Row("scratch", {"coprocessor.init": "scratch"}),
    ),
    reference="pause",
    axis="coprocessor.latents",
  )
