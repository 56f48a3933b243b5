"""README.md and the site's pages: commands, Python, paths and links.

Every fenced command runs here in a cheap form, or in the test that is named, or
its entry says what it needs.
"""

import ast
import dataclasses
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import fenced
import pytest
from fenced import PAGES, ROOT

from cacheaug import config as configs
from cacheaug.augment import drawing

README = ROOT / "README.md"
_COMMANDS = {
  command: needs for page in PAGES for command, needs in fenced.commands(page)
}
_NETWORK = "the network; .ci/run does it"


@dataclasses.dataclass(frozen=True)
class Elsewhere:
  """A test that runs the command, as file::function."""

  test: str


# Start of a command -> how it is held; the longest that fits counts.
_HOW = {
  "python -m cacheaug.augment.traces": "here: test_traces_commands",
  "python -m cacheaug.main --config=configs/quickstart.py": (
    "here: test_training_commands"
  ),
  "python -m cacheaug.main --config=configs/gemma2b.py --config.runlocal": (
    "here: test_training_commands"
  ),
  "python -m cacheaug.main --config=configs/gemma2b.py --workdir": (
    "needs the weights of Gemma-2 2B"
  ),
  "python -m cacheaug.main --config=configs/tiny_coprocessor.py": Elsewhere(
    "test_lateness.py::test_training_draws_lateness_and_no_other_points"
  ),
  "python -m cacheaug.generate": Elsewhere(
    "test_generate_command.py::test_compare_and_trace"
  ),
  "python -m cacheaug.generate --store": Elsewhere(
    "test_deliberate.py::test_fill_then_resume_then_generate"
  ),
  "python -m cacheaug.deliberate": Elsewhere(
    "test_deliberate.py::test_fill_then_resume_then_generate"
  ),
  "python -m cacheaug.evaluate": Elsewhere(
    "test_evaluate.py::test_report_is_whole"
  ),
  "python -m cacheaug.evaluate --workdir": Elsewhere(
    "test_evaluate.py::test_benchmarks_beside_the_tables_or_alone"
  ),
  "python -m cacheaug.sweep": Elsewhere(
    "test_sweep.py::test_the_command_trains_reports_and_goes_on"
  ),
  "python -m cacheaug.evals.gating": "here: test_gating_command",
  "python -m cacheaug.plan": Elsewhere(
    "test_plan.py::test_table_without_a_compiler"
  ),
  "python -m cacheaug.plan --config=configs/qwen3_06b.py": (
    "here: test_plans_in_the_recipes"
  ),
  "python -m cacheaug.benchmark": Elsewhere("test_benchmark.py::test_command"),
  "launch/": "here: test_launch_commands_dry",
  "pip install": f"needs {_NETWORK}",
  "pytest -n 2": "needs nothing: it is this",
  "ruff check": f"needs nothing: {_NETWORK}",
  "docker build": "needs docker; test_launch_jobs.py reads the Dockerfile",
  "python tests/make_golden.py": "needs .[parity]",
}


def _how(command: str) -> object:
  starts = [start for start in _HOW if command.startswith(start)]
  return _HOW[max(starts, key=len)] if starts else None


@pytest.mark.parametrize("command", _COMMANDS)
def test_command_is_held(command):
  how = _COMMANDS[command] or _how(command)
  assert how, "neither run by a test nor marked with what it needs"
  if isinstance(how, Elsewhere):
    file, _, function = how.test.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / file).read_text()
  elif how.startswith("here: "):
    assert how.removeprefix("here: ") in globals()


def test_every_entry_is_used():
  used = {id(_how(command)) for command in _COMMANDS}
  assert [start for start in _HOW if id(_HOW[start]) not in used] == []


@pytest.mark.parametrize("command", _COMMANDS)
def test_keys_files_and_flags_exist(command):
  """Of all commands alike, whatever it would take to run them."""
  words = shlex.split(command)
  given = dict(w.lstrip("-").partition("=")[::2] for w in words[1:])
  config = given.get("config")
  if config:
    found = runpy.run_path(str(ROOT / config))["get_config"]()
    known = [key for key, _ in configs._leaves(found)]
    for key in given:
      if key.startswith("config."):
        assert key.removeprefix("config.") in known, key
  if words[:2] == ["python", "-m"]:
    path = ROOT / f"{words[2].replace('.', '/')}.py"
    source = path.read_text() + Path(drawing.__file__).read_text()
    for flag in (w for w in words[3:] if not w.startswith("--config")):
      name = flag.lstrip("-").partition("=")[0].removeprefix("no")
      assert f'"{name}"' in source or f'"--{name}"' in source, flag
  elif words[0].startswith("launch/"):
    assert (ROOT / words[0]).exists()


def _matching(start: str) -> list[list[str]]:
  found = [c for c in _COMMANDS if c.startswith(start)]
  return [shlex.split(c) for c in found if not _COMMANDS[c]]


def test_traces_commands(capsys):
  printed = []
  for words in _matching("python -m cacheaug.augment.traces"):
    assert drawing.main(words[3:]) == 0
    printed.append(capsys.readouterr().out)
  # The picture in the README is what its command prints.
  picture = re.search(r"```\n(    a b c .*?)```", README.read_text(), re.DOTALL)
  found = [line.strip() for line in picture.group(1).splitlines()]
  assert len(found) == 11
  shown = [line.strip() for line in "".join(printed).splitlines()]
  at = shown.index(found[0], 1)
  assert shown[at : at + len(found)] == found


