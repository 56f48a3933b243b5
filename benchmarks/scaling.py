"""What a training step costs as M, N and S grow: a table and a plot.

  python benchmarks/scaling.py [--config=configs/benchmark.py]
      [--letters=MNS] [--plot=FILE.png]

One of the three at a time, the others as the config has them; every point is
measured by cacheaug.benchmark, structured against cached_dense.
"""

import argparse
import dataclasses
import json
import runpy

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cacheaug import benchmark
from cacheaug import config as configs

SWEEPS = {
  "M": ("traces.count", (8, 16, 32, 64, 128)),
  "N": ("coprocessor.latents", (4, 8, 16, 32, 64)),
  "S": ("data.sequence", (256, 512, 1024, 2048)),
}
VARIANTS = ("structured", "cached_dense")


def sweep(path: str, letter: str, repeats: int) -> list[dict]:
  """A row for each value of one letter."""
  key, values = SWEEPS[letter]
  rows = []
  for value in values:
    config = runpy.run_path(path)["get_config"]()
    config.update_from_flattened_dict({key: value})
    config = configs.resolve(config)
    found = benchmark.measure(config, VARIANTS, repeats=repeats)
    rows.append(
      {"letter": letter, "value": value}
      | {row.variant: dataclasses.asdict(row) for row in found}
    )
    ours, dense = found
    print(
      f"{letter} {value:5d}  {1e3 * ours.seconds:8.1f} ms "
      f"{ours.temporary_bytes / 1e6:8.1f} MB   cached_dense "
      f"{1e3 * dense.seconds:8.1f} ms {dense.temporary_bytes / 1e6:8.1f} MB"
      f"   {dense.seconds / ours.seconds:5.2f} x",
      flush=True,
    )
  return rows


def plot(rows: list[dict], path: str) -> None:
  """Time against each letter, logarithmic both ways."""
  letters = list(dict.fromkeys(row["letter"] for row in rows))
  figure, axes = plt.subplots(
    1, len(letters), figsize=(3.4 * len(letters), 3.2), squeeze=False
  )
  for axis, letter in zip(axes[0], letters, strict=True):
    mine = [row for row in rows if row["letter"] == letter]
    values = [row["value"] for row in mine]
    for variant, marker in zip(VARIANTS, "os", strict=True):
      times = [1e3 * row[variant]["seconds"] for row in mine]
      axis.loglog(values, times, marker=marker, label=variant)
    axis.set_xlabel(letter)
    axis.set_xticks(values, [str(v) for v in values])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  axes[0, 0].set_ylabel("ms a step")
  axes[0, 0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main() -> None:
  """Measures, prints as it goes, plots."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/benchmark.py")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--letters", default="".join(SWEEPS))
  parser.add_argument("--plot", default="")
  parser.add_argument("--json", default="", help="file for all figures")
  args = parser.parse_args()
  rows = []
  for letter in args.letters:
    rows += sweep(args.config, letter, args.repeats)
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      json.dump(rows, f, indent=1)
  if args.plot:
    plot(rows, args.plot)


if __name__ == "__main__":
  main()
