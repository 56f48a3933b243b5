"""Collectives of a compiled program, read from its optimised HLO text.

An operation counts once for every time it runs: XLA does not unroll the scan of
an accumulation, so the operations of a loop count as often as the bound in its
condition. Bytes are those that leave one device in the usual ring: (g - 1) / g
of the whole array for a gather or a reduce-scatter over g devices, twice that
for an all-reduce.

Traffic between TPU slices stands in the text as a `send` to the host that names
its collective.
"""

import dataclasses
import math
import re
from collections import defaultdict

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
_CALLEES = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
# mesh['a'=2,'b'=128] {'a'}, and since libtpu 0.0.42 with the devices' order
# between the two: mesh['a'=16,'b'=16], device_ids=([16,16]T(1,0)) {'a'}.
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}")
# An axis, or a part of one: 'a':(2)4 are 4 of it.
_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Unreadable(Exception):
  """A collective whose devices this module cannot count, in a few words."""


@dataclasses.dataclass(frozen=True)
class CollectiveBytes:
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


def of_program(text: str, slices: int = 1) -> list[CollectiveBytes]:
  """Collectives of a compiled program, by kind and by what they span.

  Args:
    text: `compiled.as_text()`.
    slices: that it was compiled for.

  Raises:
    Unreadable: text of another compiler, whose bytes would be wrong.
  """
  if not text:
    raise Unreadable("jaxlib does not know all of its instructions")
  reader = _Reader(slices)
  reader.read(text)
  totals = defaultdict(lambda: [0, 0.0])
  for name, runs in _runs(reader.computations, reader.entry).items():
    for kind, between, size in reader.computations[name].traffic:
      totals[kind, between][0] += runs
      totals[kind, between][1] += runs * size
  order = {kind: i for i, kind in enumerate(KINDS)}
  return [
    CollectiveBytes(kind, between, count, size)
    for (kind, between), (count, size) in sorted(
      totals.items(), key=lambda item: (item[0][1], order[item[0][0]])
    )
  ]


class _Reader:
  """Computations of a program's text, line by line."""

  def __init__(self, slices: int):
    self.computations: dict[str, _Computation] = {}
    self.entry = ""
    self._slices = slices
    self._name = ""
    self._seen: set[tuple[str, str]] = set()
    self._loops: list[tuple[_Computation, str]] = []

  def read(self, text: str) -> None:
    """The whole text."""
    for line in text.splitlines():
      header = _HEADER.match(line)
      if header:
        self._name = header[2]
        self.computations[self._name] = _Computation([], [], {})
        self.entry = self._name if header[1] else self.entry
      elif self._name and (found := _OPERATION.match(line)):
        self._operation(*found.groups())
    for computation, rest in self._loops:
      body = re.search(r"body=%?([\w.\-]+)", rest)[1]
      computation.calls.append((body, self._trips(rest)))

  def _operation(self, result, shape, operation, operands, rest) -> None:
    here = self.computations[self._name]
    if operation == "while":
      self._loops.append((here, rest))
      return
    if operation == "constant" and operands.lstrip("-").isdigit():
      here.constants[result] = int(operands)
    if operation == "compare":  # of a loop's condition, which has just one
      for name in (part.split("%")[-1].strip() for part in operands.split(",")):
        here.bound = here.constants.get(name, here.bound)
    for names in _CALLEES.findall(rest) + _BRANCHES.findall(rest):
      for name in names.split(","):
        here.calls.append((name.strip().lstrip("%"), 1))
    if operation.removesuffix("-start") in KINDS:
      self._collective(here, operation, shape, rest)
    elif operation == "send" and (transfer := _TRANSFER.search(rest)):
      kind = transfer[1].lower().replace("_", "-")
      size, s = _size(*_ARRAY.search(shape).groups()), self._slices
      size *= 2 * (s - 1) / s if kind == "all-reduce" else s - 1
      here.traffic.append((kind, "slices", size))

  def _collective(self, here, operation, shape, rest) -> None:
    kind = operation.removesuffix("-start")
    channel = re.search(r"channel_id=(\d+)", rest)
    if channel and kind != "collective-permute":
      # One gather spread over several fusions of compute keeps its channel.
      if (kind, channel[1]) in self._seen:
        return
      self._seen.add((kind, channel[1]))
    if self._name.startswith("all-reduce-scatter"):
      # A TPU's reduce-scatter: an all-reduce of which a part is taken.
      kind, operation = "reduce-scatter", "all-reduce"
    size = _bytes_out(kind, operation, shape, rest)
    here.traffic.append((kind, "devices", size))

  def _trips(self, rest: str) -> int:
    """How often a loop runs: as XLA says, or by its condition's constant."""
    known = re.search(r'known_trip_count[^\d}]*"?(\d+)', rest)
    if known:
      return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
    bound = self.computations[condition].bound
    return 1 if bound is None else bound


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


def _bytes_out(kind: str, operation: str, shape: str, rest: str) -> float:
  """Bytes that one operation sends out of one device."""
  arrays = [_size(*found) for found in _ARRAY.findall(shape)]
  size = sum(arrays)
  if operation in ("all-gather-start", "collective-permute-start"):
    # (operands, results, context...): the results are what is sent.
    size = max(arrays)
  if kind == "collective-permute":
    return size
  g = _group_size(rest)
  if operation.startswith("reduce-scatter"):
    size *= g  # the shape is one part's
  return size * (2.0 if kind == "all-reduce" else 1.0) * (g - 1) / g


def _size(kind: str, dimensions: str) -> float:
  width = _BYTES.get(kind) or int(re.match(r"[a-z]+(\d+)", kind)[1]) / 8
  return width * math.prod(int(n) for n in dimensions.split(",") if n)


def _group_size(rest: str) -> int:
  """Devices that take part in one operation together."""
  iota = _IOTA.search(rest)
  if iota:
    return int(iota[1])
  named = _NAMED.search(rest)
  if named:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    axes = _AXIS.findall(named[3])
    return math.prod(int(part or sizes[name]) for name, part in axes)
  listed = _LISTED.search(rest)
  if listed:
    return listed[1].count(",") + 1
  groups = re.search(r"replica_groups=\S{0,60}", rest)
  raise Unreadable(groups[0] if groups else "no replica_groups")
