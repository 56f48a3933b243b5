"""Perplexity against one letter at a time, for the shipped tiny decoder.

  python -m cacheaug.sweep --config=configs/sweeps/scaling.py:latents

latents (N), ahead (A), traces (M), steps, or decoder. For the last one,
decoders of three sizes are trained first:

  python -m cacheaug.sweep --config=configs/sweeps/scaling.py:decoders
  python -m cacheaug.sweep --config=configs/sweeps/scaling.py:decoder

Started from the same directory: the first writes runs/sweeps/decoders/, where
the second reads. Each row is trained for as many steps as in
configs/sweeps/tiny.py (but for `steps`); rows.csv has what each cost. Hardware:
a laptop, about half an hour on a core each, by configs/sweeps/tiny.py's times.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_AXES = {
  "latents": ("coprocessor.latents", (1, 2, 4, 8, 16, 32)),
  "ahead": ("traces.ahead", (1, 2, 4, 8, 16)),
  "traces": ("traces.count", (3, 6, 12, 24, 48)),
  "steps": ("optimizer.steps", (250, 500, 1_000, 2_000, 4_000)),
}
_WIDTHS = (32, 64, 96)
_DECODERS = "runs/sweeps/decoders"


def get_config(letter: str) -> ConfigDict:
  """What all rows have in common."""
  if letter == "decoders":
    c = base_of(__file__, "../tiny_decoder.py")
    c.optimizer.steps = 3_000
    return c
  c = base_of(__file__, "tiny.py")
  c.eval.context = 32 if letter == "latents" else 16
  return c


def get_sweep(letter: str) -> Sweep:
  """See the module docstring."""
  if letter == "decoders":
    return Sweep(rows=tuple(_decoder(width) for width in _WIDTHS))
  if letter == "decoder":
    key, values = "decoder.path", [f"{_DECODERS}/{w}" for w in _WIDTHS]
    names = [f"D{width}" for width in _WIDTHS]
  else:
    key, values = _AXES[letter]
    names = [f"{letter}{value}" for value in values]
  return Sweep(
    rows=tuple(
      Row(name, {key: value}) for name, value in zip(names, values, strict=True)
    ),
    axis=key,
  )


def _decoder(width: int) -> Row:
  shape = {
    "width": width,
    "mlp_width": 4 * width,
    "heads": width // 32,
  }
  changes = {f"decoder.shape.{key}": value for key, value in shape.items()}
  return Row(f"D{width}", {**changes, "export": f"{_DECODERS}/{width}"})
