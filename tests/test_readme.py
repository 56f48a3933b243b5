"""README.md and the site's pages: commands, Python, paths and links.

Every fenced command runs here in a cheap form, or in the test that is named, or
its entry says what it needs.
"""

import dataclasses
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import compiling
import fenced
import pytest
from fenced import PAGES, ROOT

from cacheaug import config as configs
from cacheaug.augment import drawing

README = ROOT / "README.md"
# What was found, and the pages of long tables behind it.
_RESULTS = "\n".join(
  page.read_text()
  for page in (
    ROOT / "RESULTS.md",
    *sorted((ROOT / "docs" / "results").glob("*.md")),
  )
)
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
  "python -m cacheaug.main --config=configs/quickstart_text.py": (
    "here: test_training_commands"
  ),
  "python -m cacheaug.main --config=configs/gemma2b.py --config.runlocal": (
    "here: test_training_commands"
  ),
  "python -m cacheaug.main --config=configs/tiny_coprocessor.py": Elsewhere(
    "test_lateness.py::test_training_draws_lateness_and_no_other_points"
  ),
  "python -m cacheaug.generate --compare": "here: test_compare_command",
  "python -m cacheaug.generate": Elsewhere(
    "test_generate_command.py::test_compare_and_trace"
  ),
  "python -m cacheaug.export": Elsewhere(
    "test_export_command.py::test_command"
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
  "python -m cacheaug.projects.gating.report": "here: test_gating_command",
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
  "python tests/make_golden.py": "needs .[parity]",
  **{start: f"needs {what}" for start, what in fenced.NEEDS.items()},
}


def _how(command: str) -> object:
  return fenced.longest(_HOW, command)


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


# What times the README, and the words by which it shortens commands.
_TIMED = runpy.run_path(str(ROOT / "benchmarks" / "readme_commands.py"))
_SHORTENED = [
  line
  for command, _ in fenced.commands(README)
  for line, more in [_TIMED["shortened"](command)]
  if more and not fenced.longest(fenced.NEEDS, command)
]


def test_every_shortening_is_used():
  assert len(_SHORTENED) == len(_TIMED["_SHORTER"]) + 1  # and --dry-run


@pytest.mark.parametrize("command", [*_COMMANDS, *_SHORTENED])
def test_keys_files_and_flags_exist(command):
  """Of all commands alike, whatever it would take to run them."""
  words = shlex.split(command)
  given = dict(w.lstrip("-").partition("=")[::2] for w in words[1:])
  config = given.get("config")
  if config:
    found = runpy.run_path(str(ROOT / config))["get_config"]()
    known = [key for key, _ in configs.leaves(found)]
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
  found = [c for c in _COMMANDS if c.startswith(start) and not _COMMANDS[c]]
  return [shlex.split(c) for c in found if c not in _NEEDING]


_NEEDING = {c for c in _COMMANDS if fenced.longest(fenced.NEEDS, c)}


def test_traces_commands(capsys):
  printed = []
  for words in _matching("python -m cacheaug.augment.traces"):
    assert drawing.main(words[3:]) == 0
    printed.append(capsys.readouterr().out)
  # The picture in the README is what its command prints.
  picture = fenced.shown(README, "python -m cacheaug.augment.traces")
  found = [line.strip() for line in picture.splitlines()]
  assert len(found) == 11
  shown = [line.strip() for line in "".join(printed).splitlines()]
  at = shown.index(found[0], 1)
  assert shown[at : at + len(found)] == found


