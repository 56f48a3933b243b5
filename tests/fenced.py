"""Fenced blocks of the Markdown files: commands, Python, what they print.

The standard library alone: benchmarks/readme_commands.py runs this before
anything is installed.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  *sorted((ROOT / "docs").glob("*.md")),
)
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d.,]*")

# Start of a command that is not marked in its page -> what it needs.
NEEDS = {
  "python -m cacheaug.main --config=configs/gemma2b.py --workdir": (
    "the weights of Gemma-2 2B"
  ),
  "python -m cacheaug.main --config=configs/gpu_decoder.py": "a GPU",
  "python -m cacheaug.sweep --config=configs/sweeps/gpu.py": "a GPU",
  "pip install -e '.[cuda]'": "a GPU",
  "vllm serve": "vLLM and a GPU",
  "hf ": "an account of huggingface.co",
  "docker build": "docker; test_launch_jobs.py reads the Dockerfile",
}
# Start of a README's command -> how what it shows of the output begins.
SHOWN = {
  "python -m cacheaug.augment.traces": "    a b c",
  "python -m cacheaug.generate": "prompt: ",
  "python -m cacheaug.main --config=configs/quickstart.py": "exact match",
}


def blocks(path: Path, language: str) -> list[str]:
  """The text of every block of a language."""
  return [t for name, t in _FENCE.findall(path.read_text()) if name == language]


def needs(block: str) -> str:
  """What the first line of a block says it needs to run, or ''."""
  marked = re.match(r"\s*# needs (.+)", block)
  return marked[1] if marked else ""


def commands(path: Path) -> list[tuple[str, str]]:
  """(command on one line, what its block's first line says it needs or '')."""
  found = []
  for block in blocks(path, "bash"):
    for line in block.replace("\\\n", " ").splitlines():
      line = " ".join(line.partition(" # ")[0].split())
      if line and not line.startswith("#"):
        found.append((line, needs(block)))
  return found


def longest(table: dict, command: str):
  """The value of the longest start that fits, or None."""
  starts = [start for start in table if command.startswith(start)]
  return table[max(starts, key=len)] if starts else None


def shown(path: Path, command: str) -> str:
  """What a page shows of a command's output, '' where it shows nothing."""
  start = longest(SHOWN, command)
  if start is None:
    return ""
  (block,) = (b for b in blocks(path, "") if b.startswith(start))
  return block.partition("\nreport: ")[0]  # the directory's name is the run's


def form(text: str) -> str:
  """Text with numbers taken out, so that what remains is its form."""
  return " ".join(_NUMBER.sub("#", text).split())


def values(code: str) -> list[tuple[str, str]]:
  """Runs Python; (what a line's comment says, what its expression gives).

  Of the comments that begin with a list, shapes `[B, ...]` apart.
  """
  wanted = {}
  for token in tokenize.generate_tokens(io.StringIO(code).readline):
    value = re.match(r"# (\[.*?\])(: |$)", token.string)
    if token.type == tokenize.COMMENT and value and "B, " not in value[1]:
      wanted[token.start[0]] = value[1]
  scope, found = {}, {}
  for node in ast.parse(code).body:
    if isinstance(node, ast.Expr):
      value = eval(compile(ast.Expression(node.value), "page", "eval"), scope)
      found[node.end_lineno] = repr(value)
    else:
      exec(compile(ast.Module([node], []), "page", "exec"), scope)
  return [(text, found.get(line, "")) for line, text in wanted.items()]
