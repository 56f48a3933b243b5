"""Fenced blocks of the Markdown files, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  *sorted((ROOT / "docs").glob("*.md")),
)
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
  """The text of every block of a language."""
  return [t for name, t in _FENCE.findall(path.read_text()) if name == language]


def commands(path: Path) -> list[tuple[str, str]]:
  """(command on one line, what its block's first line says it needs or '')."""
  found = []
  for block in blocks(path, "bash"):
    needs = re.match(r"\s*# needs (.+)", block)
    for line in block.replace("\\\n", " ").splitlines():
      line = " ".join(line.partition(" # ")[0].split())
      if line and not line.startswith("#"):
        found.append((line, needs.group(1) if needs else ""))
  return found