def _run(command: list[str]) -> str:
  done = subprocess.run(
    [sys.executable, *command[1:]],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": compiling.FLAGS},
    capture_output=True,
    text=True,
    timeout=800,  # only a hang should reach it
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_compare_command():
  """Its form is what the README shows, and so are the two answers."""
  (words,) = _matching("python -m cacheaug.generate --compare")
  printed = _run(words)
  shown = fenced.shown(README, "python -m cacheaug.generate --compare")
  assert fenced.form(shown) == fenced.form(printed)
  # Facts and the question, two lines of headings, a rule, the answers, the way.
  answers = [text.splitlines()[5].split(" | ") for text in (shown, printed)]
  assert answers[0] == answers[1]
  frozen, latents = (side.strip() for side in answers[0])
  (way,) = re.findall(r"^answer: (\w), by (\w) -> (\w): ", shown, re.MULTILINE)
  # It was never asked for two lookups, and ends the line.
  assert frozen == "" and latents == way[0] == way[2] != way[1]


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
_TRAINING = {
  " ".join(words): _CHEAP[config]
  for config in _CHEAP
  for words in _matching(f"python -m cacheaug.main --config=configs/{config}")
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", _TRAINING)
def test_training_commands(command, tmp_path):
  """The table's form is the one that the README shows."""
  words = [w for w in command.split() if not w.startswith("--workdir")]
  more = [f"--config.data.cache_dir={tmp_path}/cache", f"--workdir={tmp_path}"]
  printed = _run([*words, *_TRAINING[command], *more])
  assert (tmp_path / "report" / "report.md").exists()
  shown = fenced.shown(README, next(iter(_TRAINING)))
  table = shown.partition("\n\n")[2]
  assert fenced.form(table.splitlines()[1]) in fenced.form(printed)
  if "quickstart.py" in command:
    assert fenced.form(shown) in fenced.form(printed)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_gating_command(tmp_path):
  words = _matching("python -m cacheaug.projects.gating.report")[0]
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


_PYTHON = {
  f"{page.name}-{i}": block
  for page in PAGES
  for i, block in enumerate(fenced.blocks(page, "python"))
}


@pytest.mark.parametrize("name", _PYTHON)
def test_python_gives_what_its_comments_say(name):
  code = _PYTHON[name]
  if fenced.needs(code):
    compile(code, name, "exec")
    return
  found = fenced.values(code)
  assert [given for _, given in found] == [wanted for wanted, _ in found]
  if name == "README.md-0":
    assert len(found) == 2


def test_marked_python_is_marked_in_its_first_line():
  assert any(fenced.needs(code) for code in _PYTHON.values())
  assert fenced.needs("# needs a server\nx = 1\n") == "a server"
  assert fenced.needs("x = 1  # needs a server\n") == ""
  assert fenced.needs("x = 1\n# needs a server\n") == ""


def test_every_page_of_results_is_listed():
  pages = {page.name for page in (ROOT / "docs" / "results").glob("*.md")}
  for listing in ("RESULTS.md", "docs/results.md", "mkdocs.yml"):
    text = (ROOT / listing).read_text()
    named = set(re.findall(r"\bresults/(\w+\.md)(?=\)|$)", text, re.MULTILINE))
    assert named == pages, listing


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
  names = [n for n in names if n.endswith((".py", "/", ".sh", ".toml"))]
  # What an export holds is in no checkout.
  return [n for n in names if not n.startswith(("cp/", "custom_generate/"))]


def _exists(name: str, near: Path) -> bool:
  places = (ROOT, ROOT / "cacheaug", near, ROOT / "cacheaug" / "augment")
  places += tuple(p for p in (ROOT / "cacheaug").iterdir() if p.is_dir())
  return any((place / name).exists() for place in places)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_paths_exist(page):
  names = set(_paths(page))
  gone = [n for n in names if not _exists(n, page.parent)]
  assert gone == []
  if page == README:
    assert len(names) > 20
  assert not _exists("cacheaug/none.py", page.parent)


# Modules whose functions the pages name, as `traces.layout_traces`.
_NAMED = {
  name: importlib.import_module(f"cacheaug.{where}")
  for name, where in {
    "traces": "augment.traces",
    "coprocessor": "augment.coprocessor",
    "objective": "augment.objective",
    "rounds": "augment.rounds",
    "step": "step",
    "transformer": "model.transformer",
    "attention": "model.attention",
  }.items()
}


def _gone(text: str) -> list[str]:
  """Names of functions, or of keys, that the code does not have."""
  keys = {key for key, _ in configs.leaves(configs.base())}
  names = re.findall(rf"\b(?<!\.)({'|'.join(_NAMED)})\.([a-z]\w+)", text)
  return [
    f"{module}.{name}"
    for module, name in names
    if name not in ("py", "md", "safetensors")  # a file, not a function
    and f"{module}.{name}" not in keys
    and not hasattr(_NAMED[module], name)
  ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_functions_exist(page):
  assert _gone(page.read_text()) == []
  assert _gone("`traces.lay_in`, traces.count, `traces.py`") == [
    "traces.lay_in"
  ]


def _section(heading: str) -> str:
  """Of RESULTS.md and its pages, up to the next heading of any level."""
  _, found, rest = _RESULTS.partition(f"\n{heading}")
  assert found, heading
  return rest.partition("\n#")[0]


def _cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.strip().strip("|").split("|")]


# Decoder and text of the README's table -> the sweep's heading; its rows.
_SWEEPS = {
  "TinyStories-656K, stories": "### Stories, a pretrained decoder",
  "shipped tiny, problems": "### Problems, shipped tiny decoder",
}
_ROWS = {
  "N=8": "N8",
  "N=16": "N16",
  "pause tokens": "pause",
  "decoder trained on, equal steps": "base_steps",
}


def _measured(text: str, row: str) -> tuple[str, list[str]]:
  """Seeds, '' where there are none, and six figures, of RESULTS.md."""
  if text in _SWEEPS:
    section = _section(_SWEEPS[text])
    line = re.search(rf"^\| {_ROWS[row]} \((\d)\).*$", section, re.MULTILINE)
    return line[1], [cell.split()[0] for cell in _cells(line[0])[1:]]
  if text.startswith("paper"):
    said = re.search(r"the same six rows are ([-\d.,\s]+)", _RESULTS)
    return "", re.findall(r"-\d\.\d+", said[1])
  if text.startswith("shipped nano"):
    lines = _section("## Text quickstart").splitlines()
    cells = [_cells(line) for line in lines if re.match(r"\| \d", line)]
    return "1", [c[3].split()[0] for c in cells]
  line = re.search(r"^\| code \|.*%.*$", _RESULTS, re.MULTILINE)
  return "1", [cell.split()[0] for cell in _cells(line[0])[1:]]


def _drifted(readme: str) -> list[str]:
  """Rows of the README's table that RESULTS.md does not have so."""
  table = readme.partition("| decoder and text |")[2].partition("\n\n")[0]
  found, text = [], ""
  for line in table.splitlines()[2:]:
    name, row, seeds, *figures = _cells(line)
    text = name or text
    there, measured = _measured(text, row)
    pairs = zip(map(float, figures), map(float, measured), strict=True)
    # Half a unit of the last place, and what a float adds.
    if there != seeds or any(abs(a - b) > 0.0501 for a, b in pairs):
      found.append(line)
  assert len(table.splitlines()) == 12
  return found


def test_table_is_that_of_the_results():
  readme = README.read_text()
  assert _drifted(readme) == []
  for old, new in (("-59.7", "-59.6"), ("| 3 | -24.4", "| 1 | -24.4")):
    assert len(_drifted(readme.replace(old, new, 1))) == 1


def _unmeasured(text: str) -> list[str]:
  """Ratios (4.30x) that RESULTS.md does not have where it has speed."""
  known = _section("## The training step") + _section("## Decoding")
  ratios = re.findall(r"(?<![\w.])(\d+\.\d+)x", text)
  return [x for x in ratios if not re.search(rf"(?<![\d.]){x}(?!\d)", known)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_ratios_are_those_of_the_results(page):
  text = page.read_text()
  assert _unmeasured(text) == []
  if page == README:
    assert _unmeasured(text.replace("4.30x", "4.31x")) == ["4.31"]
    assert _unmeasured(text.replace("7.6x", "7.7x")) == ["7.7"]


def test_exact_match_is_that_of_the_results():
  said = re.search(r"Exact match on 1,024 .*?FLOP\.", README.read_text(), re.S)
  section = _section("### Problems, shipped tiny decoder")
  rows = section.partition("Exact match on 1,024 ")[2]
  wanted = [
    re.search(rf"^\| {row} \| [-\d] \| ([\d.]+)", rows, re.MULTILINE)[1]
    for row in ("frozen shipped:tiny", "pause", "N8", "base_steps", "base_flop")
  ]
  assert re.findall(r"([\d.]+) %", said[0]) == wanted


def _reach(text: str) -> list[str]:
  """The rows of the table of lookups and rounds, but for its head."""
  table = text.partition("| layers | k=1 |")[2].partition("\n\n")[0]
  return table.splitlines()[2:]


def test_reach_is_that_of_the_results():
  rows = _reach(README.read_text())
  assert rows == _reach((ROOT / "docs/results/depth.md").read_text())
  assert len(rows) == 6 and rows[-1].startswith("| four rounds | 10 |")


def test_quickstart_shown_is_the_one_measured():
  section = _section("## The quickstart")
  command = "python -m cacheaug.main --config=configs/quickstart.py"
  shown = fenced.shown(README, command)
  figures = re.findall(r"\d+\.\d+", shown)
  assert len(figures) == 19
  assert [f for f in figures if f not in section] == []
  wall, processor = re.search(
    r"(\d+) seconds on two idle cores[^(]*\((\d+) of\s+processor",
    README.read_text(),
  ).groups()
  assert f"{wall} s ({processor} s of processor time)" in section