# Of the compiler, as tests/small_runs.py: these compile more than they compute.
_QUICK = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)


def _run(command: list[str]) -> str:
  done = subprocess.run(
    [sys.executable, *command[1:]],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": _QUICK},
    capture_output=True,
    text=True,
    timeout=800,  # only a hang should reach it
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def _form(text: str) -> str:
  """Text with numbers taken out, so that what remains is its form."""
  return " ".join(re.sub(r"[-+]?\d[\d.,]*", "#", text).split())


# Few steps and sequences; all else as it stands.
_CHEAP = {
  "quickstart": [
    "--config.optimizer.steps=4",
    "--config.optimizer.warmup=1",
    "--config.eval.sequences=32",
  ],
  "gemma2b": [
    "--config.optimizer.steps=2",
    "--config.eval.sequences=2",
    "--config.eval.batch=2",
  ],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", _CHEAP)
def test_training_commands(config, tmp_path):
  """The table's form is the one that the README shows."""
  (words,) = [
    words
    for words in _matching(f"python -m cacheaug.main --config=configs/{config}")
    if not any(word.startswith("--workdir") for word in words)
  ]
  more = [f"--config.data.cache_dir={tmp_path}/cache", f"--workdir={tmp_path}"]
  printed = _run([*words, *_CHEAP[config], *more])
  assert (tmp_path / "report" / "report.md").exists()
  shown = re.search(
    r"```\n(code: held-out perplexity.*?)```", README.read_text(), re.DOTALL
  )
  table, _, _ = shown.group(1).partition("report:")
  head = " ".join(table.splitlines()[:2])
  assert _form(head) in _form(printed)
  if config == "quickstart":
    assert _form(table) in _form(printed)


@pytest.mark.timeout(900)
def test_gating_command(tmp_path):
  words = _matching("python -m cacheaug.evals.gating")[0]
  words = [w for w in words if not w.startswith("--out")]
  more = ["--sequences=4", f"--config.data.cache_dir={tmp_path}/cache"]
  out = _run([*words, *more, f"--out={tmp_path}/gating"])
  assert "random" in out and "entropy" in out


@pytest.mark.slow
def test_plans_in_the_recipes():
  """The totals in the page are what the commands print today."""
  page = (ROOT / "docs" / "recipes.md").read_text()
  for words in _matching("python -m cacheaug.plan"):
    if "--nocompile" in words:
      (total,) = re.findall(r"^total .*$", _run(words), re.MULTILINE)
      assert total.rstrip() in page, total


@pytest.mark.parametrize(
  "words", _matching("launch/"), ids=lambda w: " ".join(w[:2])
)
def test_launch_commands_dry(words):
  at = words.index("--") if "--" in words else len(words)
  done = subprocess.run(
    [*words[:at], "--dry-run", *words[at:]],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr


def _expected(code: str) -> dict[int, str]:
  """Line -> the value that its comment begins with."""
  found = {}
  for token in tokenize.generate_tokens(io.StringIO(code).readline):
    value = re.match(r"# (\[.*?\])(: |$)", token.string)
    if token.type == tokenize.COMMENT and value and "B, " not in value[1]:
      found[token.start[0]] = value[1]
  return found


_PYTHON = {
  f"{page.name}-{i}": block
  for page in PAGES
  for i, block in enumerate(fenced.blocks(page, "python"))
}


@pytest.mark.parametrize("name", _PYTHON)
def test_python_gives_what_its_comments_say(name):
  code = _PYTHON[name]
  wanted, scope = _expected(code), {}
  checked = 0
  for node in ast.parse(code).body:
    if not isinstance(node, ast.Expr):
      exec(compile(ast.Module([node], []), name, "exec"), scope)
      continue
    value = eval(compile(ast.Expression(node.value), name, "eval"), scope)
    if node.end_lineno in wanted:
      assert repr(value) == wanted[node.end_lineno]
      checked += 1
  assert checked == len(wanted)
  if name == "README.md-0":
    assert checked


def _links(page: Path) -> list[str]:
  text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
  found = re.findall(r"\]\(([^)]+)\)", text)
  return [link for link in found if not link.startswith(("http", "#"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  for link in _links(page):
    assert (page.parent / link.partition("#")[0]).exists(), link


def _paths(page: Path) -> list[str]:
  text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
  names = re.findall(r"`([\w./-]+)`", text)
  return [n for n in names if n.endswith((".py", "/", ".sh", ".toml"))]


def _exists(name: str, near: Path) -> bool:
  places = (ROOT, ROOT / "cacheaug", near, ROOT / "cacheaug" / "augment")
  places += tuple(p for p in (ROOT / "cacheaug").iterdir() if p.is_dir())
  return any((place / name).exists() for place in places)


# Directories that a run makes.
_MADE = {"runs/quickstart/report/", "report/"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_paths_exist(page):
  names = set(_paths(page)) - _MADE
  gone = [n for n in names if not _exists(n, page.parent)]
  assert gone == []
  if page == README:
    assert len(names) > 20
  assert not _exists("cacheaug/none.py", page.parent)
