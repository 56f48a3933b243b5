"""Plots of a sweep: change against position, and against one swept key."""

import dataclasses
from collections.abc import Sequence

from cacheaug.errors import UserError
from cacheaug.evals import report
from cacheaug.projects.sweep.comparison import Place, Result
from cacheaug.projects.sweep.rows import Built, keys
from cacheaug.run import workdir

DECODER = "decoder.path"


@dataclasses.dataclass(frozen=True)
class Curve:
  """Rows that differ in the axis alone.

  Attributes:
    label: what the curve's rows change beside it.
    points: (x, row), ascending, two or more.
  """

  label: str
  points: tuple[tuple[float, Result], ...]


def find(results: Sequence[Result], axis: str) -> list[Curve]:
  """All curves along `axis`; none where no two rows differ in it alone.

  Raises:
    UserError: values that are no numbers.
  """
  groups: dict[str, dict[float, Result]] = {}
  for r in results:
    if r.cells:
      rest = {
        k: v
        for k, v in keys(r.built.config).items()
        if k not in (axis, "seed") and not k.startswith(workdir.FREE_KEYS)
      }
      groups.setdefault(repr(rest), {})[_x(r.built, axis)] = r
  return [
    Curve(_label(some.values(), axis), tuple(sorted(some.items())))
    for some in groups.values()
    if len(some) > 1
  ]


def _x(built: Built, axis: str) -> float:
  if axis == DECODER:
    return built.frozen
  value = keys(built.config)[axis]
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise UserError(
      f"axis={axis!r}: {value!r} is no number; only {DECODER}, for the "
      "decoder's parameters, may be a name"
    )
  return value


def _label(results, axis: str) -> str:
  changes = next(iter(results)).built.row.overrides
  text = " ".join(f"{k}={v}" for k, v in changes.items() if k != axis)
  return text or "base"


def draw_positions(results: Sequence[Result], places: Sequence[Place]) -> bytes:
  """PNG: change against position, a line a row, a panel a source."""
  sources = list(dict.fromkeys(source for source, _ in places))
  figure, panels = _panels(len(sources))
  for axes, source in zip(panels, sources, strict=True):
    positions = [j for s, j in places if s == source]
    for i, r in enumerate(r for r in results if r.cells):
      cells = [(j, r.cells[source, j].against_frozen) for j in positions]
      _line(axes, cells, r.name, i)
    _dress(axes, positions, "token after the latents", source)
  return report.to_png(figure)


def draw_scaling(
  curves: Sequence[Curve], axis: str, places: Sequence[Place]
) -> bytes:
  """PNG: change against the axis, a line a position, a panel each."""
  sources = list(dict.fromkeys(source for source, _ in places))
  pairs = [(curve, source) for source in sources for curve in curves]
  figure, panels = _panels(len(pairs))
  name = "parameters of the decoder" if axis == DECODER else axis
  for axes, (curve, source) in zip(panels, pairs, strict=True):
    for i, j in enumerate(j for s, j in places if s == source):
      cells = [(x, r.cells[source, j].against_frozen) for x, r in curve.points]
      _line(axes, cells, f"token {j}", i)
    title = f"{source}, {curve.label}"
    _dress(axes, [x for x, _ in curve.points], name, title)
  return report.to_png(figure)


def _panels(count: int):
  figure = report.make_figure(8, 4.5 * count, dpi=120)
  return figure, figure.subplots(count, 1, squeeze=False)[:, 0]


def _line(axes, cells, label: str, number: int) -> None:
  """Changes with their intervals as bars."""
  changes = [c.change for _, c in cells]
  low = [c.change - c.low for _, c in cells]
  high = [c.high - c.change for _, c in cells]
  axes.errorbar(
    [x for x, _ in cells],
    changes,
    yerr=[low, high],
    fmt="o-" if number < 10 else "s--",
    color=f"C{number % 10}",
    markersize=3,
    linewidth=1,
    elinewidth=0.8,
    capsize=2,
    label=label,
  )


def _dress(axes, ticks, name: str, title: str) -> None:
  axes.axhline(0.0, color="0.4", linewidth=1.0)
  if min(ticks) > 0:
    axes.set_xscale("log", base=2)
  axes.set_xticks(ticks, [f"{x:g}" if x < 1e5 else f"{x:.3g}" for x in ticks])
  axes.minorticks_off()
  axes.set_xlabel(name)
  axes.set_ylabel("perplexity change (%), 95 % intervals")
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
