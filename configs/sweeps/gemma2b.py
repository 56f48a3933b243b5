"""The paper's table 1, its ablations, and the baselines that it lacks.

  python -m cacheaug.sweep --config=configs/sweeps/gemma2b.py --plan_only \
      --workdir=/shared/DIR --config.decoder.path=/path/to/gemma-2-2b

prints the command of each run (configs/gemma2b.py says what machines that
wants); start them by launch/, and with all in DIR on one disk, --report_only in
place of --plan_only writes the report. Time: not measured; nobody has run it
with this code yet.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_MODEL = {"objective": "language_model", "language_model.loss": "traces"}


def get_config() -> ConfigDict:
  """What all rows have in common; N=32, where the paper's ablations are."""
  c = base_of(__file__, "../gemma2b.py")
  c.coprocessor.latents = 32
  c.eval.context = 64  # what the largest N needs
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  kinds = ("pause", "activations", "prefix", "handover")
  return Sweep(
    rows=(
      *(Row(f"N{n}", {"coprocessor.latents": n}) for n in (4, 8, 16, 32, 64)),
      # The paper varies A at N=16, where A=16 is the row N16.
      *(
        Row(f"A{a}", {"coprocessor.latents": 16, "traces.ahead": a})
        for a in (4, 8, 32)
      ),
      *(Row(kind, {"coprocessor.kind": kind}) for kind in kinds),
      *(Row(f"lora{r}", {"coprocessor.lora_rank": r}) for r in (64, 128)),
      Row("scratch", {"coprocessor.init": "scratch"}),
      Row("base_steps", _MODEL),
      Row("base_flop", _MODEL, flop_of="N32"),
      Row("base_lora128", {**_MODEL, "language_model.lora_rank": 128}),
    ),
    reference="pause",
    axis="coprocessor.latents",
  )
