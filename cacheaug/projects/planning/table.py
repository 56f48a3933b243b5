"""A plan as a table of text."""

from typing import Any

from cacheaug.projects.planning import memory

_GIGA = 2**30


def table(p: dict[str, Any]) -> str:
  """Lines for a terminal of what planner.plan returns."""
  slices = f"{p['slices']} slices of " if p["slices"] > 1 else ""
  mesh = ", ".join(f"{k} {v}" for k, v in p["mesh"].items())
  batch = p["batch"]
  lines = [
    f"{slices}{p['topology']}: {p['devices']} devices, mesh {mesh}",
    f"{p['parameters']['frozen']:,} parameters frozen, "
    f"{p['parameters']['trained']:,} trained",
    f"{batch['sequences']:,} sequences a step in {batch['accumulation']} "
    f"micro-batches, {batch['on_device_at_once']} on a device at once",
    "",
    *_memory_lines(p),
    "",
    *_traffic_lines(p),
    "",
    *_time_lines(p),
  ]
  return "\n".join(lines)


def _memory_lines(p: dict[str, Any]) -> list[str]:
  m, c = p["memory"], p["compiled"]
  lines = [f"{'GiB on each device':34}{'shapes':>10}{'compiler':>10}"]

  def row(name: str, size: float, compiler: float | None = None) -> None:
    by_compiler = "" if compiler is None else f"{compiler / _GIGA:10.2f}"
    lines.append(f"{name:34}{size / _GIGA:10.2f}{by_compiler}")

  for kind in memory.ARGUMENTS:
    row(f"  {kind}", m["kinds"][kind])
  row("before a step", m["arguments"], c.get("arguments"))
  for kind in memory.TEMPORARIES:
    row(f"  {kind}", m["kinds"][kind])
  row("made and freed by a step", m["temporaries"], c.get("temporaries"))
  if "others" in c:
    lines.append(f"{'code, new outputs':44}{c['others'] / _GIGA:10.2f}")
  row("total", m["arithmetic"], m["total"] if c["done"] else None)
  left = (m["limit"] - m["total"]) / _GIGA
  lines.append(
    f"of {m['limit'] / _GIGA:.2f}: "
    + (
      f"fits, {left:.2f} left" if m["fits"] else f"DOES NOT FIT by {-left:.2f}"
    )
  )
  if not c["done"]:
    lines.append(f"nothing was compiled ({c['reason']}): shapes alone")
  elif not c["fits"]:
    lines.append(
      f"the compiler ({c['by']}), in {c['seconds']:.0f} s: {c['message']}"
    )
  else:
    lines.append(f"compiled by {c['by']} in {c['seconds']:.0f} s")
  if p["suggestions"]:
    lines += ["", "keys that would help, GiB (by shapes; ask again with them):"]
  for r in p["suggestions"]:
    fits = "fits" if r["fits"] else "not enough"
    other = "" if r["same_result"] else ", another experiment"
    lines.append(
      f"  {r['keys']}: saves {r['saves'] / _GIGA:.2f}, leaves "
      f"{r['total'] / _GIGA:.2f}: {fits}{other}"
    )
  return lines


def _traffic_lines(p: dict[str, Any]) -> list[str]:
  def one(t: dict[str, Any]) -> str:
    times = f"{t['count']:>9,} x" if t["count"] else " " * 11
    return f"  {t['kind']:20}{t['between']:9}{times}{t['bytes'] / 1e9:12.3f}"

  head = f"{'collectives a step, GB out of a device':44}"
  if p["compiled"].get("collectives_read"):
    wanted = sum(t["bytes"] for t in p["collectives_expected"]) / 1e9
    found = sum(t["bytes"] for t in p["collectives"]) / 1e9
    return [
      f"{head}(compiled)",
      *map(one, p["collectives"]),
      f"{'  all':42}{found:12.3f}",
      f"{'  what the mesh needs, by arithmetic':42}{wanted:12.3f}",
    ]
  how = "by arithmetic"
  if p["compiled"]["done"] and p["compiled"]["fits"]:
    how += (
      f": the program cannot be read, {p['compiled']['collectives_unread']}"
    )
  return [f"{head}({how})", *map(one, p["collectives"])]


def _time_lines(p: dict[str, Any]) -> list[str]:
  s = p["seconds"]
  useful = p["flops"]["useful"]
  return [
    f"seconds a step: floor {s['floor']:.3f} ({s['bound']}): compute "
    f"{s['compute']:.3f} (useful {useful / 1e12:,.0f} TFLOP), HBM "
    f"{s['memory']:.3f}, ICI {s['ici']:.3f}, DCN {s['dcn']:.3f}",
    f"estimate {s['estimate']:.3f}, assuming {p['mfu_assumed']:.0%} of the "
    "peak (an assumption, not a measurement: --mfu)",
    f"{p['steps']:,} steps: {p['days']:.1f} days, {p['device_hours']:,.0f} "
    f"device-hours; at the floor {p['days_at_the_floor']:.1f} days",
  ]
