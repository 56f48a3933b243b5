r"""A context thrown away: what stands in for it, beside the last tokens.

  python -m cacheaug.sweep --config=configs/sweeps/window.py \
      --config.decoder.path=DIR --config.data.sources.stories.path=stories.txt
  python benchmarks/window.py --config=configs/sweeps/window.py \
      --runs=runs/sweeps/window \
      --config.decoder.path=DIR --config.data.sources.stories.path=stories.txt

TinyStories-656K (configs/tinystories656k.py says where weights and text are).
At a point all of the context but its last W = 32 tokens goes, and N = 16
latents, which have read all of it, stand beside those. The teacher is the
frozen decoder with the whole context. `latents_in_place` has the same number of
entries another way: a window of W + N tokens, the last N of which the latents
replace; it begins as that window. The second command makes the table, with
what needs no training. Figures: docs/results/window.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_SEEDS = (0, 1, 2)
_BIAS = {"coprocessor.kv_bias": True}
# Of kinds with a hundredth of a coprocessor's parameters or less.
_FASTER = {"optimizer.learning_rate": 1e-2}


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c = base_of(__file__, "../tinystories656k.py")
  c.coprocessor.latents = 16
  c.coprocessor.positions = "overlay"
  c.traces.window = 32
  c.traces.ahead = 32
  c.traces.count = 32
  c.teacher.weight = 10.0
  c.data.sequence = 512
  c.data.batch = 4
  c.data.validation_fraction = 0.1
  c.optimizer.steps = 250
  c.optimizer.warmup = 25
  c.log_every = 50
  c.checkpoint.every = 100
  c.eval.sequences = 16
  c.eval.batch = 8
  c.eval.context = 96  # twice W + N: something is gone at every point
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  in_place = {"coprocessor.positions": "replace", "traces.window": 48}
  handover = {"coprocessor.kind": "handover", **_BIAS}
  return Sweep(
    rows=(
      Row("latents", {}, _SEEDS),
      Row("pause", {"coprocessor.kind": "pause", **_FASTER}),
      Row("prefix", {"coprocessor.kind": "prefix", **_BIAS, **_FASTER}),
      Row("handover", handover, _SEEDS),
      Row("latents_in_place", in_place),
      Row("handover_in_place", {**handover, **in_place}),
      Row("latents_no_teacher", {"teacher.weight": 0.0}),
    ),
    reference="pause",
  )
