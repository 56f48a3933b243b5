"""What latents add to a frozen decoder of two layers: serial depth.

  python -m cacheaug.sweep --config=configs/sweeps/hops.py

configs/quickstart.py and what it is compared with, the same problems for all.
`base_steps` is the decoder itself trained on, for as many steps, which takes
1.3 times the FLOP of N4. Figures: docs/results/depth.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c = base_of(__file__, "../quickstart.py")
  c.eval.beside = ConfigDict()
  c.eval.context = 8  # of the largest N, so that all rows are of one text
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  return Sweep(
    rows=(
      Row("N4", {}, _SEEDS),
      Row("base_steps", {"objective": "language_model"}, _SEEDS),
      Row("pause", {"coprocessor.kind": "pause"}),
      Row("handover", {"coprocessor.kind": "handover"}),
      Row("prefix", {"coprocessor.kind": "prefix"}),
      Row("scratch", {"coprocessor.init": "scratch"}),
      Row("N1", {"coprocessor.latents": 1}),
      Row("N8", {"coprocessor.latents": 8}),
    ),
    reference="pause",
    axis="coprocessor.latents",
  )
