"""Lines of the package by ring: code, docstrings, comments, blank lines.

  python tests/sizes.py                    # the checkout
  python tests/sizes.py --before=6856eb1   # beside those of a commit

Rings are those of tests/test_layout.py. A commit from before the rings is
counted by where its files stand now.
"""

import argparse
import ast
import collections
import io
import pathlib
import subprocess
import tarfile
import tempfile
import tokenize

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_METHOD, _AROUND, _PROJECTS = "the method", "around it", "projects"
_RING_OF_FOLDER = {
  "model": _METHOD,
  "augment": _METHOD,
  "kernels": _METHOD,
  "projects": _PROJECTS,
  "planning": _PROJECTS,  # as it stood before
  "sweeping": _PROJECTS,
}
_RING_OF_FILE = {
  name: ring
  for ring, names in {
    # Files of the root: the trainer's; the rest is around it.
    _METHOD: (
      "__init__ main train step build config validate trainable lm sharding "
      "optim flops errors stepping adaptation objectives opening"
    ),
    # Commands, and files that were elsewhere before.
    _PROJECTS: (
      "benchmark plan sweep deliberate matching evals/gating evals/answering "
      "evals/benchmarks evals/benchmark_data evals/benchmark_tasks "
      "evals/lm_eval_model evals/lm_eval_tasks evals/programs "
      "inference/background inference/worker inference/serve inference/store "
      "inference/stored augment/peers"
    ),
    _AROUND: (
      "model/pretrained model/families model/safetensor_files "
      "model/google_gemma"
    ),
  }.items()
  for name in names.split()
}
_KINDS = ("code", "docstring", "comment", "blank")


def ring(path: pathlib.PurePath) -> str:
  """Of a file, its path below the package."""
  name = str(path.with_suffix(""))
  if name in _RING_OF_FILE:
    return _RING_OF_FILE[name]
  return _RING_OF_FOLDER.get(path.parts[0], _AROUND)


def kinds_of_lines(text: str) -> collections.Counter[str]:
  """How many lines of a Python file are of each of _KINDS."""
  kinds = dict.fromkeys(range(1, len(text.splitlines()) + 1), "blank")
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      if kinds[token.start[0]] == "blank":  # else it ends a line of code
        kinds[token.start[0]] = "comment"
    elif token.string.strip() and token.type != tokenize.ENDMARKER:
      kinds |= dict.fromkeys(range(token.start[0], token.end[0] + 1), "code")
  owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, owners) and ast.get_docstring(node) is not None:
      lines = range(node.body[0].lineno, node.body[0].end_lineno + 1)
      kinds |= dict.fromkeys(lines, "docstring")
  return collections.Counter(kinds.values())


def count(tree: pathlib.Path) -> dict[str, collections.Counter[str]]:
  """Ring -> lines of each kind, and files."""
  package = tree / "cacheaug"
  found = {r: collections.Counter() for r in (_METHOD, _AROUND, _PROJECTS)}
  for path in sorted(package.rglob("*.py")):
    total = found[ring(path.relative_to(package))]
    total += kinds_of_lines(path.read_text())
    total["files"] += 1
  return found | {"all": sum(found.values(), collections.Counter())}


def at_commit(commit: str) -> dict[str, collections.Counter[str]]:
  """The same of a commit."""
  command = ["git", "archive", commit, "cacheaug"]
  done = subprocess.run(command, cwd=_ROOT, capture_output=True, check=True)
  with tempfile.TemporaryDirectory() as scratch:
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
      archive.extractall(scratch, filter="data")
    return count(pathlib.Path(scratch))


def table(
  now: dict[str, collections.Counter[str]],
  before: dict[str, collections.Counter[str]] | None,
) -> str:
  """Aligned text, a line a ring; before -> now where there is a before."""
  columns = ("files", *_KINDS)
  lines = [("ring", *columns)]
  for name, counts in now.items():
    cells = [f"{counts[c]:,}" for c in columns]
    if before:
      cells = [
        f"{before[name][c]:,} -> {cell}"
        for c, cell in zip(columns, cells, strict=True)
      ]
    lines.append((name, *cells))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
    for line in lines
  )


def main() -> None:
  """Reads the arguments above."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--before", default="", help="a commit")
  values = parser.parse_args()
  before = at_commit(values.before) if values.before else None
  print(table(count(_ROOT), before))


if __name__ == "__main__":
  main()
