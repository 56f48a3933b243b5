"""As many lookups as there are rounds of latents, and one more.

  python -m cacheaug.main --config=configs/reach.py:3 --workdir=runs/reach3

`reach.py:K` trains a coprocessor for questions of K lookups, 2 to 7 in these
cycles of 8 letters: K - 1 rounds of one latent at one point, each round on top
of those before it, so K - 1 passes of the coprocessor and of the frozen decoder
in series. `reach.py:K,R` has R rounds. Each round's latent is taught the result
of its step (supervision). The decoder is the quickstart's, two layers that look
one letter up. 39 s (K=2) to 195 s (K=5) of one core; figures:
docs/results/depth.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from cacheaug.errors import UserError
from cacheaug.projects.sweep.rows import base_of


def get_config(which: str = "3") -> ConfigDict:
  """See the module docstring; UserError: K or R is no number that serves."""
  lookups, _, rounds = which.partition(",")
  rounds = rounds or str(int(lookups) - 1 if lookups.isdecimal() else 0)
  if not lookups.isdecimal() or not rounds.isdecimal() or int(rounds) < 1:
    raise UserError(
      f"configs/{Path(__file__).name}:{which}: give K lookups, 2 or more, or "
      "K,R with R rounds, 1 or more"
    )
  c = base_of(__file__, "quickstart.py")
  c.eval.beside = ConfigDict()
  c.coprocessor.latents = 1
  c.traces.rounds = int(rounds)
  c.data.sources.hops.steps_min = int(lookups)
  c.data.sources.hops.steps_max = int(lookups)
  c.data.results = True
  c.supervision.weight = 1.0
  c.supervision.at = "coprocessor"
  c.optimizer.steps = 1000 * max(int(lookups) - 1, 1)
  return c
