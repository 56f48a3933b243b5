"""RESULTS-gpu.md from what benchmarks/on_gpu.sh measured.

python benchmarks/on_gpu_report.py DIR
"""

import importlib.metadata
import json
import pathlib
import string
import sys
from collections.abc import Iterable, Sequence
from typing import Any

Line = dict[str, Any]
_NONE = "Not measured."


def read(path: pathlib.Path) -> list[Line]:
  """The lines of a JSON lines file, if any; one that was cut short is none."""
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return found


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A Markdown table; `Not measured.` without rows."""
  lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
  if not lines:
    return _NONE
  rule = "|" + "---|" * len(head)
  return "\n".join([f"| {' | '.join(head)} |", rule, *lines])


def failures(lines: Iterable[Line]) -> str:
  """A line for each case that failed."""
  return "".join(
    f"\n\n{line['case']} failed: {line['failed']}"
    for line in lines
    if "failed" in line
  )


def kernels(lines: list[Line]) -> str:
  """Errors and speeds by shape."""
  parts = "kernel forward", "kernel dq", "xla forward", "xla dq"
  rows = []
  for x in lines:
    if "errors" not in x:
      continue
    errors = [f"{e:.1e}" for e in x["errors"].values()]
    speeds = [f"{x[p]['tflops']:.1f}" if p in x else "-" for p in parts]
    shape = x["shapes"]
    rows.append(
      (x["case"], shape["head_dim"], shape["groups"], *errors)
      + (", ".join(f"{t:.1e}" for t in x["tolerance"].values()), *speeds)
    )
  head = "decoders", "E", "G", "out", "lse", "dq", "tolerance", *parts
  return table(head, rows) + failures(lines)


def steps(lines: list[Line]) -> str:
  """Time, MFU and memory of each variant."""
  rows = []
  for x in lines:
    for i, v in enumerate(x.get("variants", ())):
      first = x["variants"][0]["seconds"]
      mfu = "-" if v["mfu"] is None else f"{100 * v['mfu']:.1f} %"
      peak = "-" if not x["peak_bytes"] else f"{x['peak_bytes'] / 1e9:.1f}"
      rows.append(
        (x["case"], v["variant"], f"{1e3 * v['seconds']:.1f}")
        + (f"{v['seconds'] / first:.2f}", mfu)
        + (f"{v['temporary_bytes'] / 1e9:.2f}", peak if not i else "")
        + (f"{v['compile_seconds']:.0f}",)
      )
  head = "step", "variant", "ms", "x", "useful MFU", "temporary GB"
  head += "process's peak GB", "compilation s"
  return table(head, rows) + failures(lines)


def profile(lines: list[Line]) -> str:
  """The five operations of the traced step."""
  rows = [
    (f"`{o['name'][:80]}`", f"{o['ms']:.2f}", f"{100 * o['share']:.1f} %")
    for x in lines
    for o in x.get("top", ())
  ]
  return table(("operation", "ms", "of the device's time"), rows)


def deterministic(lines: list[Line]) -> str:
  """Equal bit for bit or not, and the price."""
  rows = [
    (x["case"], f"{x['ms']:.1f}", "yes" if x["bit_identical"] else "no")
    for x in lines
    if "ms" in x
  ]
  return table(("step", "ms", "bit-identical"), rows) + failures(lines)


def flex(lines: list[Line], ours: dict[str, float]) -> str:
  """The peer's step beside ours of the same case."""
  rows = []
  for x in lines:
    if "ms" not in x:
      continue
    mine = ours.get(x["case"])
    ratio = "-" if mine is None else f"{x['ms'] / mine:.2f}"
    peak = x.get("peak_bytes")
    rows.append(
      (x["case"], f"{x['ms']:.1f}", "-" if mine is None else f"{mine:.1f}")
      + (ratio, "-" if not peak else f"{peak / 1e9:.1f}", x["torch"])
    )
  head = "step", "FlexAttention ms", "cacheaug ms", "x", "peak GB", "torch"
  same = "".join(
    f"\n\nLoss at small shapes: {x['loss']:.5f}, JAX {x['jax']:.5f}."
    for x in lines
    if "jax" in x
  )
  return table(head, rows) + same + failures(lines)


def cross_entropy(lines: list[Line]) -> str:
  """Errors, time and memory of each way."""
  rows = [
    (f"{r['vocab_size']:,}", r["dtype"], r["way"], f"{r['nll_error']:.1e}")
    + (f"{r['gradient_error']:.1e}", f"{1e3 * r['seconds']:.2f}")
    + (f"{r['temporary_bytes'] / 1e6:,.0f}",)
    for x in lines
    for r in x.get("rows", ())
  ]
  head = "V", "dtype", "way", "nll error, nats", "gradient error", "ms"
  return table((*head, "temporary MB"), rows) + failures(lines)


