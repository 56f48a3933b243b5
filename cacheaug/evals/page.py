"""The report page of an evaluation: tables, plots, and how to read them.

Everything is made in memory and appears at once: `contents` gives the files,
`write` puts them in place.
"""

import csv
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, latent_stats, report
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.evals.diagnose import Diagnosis
from cacheaug.evals.latent_stats import Moments
from cacheaug.evals.report import PositionRow, Section, markdown_table
from cacheaug.run import files as storage

_MEANING = {
  latent_stats.RIGHT: "as trained",
  latent_stats.ZEROED: "the coprocessor's contribution is 0: z = copied "
  "embedding",
  latent_stats.NOTHING: "z = 0",
  latent_stats.SHUFFLED: "contribution of another trace of the same document",
  latent_stats.SWAPPED: "contribution of a trace of another document",
  latent_stats.MEAN: "mean contribution of the slot over this text",
}


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """What was measured on one text.

  Attributes:
    tables: N -> sums of the frozen and the augmented decoder, all over the
      same tokens.
    diagnosis: of the trained N; None where none was asked for.
  """

  tables: Mapping[int, DocumentSums]
  diagnosis: Diagnosis | None


def contents(
  by_source: Mapping[str, Evaluated],
  *,
  meta: Mapping[str, Any],
  seed: int,
  show: Callable[[int], str],
  sections: Sequence[Section] = (),
) -> dict[str, bytes]:
  """The report's files, report.md last.

  Args:
    by_source: text -> figures; may be empty where there are sections.
    meta: what was run, in the order to show.
    seed: of the intervals' resampling.
    show: a token's id as readable text.
    sections: of other evaluators, in order.
  """
  rows: dict[str, Any] = {}
  for name, found in by_source.items():
    rows[name] = {"table": {}, "interventions": {}, "against right": {}}
    for n, sums in found.tables.items():
      rows[name]["table"][n] = report.make_rows(sums, seed=seed)
    if not found.diagnosis:
      continue
    sums = found.diagnosis.sums
    for column in sums.nll:
      if column != bootstrap.FROZEN:
        kw = dict(seed=seed, column=column)
        rows[name]["interventions"][column] = report.make_rows(sums, **kw)
        rows[name]["against right"][column] = report.make_rows(
          sums, base=latent_stats.RIGHT, **kw
        )
  files: dict[str, bytes] = {}
  for section in sections:
    files |= section.files
  if by_source:
    files |= _tables(by_source, rows)
  parts = ["# Evaluation", "## What was run"]
  parts.append(markdown_table(("", "value"), list(meta.items())))
  for name, found in by_source.items():
    parts += _perplexity(name, rows[name]["table"], files)
    if found.diagnosis:
      parts += _interventions(name, rows[name], found.diagnosis, files)
      parts += _geometry(name, found.diagnosis)
      parts += _attention(name, found.diagnosis, files)
      parts += _nearest(name, found.diagnosis, show)
  if by_source:
    parts.append(
      "documents.csv holds the sums that tables and intervals are made of: "
      "with `cacheaug.evals.bootstrap.compare` two evaluations of the same "
      "tokens are compared directly."
    )
  for section in sections:
    parts += section.parts
  figures = {"meta": dict(meta), "sources": _figures(by_source, rows)}
  files["figures.json"] = (json.dumps(figures, indent=1) + "\n").encode()
  files["report.md"] = ("\n\n".join(parts) + "\n").encode()
  return files


def _tables(by_source, rows) -> dict[str, bytes]:
  """Files of table 1."""
  files = {"perplexity.csv": _csv(rows)}
  sizes = next(iter(by_source.values())).tables
  for n in sizes:
    name = "documents.csv" if n == max(sizes) else f"documents_n{n}.csv"
    files[name] = bootstrap.to_csv(
      {source: found.tables[n] for source, found in by_source.items()}
    )
  return files


def _change(row: PositionRow) -> str:
  return f"{row.change_percent:+.2f}% ({report.interval(row.low, row.high)})"


def _perplexity(name, tables, files) -> list[str]:
  """Table 1 of one text."""
  first = next(iter(tables.values()))
  header = ["token after latents", "frozen nll"]
  header += [f"N={n}" for n in tables] + ["tokens", "documents"]
  lines = [
    [row.position, f"{row.frozen_nll:.4f}"]
    + [_change(some[i]) for some in tables.values()]
    + [row.tokens, row.documents]
    for i, row in enumerate(first)
  ]
  file = f"perplexity_{name}.png"
  named = {f"N={n}": some for n, some in tables.items()}
  files[file] = _lines(named, f"{name}: latents after every token")
  return [
    f"## {name}: perplexity by position",
    markdown_table(header, lines),
    "Change of perplexity against the frozen decoder, in percent, with its 95 "
    "% interval over documents; latents stand after every token that has the "
    "context, and all columns are over the same tokens. Below zero the latents "
    "help; an interval that holds zero says that they may do nothing.",
    f"![Perplexity by position]({file})",
  ]


