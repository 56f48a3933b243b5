"""Shows that a change left every number where it was, byte for byte.

  python tests/byte_references.py make DIR [--tree=CHECKOUT] [--config=FILE]
  python tests/byte_references.py compare BEFORE AFTER

`make` trains 100 steps of the quickstart with a checkout's code and keeps what
came of it: metrics.jsonl, the report, the exported coprocessor, the store
entries of `deliberate` with it, and the optimised HLO of the training step.
`compare` names each file that differs, and then ends with status 1. Both
directories must come from one machine, Python and jaxlib.

The HLO is compared without metadata (source lines move), a safetensors header
whatever its keys' order (the library's is random). An export may gain files,
and its config.json keys. Times are not kept.
"""

import argparse
import difflib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_STEP = "jit_step.cpu_after_optimizations.txt"
_DOCUMENTS = ("def main(argv):\n  return 0\n", "import os\nimport sys\n" * 4)
# Sections and attributes that only say which source line an operation is of.
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_METADATA = re.compile(r", (?:metadata|stack_frame_id)=(?:\{[^{}]*\}|\d+)")


def make(out: pathlib.Path, tree: pathlib.Path, config: str) -> None:
  """Runs the checkout at `tree` and keeps its outputs in `out`."""
  out.mkdir(parents=True)
  with tempfile.TemporaryDirectory() as scratch:
    at = pathlib.Path(scratch)
    dump = f"--xla_dump_to={at}/hlo --xla_dump_hlo_as_text"
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(tree),
      # What comes out of a cache is not dumped.
      "JAX_ENABLE_COMPILATION_CACHE": "false",
      "XLA_FLAGS": f"{dump} --xla_dump_hlo_module_re=jit_step.*",
    }

    def run(module: str, *arguments: str, **changes: str) -> None:
      command = [sys.executable, "-m", f"cacheaug.{module}", *arguments]
      subprocess.run(command, cwd=at, env=environment | changes, check=True)

    run(
      "main",
      f"--config={config or tree / 'configs/quickstart_text.py'}",
      "--workdir=run",
      "--config.optimizer.steps=100",
      "--config.optimizer.warmup=20",
      "--config.log_every=10",
      "--config.eval.sequences=64",
      "--config.export=export",
      "--config.data.cache_dir=cache",
    )
    lines = (json.dumps({"text": text}) + "\n" for text in _DOCUMENTS)
    (at / "documents.jsonl").write_text("".join(lines))
    run(
      "deliberate",
      "--documents=documents.jsonl",
      "--store=store",
      "--decoder=shipped:nano",
      "--coprocessor=export",
      XLA_FLAGS="",
    )
    shutil.copy(at / "run/metrics.jsonl", out)
    for name in ("export", "store"):
      shutil.copytree(at / name, out / name)
    skip = shutil.ignore_patterns("*.png")
    shutil.copytree(at / "run/report", out / "report", ignore=skip)
    (step,) = (at / "hlo").glob(f"*.{_STEP}")
    (out / _STEP).write_text(without_metadata(step.read_text()))


def without_metadata(hlo: str) -> str:
  """HLO text without what names source lines."""
  lines, skipped = [], False
  for line in hlo.splitlines():
    skipped = line in _TABLES or (skipped and bool(line))
    if not skipped:
      lines.append(_METADATA.sub("", line))
  return "\n".join(lines) + "\n"


def differences(before: pathlib.Path, after: pathlib.Path) -> list[str]:
  """A line for each file that is not the same in both directories."""
  found = []
  names = {
    str(path.relative_to(top))
    for top in (before, after)
    for path in top.rglob("*")
    if path.is_file()
  }
  for name in sorted(names):
    a, b = before / name, after / name
    if name.startswith("export/") and not a.exists():
      continue
    if not (a.exists() and b.exists()):
      found.append(f"{name}: only in {a.parent if a.exists() else b.parent}")
    elif name == "export/config.json":
      found += _entries(name, _json(a), _json(b))
    elif a.suffix == ".safetensors" and _tensors(a) == _tensors(b):
      continue
    elif a.read_bytes() != b.read_bytes():
      found.append(f"{name}: differs{_first_difference(a, b)}")
  return found


def _tensors(path: pathlib.Path) -> tuple[dict, bytes]:
  """Header and data of a safetensors file."""
  data = path.read_bytes()
  end = 8 + int.from_bytes(data[:8], "little")
  return json.loads(data[8:end]), data[end:]


def _json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text())


def _entries(name: str, before: dict, after: dict) -> list[str]:
  found = []
  for key, value in before.items():
    if isinstance(value, dict) and isinstance(after.get(key), dict):
      found += _entries(f"{name}: {key}", value, after[key])
    elif key not in after or after[key] != value:
      found.append(f"{name}: {key} was {value!r}, is {after.get(key)!r}")
  return found


def _first_difference(a: pathlib.Path, b: pathlib.Path) -> str:
  try:
    lines = [path.read_text().splitlines() for path in (a, b)]
  except UnicodeDecodeError:
    return ""
  changed = [
    line[:100]
    for line in difflib.unified_diff(*lines, lineterm="", n=0)
    if not line.startswith(("---", "+++", "@@"))
  ]
  return f", {len(changed)} lines:\n  " + "\n  ".join(changed[:4])


def main() -> None:
  """Reads the arguments above."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest="command", required=True)
  maker = commands.add_parser("make")
  maker.add_argument("out", type=pathlib.Path)
  maker.add_argument("--tree", type=pathlib.Path, default=_ROOT)
  maker.add_argument("--config", default="", help="the tree's own by default")
  comparer = commands.add_parser("compare")
  comparer.add_argument("before", type=pathlib.Path)
  comparer.add_argument("after", type=pathlib.Path)
  values = parser.parse_args()
  if values.command == "make":
    make(values.out.resolve(), values.tree.resolve(), values.config)
    return
  found = differences(values.before, values.after)
  print("\n".join(found) or "equal, byte for byte")
  raise SystemExit(bool(found))


if __name__ == "__main__":
  main()
