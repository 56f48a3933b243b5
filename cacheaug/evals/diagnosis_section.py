"""The diagnostics of one text as a section of a report."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from cacheaug.evals import bootstrap, latent_stats, report
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.evals.diagnose import Diagnosis
from cacheaug.evals.latent_stats import Moments
from cacheaug.evals.report import PositionRow, Section, markdown_table

_MEANING = {
  latent_stats.RIGHT: "as trained",
  latent_stats.ZEROED: "the coprocessor's contribution is 0: z = copied "
  "embedding",
  latent_stats.NOTHING: "z = 0",
  latent_stats.SHUFFLED: "contribution of another trace of the same document",
  latent_stats.SWAPPED: "contribution of a trace of another document",
  latent_stats.MEAN: "mean contribution of the slot over this text",
}


def section(
  name: str, diagnosis: Diagnosis, *, seed: int, show: Callable[[int], str]
) -> Section:
  """Interventions, geometry, attention and nearest tokens.

  Args:
    name: of the text.
    diagnosis: of `diagnose.diagnose`.
    seed: of the intervals' resampling.
    show: a token's id as readable text.
  """
  tables: dict[str, list[PositionRow]] = {}
  against: dict[str, list[PositionRow]] = {}
  for column in diagnosis.sums.nll:
    if column != bootstrap.FROZEN:
      options = dict(seed=seed, column=column)
      tables[column] = report.make_rows(diagnosis.sums, **options)
      against[column] = report.make_rows(
        diagnosis.sums, base=latent_stats.RIGHT, **options
      )
  files: dict[str, bytes] = {}
  parts = _interventions(name, tables, against, diagnosis, files)
  parts += _geometry(name, diagnosis)
  parts += _attention(name, diagnosis, files)
  parts += _nearest(name, diagnosis, show)
  kinds = {"interventions": tables, "against right": against}
  figures: dict[str, Any] = report.figures_of(kinds)
  figures["geometry"] = {k: _moments(v) for k, v in _vectors(diagnosis).items()}
  figures["attention"] = {k: v.tolist() for k, v in diagnosis.mass.items()}
  figures["nearest"] = dataclasses.asdict(diagnosis.nearest)
  return Section(
    parts,
    files,
    lines={report.PERPLEXITY_CSV: report.csv_lines(name, kinds)},
    figures={name: figures},
  )


def _interventions(name, tables, against, diagnosis, files) -> list[str]:
  """Perplexity with other latents, against frozen and against right ones."""
  positions = [row.position for row in next(iter(tables.values()))]
  header = ["latents", "meaning", *(f"token {p}" for p in positions)]

  def table(which):
    return markdown_table(
      header,
      [
        [column, _MEANING[column], *(report.change(row) for row in some)]
        for column, some in which.items()
      ],
    )

  others = {k: v for k, v in against.items() if k != latent_stats.RIGHT}
  file = f"interventions_{name}.png"
  # z = 0 is far above all others and would flatten them.
  shown = {k: v for k, v in tables.items() if k != latent_stats.NOTHING}
  files[file] = report.lines_figure(
    shown, f"{name}: other latents in the same places"
  )
  parts = [
    f"## {name}: other latents in the same places",
    "Against the frozen decoder:",
    table(tables),
    "Against the right latents:",
    table(others),
    "If shuffled or swapped latents do as well as right ones, what is in a "
    "latent does not depend on its context; if their mean does as well, a "
    "constant would do. Zeroed is the frozen decoder, to rounding, where the "
    "start is harmless and positions are 'replace'.",
    *_verdicts(diagnosis.sums, against),
  ]
  parts += [f"Left out: {k}, since {v}." for k, v in diagnosis.left_out.items()]
  return [*parts, f"![Other latents in the same places]({file})"]


def _verdicts(sums: DocumentSums, against) -> list[str]:
  """The tables in words; a worse row has its interval above zero."""
  lines = []
  for column in (
    latent_stats.SHUFFLED,
    latent_stats.SWAPPED,
    latent_stats.MEAN,
  ):
    if column not in against:
      continue
    rows = against[column]
    worse = [str(r.position) for r in rows if r.low > 0]
    better = [str(r.position) for r in rows if r.high < 0]
    others = len(rows) - len(worse) - len(better)
    text = (
      f"- {column}: worse than right at tokens {', '.join(worse) or 'none'}"
    )
    if better:
      text += f", better at {', '.join(better)}"
    lines.append(text + f"; no difference shown at {others} of {len(rows)}")
  if latent_stats.ZEROED in sums.nll:
    change = sums.nll[latent_stats.ZEROED] - sums.nll[bootstrap.FROZEN]
    mean = np.abs(change.sum(0) / np.maximum(sums.tokens.sum(0), 1)).max()
    lines.append(
      f"- zeroed: at most {mean:.1g} nats from the frozen decoder, in the mean "
      "of any position"
    )
  return ["\n".join(lines)]


def _geometry(name, diagnosis) -> list[str]:
  """Effective ranks and overlaps."""
  header = (
    "vectors",
    "norm",
    "effective rank",
    "about the slot's mean",
    "cosine between traces",
    "cosine between slots",
  )
  lines = [
    [label, *(f"{x:.3g}" for x in _moments(some).values())]
    for label, some in _vectors(diagnosis).items()
  ]
  width = diagnosis.z.sums.shape[1]
  return [
    f"## {name}: geometry of the latents",
    markdown_table(header, lines),
    f"Effective rank (Roy and Vetterli 2007, exp of the entropy of the "
    f"normalised singular values) of all latents as rows, from 1 (one shared "
    f"direction) to {width} (the width); the cosines are means over pairs, 1 "
    "where all say the same.",
  ]


def _vectors(diagnosis: Diagnosis) -> dict[str, Moments]:
  found = {"latent z": diagnosis.z, "contribution": diagnosis.contribution}
  if diagnosis.copied is not None:
    found["copied embedding"] = diagnosis.copied
  return found


def _moments(some: Moments) -> dict[str, float]:
  return {
    "norm": some.rms,
    "effective rank": some.effective_rank(),
    "centred effective rank": some.effective_rank(centred=True),
    "overlap of traces": some.overlap_of_traces(),
    "overlap of slots": some.overlap_of_slots(),
  }


def _attention(name, diagnosis, files) -> list[str]:
  """Attention that the ahead tokens give to latents."""
  if not diagnosis.mass:
    return []
  mass = {k: v[..., :-2].sum(-1) for k, v in diagnosis.mass.items()}
  right = mass[latent_stats.RIGHT]
  rows = [j for j in (1, 2, 4, 8, 16, 32, 64) if j <= right.shape[1]]
  header = ["layer", *(f"token {j}" for j in rows)]
  lines = [
    [layer, *(_shares(mass, layer, j - 1) for j in rows)]
    for layer in range(right.shape[0])
  ]
  file = f"attention_{name}.png"
  files[file] = _heat(right, f"{name}: attention mass on latents")
  second = (
    "; in brackets what it gives to the same places with zeroed latents"
    if len(mass) > 1
    else ""
  )
  return [
    f"## {name}: attention to latents",
    markdown_table(header, lines),
    "Share of attention, mean over heads and traces, that the frozen decoder's "
    f"row of each ahead token gives to all latents together{second}. What "
    "remains goes to the context and to the ahead tokens themselves.",
    f"![Attention mass on latents]({file})",
  ]


def _shares(mass, layer, j):
  text = f"{mass[latent_stats.RIGHT][layer, j]:.3f}"
  if latent_stats.ZEROED in mass:
    text += f" ({mass[latent_stats.ZEROED][layer, j]:.3f})"
  return text


def _nearest(name, diagnosis, show) -> list[str]:
  """Nearest tokens of the mean latents, and of a few traces."""
  found = diagnosis.nearest

  def words(ids):
    return " ".join(show(i) for i in ids)

  lines = [
    [
      slot + 1,
      words(found.lens[slot]),
      words(found.embedding[slot]),
      words(found.contribution[slot]),
      f"{100 * found.itself[slot]:.0f}%",
      f"{100 * found.foretold[slot]:.0f}%",
      f"{100 * found.foretold_before[slot]:.0f}%",
    ]
    for slot in range(len(found.lens))
  ]
  header = (
    "latent",
    "mean z, logit lens",
    "mean z, embeddings",
    "mean contribution, embeddings",
    "nearest is the token there",
    "lens says the next token",
    "copied embedding alone",
  )
  parts = [
    f"## {name}: nearest tokens",
    markdown_table(header, lines),
    "Logit lens: the decoder's final norm and head applied to z. Embeddings: "
    "input embeddings with the largest cosine. The shares are over "
    f"{found.traces} traces: how often a latent's nearest embedding is the "
    "context token in whose place it stands, and how often its logit lens "
    "names the token that follows.",
  ]
  for example in found.examples:
    text = words(example["context"]), words(example["following"])
    parts.append(f"After {text[0]}, before {text[1]}:")
    parts.append(
      markdown_table(
        ("latent", "in place of", "logit lens", "embeddings"),
        [
          [i + 1, show(token), words(lens), words(near)]
          for i, (token, lens, near) in enumerate(
            zip(
              example["copied"],
              example["lens"],
              example["embedding"],
              strict=True,
            )
          )
        ],
      )
    )
  return parts


def _heat(mass: np.ndarray, title: str) -> bytes:
  """PNG: layer by ahead token."""
  figure = report.make_figure(7, 1.5 + 0.3 * mass.shape[0])
  axes = figure.add_subplot()
  image = axes.imshow(
    mass,
    aspect="auto",
    vmin=0.0,
    origin="lower",
    interpolation="nearest",
    extent=(0.5, mass.shape[1] + 0.5, -0.5, mass.shape[0] - 0.5),
  )
  figure.colorbar(image, label="share of attention")
  axes.set_xlabel("ahead token")
  axes.set_ylabel("layer")
  axes.set_yticks(range(0, mass.shape[0], max(1, mass.shape[0] // 12)))
  axes.set_title(title)
  return report.to_png(figure)
