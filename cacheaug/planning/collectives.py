"""What a compiled program sends between devices in one run of it.

Read from the optimised HLO text. An operation counts once for every time it
runs: XLA unrolls nothing of an accumulation's scan, so a loop's operations
count as often as its condition compares with. Bytes are those that leave one
device in the usual ring: (g - 1) / g of the whole array for a gather or a
reduce-scatter over g devices, twice that for an all-reduce.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # the rest end in bits

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(
  r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(([^)]*)\)(.*)$"
)
_ARRAY = re.compile(r"(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_IOTA = re.compile(
  r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """One kind's operations in one run of the program, on one device."""

  kind: str
  between: str  # 'devices' of a slice or 'slices'
  count: int
  bytes: float


@dataclasses.dataclass
class _Computation:
  calls: list[tuple[str, int]]
  traffic: list[tuple[str, str, float]]
  constants: dict[str, int]
  bound: int | None = None  # of a loop's condition


def of_program(text: str, per_slice: int) -> list[Traffic]:
  """Collectives of a compiled program, by kind and by what they span.

  Args:
    text: `compiled.as_text()`.
    per_slice: devices of one slice, which are neighbours in the mesh.
  """
  computations, entry = _read(text, per_slice)
  totals = defaultdict(lambda: [0, 0.0])
  for name, runs in _runs(computations, entry).items():
    for kind, between, size in computations[name].traffic:
      totals[kind, between][0] += runs
      totals[kind, between][1] += runs * size
  order = {kind: i for i, kind in enumerate(KINDS)}
  return [
    Traffic(kind, between, count, size)
    for (kind, between), (count, size) in sorted(
      totals.items(), key=lambda item: (item[0][1], order[item[0][0]])
    )
  ]


def _read(text: str, per_slice: int) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry, current = "", None
  # One gather spread over several fusions of compute keeps its channel.
  spread: set[tuple[str, str]] = set()
  loops = []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = _Computation([], [], {})
      computations[header[2]] = current
      name = header[2]
      entry = name if header[1] else entry
      continue
    found = _OPERATION.match(line) if current else None
    if not found:
      continue
    result, shape, operation, operands, rest = found.groups()
    if operation == "constant" and operands.lstrip("-").isdigit():
      current.constants[result] = int(operands)
    elif operation == "compare" and "ROOT" in line:
      names = [part.split("%")[-1].strip() for part in operands.split(",")]
      known = [current.constants[n] for n in names if n in current.constants]
      current.bound = known[0] if known else None
    elif operation == "while":
      loops.append((current, rest))
    else:
      for branches in _BRANCHES.findall(rest):
        for branch in branches.split(","):
          current.calls.append((branch.strip().lstrip("%"), 1))
      current.calls += [(callee, 1) for callee in _CALLEES.findall(rest)]
      kind = operation.removesuffix("-start")
      if kind in KINDS:
        channel = re.search(r"channel_id=(\d+)", rest)
        key = (kind, channel[1] if channel else result)
        if "async_collective_fusion" in name:
          if key in spread:
            continue
          spread.add(key)
        started = operation.endswith("-start")
        current.traffic.append(
          _traffic(kind, shape, started, rest, per_slice=per_slice)
        )
  for computation, rest in loops:
    body = re.search(r"body=%?([\w.\-]+)", rest)[1]
    condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
    trips = re.search(r'known_trip_count[^\d}]*"?(\d+)', rest)
    bound = int(trips[1]) if trips else computations[condition].bound
    computation.calls.append((body, 1 if bound is None else bound))
  return computations, entry


def _runs(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
  """How often each computation runs."""
  runs: dict[str, int] = defaultdict(int)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for callee, each in computations[name].calls:
      if callee in computations:
        visit(callee, times * each)

  visit(entry, 1)
  return runs


def _traffic(
  kind: str, shape: str, started: bool, rest: str, *, per_slice: int
) -> tuple[str, str, float]:
  """(kind, what it spans, bytes out of one device) of one operation."""
  arrays = [_size(*found) for found in _ARRAY.findall(shape)]
  if started and kind in ("all-gather", "collective-permute"):
    # (operand, result, context...): the result is the larger of the two.
    size = max(arrays)
  else:
    size = sum(arrays)
  groups = _groups(kind, rest)
  g = max((len(group) for group in groups), default=1)
  if kind == "reduce-scatter":
    size *= g  # the shape is one part's
  share = {"all-reduce": 2.0 * (g - 1) / g, "collective-permute": 1.0}
  apart = any(len({i // per_slice for i in group}) > 1 for group in groups)
  bytes_out = size * share.get(kind, (g - 1) / g)
  return kind, "slices" if apart else "devices", bytes_out


def _size(kind: str, dimensions: str) -> float:
  width = _BYTES.get(kind) or int(re.match(r"[a-z]+(\d+)", kind)[1]) / 8
  return width * math.prod(int(n) for n in dimensions.split(",") if n)


def _groups(kind: str, rest: str) -> Sequence[Sequence[int]]:
  """Devices that take part in one operation together."""
  if kind == "collective-permute":
    return _lists(_PAIRS.search(rest))
  iota = _IOTA.search(rest)
  if iota:
    numbers = np.arange(int(iota[1]) * int(iota[2]))
    numbers = numbers.reshape([int(n) for n in iota[3].split(",")])
    if iota[4]:
      numbers = numbers.transpose([int(n) for n in iota[4].split(",")])
    return numbers.reshape(int(iota[1]), int(iota[2])).tolist()
  named = _NAMED.search(rest)
  if named:
    return _named_groups(named[1], named[2])
  return _lists(_LISTED.search(rest))


def _named_groups(mesh: str, over: str) -> list[list[int]]:
  """Groups written as mesh['a'=2,'b'=128] {'b'}."""
  sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
  chosen = re.findall(r"'([^']+)'", over)
  names = list(sizes)
  numbers = np.arange(math.prod(int(n) for n in sizes.values()))
  numbers = numbers.reshape([int(n) for n in sizes.values()])
  last = [names.index(n) for n in chosen]
  first = [i for i in range(len(names)) if i not in last]
  width = math.prod(numbers.shape[i] for i in last)
  return numbers.transpose(first + last).reshape(-1, width).tolist()


def _lists(found: re.Match | None) -> list[list[int]]:
  if not found:
    return []
  return [
    [int(n) for n in group.split(",") if n]
    for group in re.findall(r"\{([\d,]*)\}", found[1])
  ]