def _interventions(name, rows, diagnosis, files) -> list[str]:
  """Perplexity with other latents, against frozen and against right ones."""
  tables = rows["interventions"]
  positions = [row.position for row in next(iter(tables.values()))]
  header = ["latents", "meaning", *(f"token {p}" for p in positions)]

  def table(which):
    return markdown_table(
      header,
      [
        [column, _MEANING[column], *(_change(row) for row in some)]
        for column, some in which.items()
      ],
    )

  against = {
    k: v for k, v in rows["against right"].items() if k != latent_stats.RIGHT
  }
  file = f"interventions_{name}.png"
  # z = 0 is far above all others and would flatten them.
  shown = {k: v for k, v in tables.items() if k != latent_stats.NOTHING}
  files[file] = _lines(shown, f"{name}: other latents in the same places")
  parts = [
    f"## {name}: other latents in the same places",
    "Against the frozen decoder:",
    table(tables),
    "Against the right latents:",
    table(against),
    "If shuffled or swapped latents do as well as right ones, what is in a "
    "latent does not depend on its context; if their mean does as well, a "
    "constant would do. Zeroed is the frozen decoder, to rounding, where the "
    "start is harmless and positions are 'replace'.",
    *_verdicts(diagnosis.sums, rows["against right"]),
  ]
  parts += [f"Left out: {k}, since {v}." for k, v in diagnosis.left_out.items()]
  return [*parts, f"![Other latents in the same places]({file})"]


def _verdicts(sums: DocumentSums, against) -> list[str]:
  """What the tables say, in words; a worse row has its interval above zero."""
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
    apart = sums.nll[latent_stats.ZEROED] - sums.nll[bootstrap.FROZEN]
    mean = np.abs(apart.sum(0) / np.maximum(sums.tokens.sum(0), 1)).max()
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


def _lines(tables: Mapping[str, Sequence[PositionRow]], title: str) -> bytes:
  """PNG: change against position, a line and a band a table."""
  figure = report.make_figure(7, 4)
  axes = figure.add_subplot()
  axes.axhline(0.0, color="0.4", linewidth=1.0, label="frozen decoder")
  for i, (name, rows) in enumerate(tables.items()):
    x, color = [r.position for r in rows], f"C{i}"
    low, high = [r.low for r in rows], [r.high for r in rows]
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    changes = [r.change_percent for r in rows]
    axes.plot(x, changes, "o-", color=color, label=name)
  report.label_positions(axes, x, title)
  return report.to_png(figure)


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


# --- files ------------------------------------------------------------------


def _csv(rows: Mapping[str, Any]) -> bytes:
  """Every table's rows."""
  out = io.StringIO()
  fields = [f.name for f in dataclasses.fields(PositionRow)]
  names = ["source", "table", "latents", *fields]
  writer = csv.DictWriter(out, names, lineterminator="\n")
  writer.writeheader()
  for source, kinds in rows.items():
    for kind, tables in kinds.items():
      for latents, some in tables.items():
        key = {"source": source, "table": kind, "latents": latents}
        writer.writerows(key | dataclasses.asdict(row) for row in some)
  return out.getvalue().encode()


def _figures(by_source, rows) -> dict[str, Any]:
  """Everything on the page, for programs; NaN as null."""
  out = {}
  for name, found in by_source.items():
    figures: dict[str, Any] = {
      kind: {
        str(k): [dataclasses.asdict(r) for r in some] for k, some in t.items()
      }
      for kind, t in rows[name].items()
    }
    if found.diagnosis:
      figures["geometry"] = {
        k: _moments(v) for k, v in _vectors(found.diagnosis).items()
      }
      mass = found.diagnosis.mass
      figures["attention"] = {k: v.tolist() for k, v in mass.items()}
      figures["nearest"] = dataclasses.asdict(found.diagnosis.nearest)
    out[name] = _without_nan(figures)
  return out


def _without_nan(x: Any) -> Any:
  if isinstance(x, dict):
    return {k: _without_nan(v) for k, v in x.items()}
  if isinstance(x, list):
    return [_without_nan(v) for v in x]
  return None if isinstance(x, float) and math.isnan(x) else x


def check_out(out: str) -> epath.Path:
  """Where to write; nothing may be there yet.

  Raises:
    UserError: there is something.
  """
  path = epath.Path(out).expanduser()
  if path.exists():
    raise UserError(
      f"--out={out} exists: give another directory, or move this one away"
    )
  return path


def write(path: epath.Path, files: Mapping[str, bytes]) -> epath.Path:
  """Writes all files or none; returns the page's path.

  Raises:
    UserError: no space, no permission, or `path` has come to be meanwhile.
  """
  remote = storage.is_remote(path)
  # Object storage cannot rename a directory: there the page, which refers to
  # the others, comes last.
  place = path if remote else path.with_name(f".{path.name}.tmp")
  try:
    if not remote:
      shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    place.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      storage.write_whole(place / name, data)
    if not remote:
      place.rename(path)
  except OSError as e:
    if not remote:
      shutil.rmtree(place, ignore_errors=True)
    raise UserError(
      f"--out={path} cannot be written ({e.strerror or e}): free space or give "
      "another"
    ) from e
  return path / "report.md"