def decode(lines: list[Line]) -> str:
  """Tokens a second, and their share of the memory's."""
  rows = [
    (x["case"], f"{x['ms']:.3f}", f"{x['tokens_per_second']:.0f}")
    + (f"{x['floor_ms']:.3f}" if "floor_ms" in x else "-",)
    + (f"{100 * x['of_roofline']:.0f} %" if "of_roofline" in x else "-",)
    for x in lines
    if "ms" in x
  ]
  head = "decoder", "ms a token", "tokens/s", "floor ms", "of the roofline"
  return table(head, rows) + failures(lines)


def run(out: pathlib.Path) -> str:
  """The last lines of metrics.jsonl and speed.jsonl of each run."""
  rows = []
  for path in sorted(out.rglob("metrics.jsonl")):
    metrics, speeds = read(path), read(path.with_name("speed.jsonl"))
    if not metrics or not speeds:  # stopped before the first
      continue
    last, speed = metrics[-1], speeds[-1]
    rows.append(
      (path.parent.name, last["step"], f"{last['loss']:.4f}")
      + (f"{speed['tokens_per_second']:,.0f}",)
      + (f"{100 * speed['mfu']:.1f} %" if "mfu" in speed else "-",)
    )
  return table(("run", "step", "loss", "tokens/s", "MFU"), rows)


def goals(step: list[Line], kernel: list[Line], peer: list[Line]) -> str:
  """The project's goals for this device, with what was measured."""
  variants = {x["case"]: x["variants"] for x in step if "variants" in x}
  large = [
    v[0]["mfu"]
    for case, v in variants.items()
    if case.startswith("gemma2_2b") and v[0]["mfu"] is not None
  ]
  naive = [
    v["seconds"] / vs[0]["seconds"]
    for vs in variants.values()
    for v in vs
    if v["variant"] == "naive"
  ]
  dq = [
    x["kernel dq"]["tflops"]
    for x in kernel
    if "kernel dq" in x and x["shapes"]["head_dim"] == 256
  ]
  ours = seconds_of(step)
  ratios = [x["ms"] / ours[x["case"]] for x in peer if x["case"] in ours]

  def best(values, text):
    return text.format(max(values)) if values else "not measured"

  percent = [100 * x for x in large]
  return table(
    ("goal", "best seen"),
    (
      ("useful MFU at Gemma-2 2B at least 50 %", best(percent, "{:.1f} %")),
      ("at least 4 times naive", best(naive, "{:.2f}")),
      ("at least as fast as FlexAttention", best(ratios, "{:.2f} times")),
      ("dQ at head_dim 256 at least 400 TFLOP/s", best(dq, "{:.0f}")),
    ),
  )


def seconds_of(step: list[Line]) -> dict[str, float]:
  """Milliseconds of the structured step by case."""
  return {
    x["case"]: 1e3 * x["variants"][0]["seconds"]
    for x in step
    if "variants" in x
  }


def report(out: pathlib.Path, template: str) -> str:
  """The filled template."""
  parts = "kernels", "mosaic", "step", "deterministic", "flex"
  parts += "cross_entropy", "decode"
  lines = {part: read(out / f"{part}.jsonl") for part in parts}
  both = lines["kernels"] + lines["mosaic"]
  devices = {
    x["device"]
    for part, found in lines.items()
    for x in found
    if part != "flex"  # JAX keeps off the GPU there
  }
  versions = []
  for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
    try:
      versions.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  status = out / "status.txt"
  ends = status.read_text().split("\n") if status.exists() else []
  return string.Template(template).substitute(
    device=", ".join(sorted(devices)) or "nothing was measured",
    versions=", ".join(versions),
    status=table(("part", "status", "s"), (x.split() for x in ends if x)),
    goals=goals(lines["step"], both, lines["flex"]),
    kernels=kernels(both),
    step=steps(lines["step"]),
    profile=profile(lines["step"]),
    deterministic=deterministic(lines["deterministic"]),
    flex=flex(lines["flex"], seconds_of(lines["step"])),
    cross_entropy=cross_entropy(lines["cross_entropy"]),
    decode=decode(lines["decode"]),
    run=run(out),
  )


def main() -> None:
  """Writes the report and prints where."""
  out = pathlib.Path(sys.argv[1])
  template = pathlib.Path(__file__).with_name("RESULTS-gpu.template.md")
  path = out / "RESULTS-gpu.md"
  path.write_text(report(out, template.read_text()))
  print(path)


if __name__ == "__main__":
  main()
