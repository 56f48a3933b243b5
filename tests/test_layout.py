"""The tree against its plan: three rings, arrows inwards only, no cycle.

the method    model/, augment/, kernels/ and the trainer's files at the root
around it     data/, weights/, inference/, evals/, run/
projects/     each folder one idea; deleted, it leaves the rest as it was
"""

import ast
import functools
import graphlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cacheaug

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cacheaug"
BENCHMARKS = tuple((ROOT / "benchmarks").glob("*.py"))

# Reading order of one afternoon: the paper's path from a config to an update.
AFTERNOON = (
  "main.py",
  "train.py",
  "step.py",
  "build.py",
  "config.py",
  "augment/traces.py",
  "augment/kinds.py",
  "augment/coprocessor.py",
  "augment/objective.py",
  "trainable.py",
  "model/config.py",
  "model/cache.py",
  "model/rope.py",
  "model/layers.py",
  "model/attention.py",
  "model/transformer.py",
  "kernels/context_attention.py",
  "kernels/cross_entropy.py",
  "optim.py",
  "sharding.py",
  "data/pipeline.py",
)
_AFTERNOON_LINES = 5000
_ROOT_FILES = 20

# What a part may import of the package, all else being refused. A part is a
# file of the root, a folder, or a project.
# Helpers without knowledge of the rest, for every part.
_BOTTOM = ("run.files", "run.checksum")
_MODEL = {"errors", "kernels", "model"}
_METHOD = _MODEL | {"augment", "config", "trainable", "sharding", "optim"}
_ONLY = {
  "errors": set(),
  "run.files": {"errors"},
  "run.checksum": set(),
  "kernels": {"errors", "kernels"},
  "model": _MODEL,
  "augment": _MODEL,
  "optim": {"errors"},
  "sharding": {"errors", "model"},
  "data": {"errors"},
  "config": {"errors", "model", "augment", "data"},
  "trainable": {"errors", "model", "augment", "config"},
  "flops": {"errors", "model", "augment", "config", "trainable"},
  "run": {"errors", "config", "data"},
  "validate": _METHOD | {"run"},
  "step": _METHOD | {"run"},
  "weights": _MODEL | {"augment", "config", "trainable", "data", "run"},
  "inference": _MODEL | {"augment", "data", "weights"},
  "evals": _MODEL
  | {"augment", "config", "data", "inference", "run", "weights"},
  "lm": _MODEL | {"augment", "data", "inference", "weights"},
  "build": _METHOD | {"validate", "step", "data", "weights", "lm", "run"},
}
_TRAINER = {"main", "train"}
# Packages that take seconds or are optional: only what uses them imports them.
_HEAVY = (
  "array_record",
  "gcsfs",
  "gguf",
  "huggingface_hub",
  "jinja2",
  "lm_eval",
  "matplotlib",
  "sentencepiece",
  "tensorflow",
  "tensorflow_datasets",
  "torch",
  "transformers",
)


def _module(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
  """Every module of the package, with its file."""
  return {_module(path): path for path in PACKAGE.rglob("*.py")}


def _imports(tree: ast.AST) -> dict[str, bool]:
  """Module of the package -> whether it is imported at the top."""
  found: dict[str, bool] = {}

  def walk(node: ast.AST, top: bool) -> None:
    for child in ast.iter_child_nodes(node):
      names = []
      if isinstance(child, ast.Import):
        names = [alias.name for alias in child.names]
      elif isinstance(child, ast.ImportFrom):
        names = [f"{child.module}.{alias.name}" for alias in child.names]
      for name in names:
        while name and name not in modules():
          name = name.rpartition(".")[0]
        if name and name != "cacheaug":
          found[name] = found.get(name, False) or top
      # `if __name__ == "__main__"` is as late as a function.
      late = isinstance(child, (ast.FunctionDef, ast.If))
      walk(child, top and not late)

  walk(tree, True)
  return found


@functools.cache
def _graph() -> dict[str, dict[str, bool]]:
  return {
    name: _imports(ast.parse(path.read_text()))
    for name, path in modules().items()
    if name != "cacheaug"
  }


def part(module: str) -> str:
  """'cacheaug.model.cache' -> 'model'; of a project its own name, too."""
  names = module.split(".")[1:]
  if ".".join(names) in _BOTTOM:
    return ".".join(names)
  return ".".join(names[: 2 if names[:1] == ["projects"] else 1])


def _defines_flags(path: Path) -> bool:
  """Whether the module defines flags of the process: it is a command."""
  calls = ast.walk(ast.parse(path.read_text()))
  names = [ast.unparse(c.func) for c in calls if isinstance(c, ast.Call)]
  return any(".DEFINE_" in name for name in names)


def _flags_at_import(path: Path) -> bool:
  body = ast.parse(path.read_text()).body
  calls = [n.value for n in body if isinstance(n, (ast.Expr, ast.Assign))]
  names = [ast.unparse(c.func) for c in calls if isinstance(c, ast.Call)]
  return any(".DEFINE_" in name for name in names)


@functools.cache
def _commands() -> set[str]:
  """The root's commands, as parts."""
  root = {m: p for m, p in modules().items() if m.count(".") == 1}
  return {part(m) for m, p in root.items() if _defines_flags(p)}


def _wrong(graph: dict[str, dict[str, bool]]) -> list[str]:
  """Every arrow that points the wrong way."""
  found = []
  for module, imported in graph.items():
    own = part(module)
    for name in imported:
      other = part(name)
      if other == own or other in _BOTTOM:
        continue
      only = _ONLY.get(own)
      project = other.startswith("projects") and own not in _commands()
      command = other in _commands() | _TRAINER and own not in _TRAINER
      outward = only is not None and other not in only
      if project or command or outward:
        found.append(f"{module} imports {other}")
  return found


def test_arrows_point_inwards():
  assert {"generate", "sweep", "export"} <= _commands()
  assert _wrong(_graph()) == []
  # Control: what would be wrong is seen.
  bad = {
    "cacheaug.model.cache": {"cacheaug.augment.traces": True},
    "cacheaug.evals.report": {"cacheaug.train": False},
    "cacheaug.inference.context": {"cacheaug.lm": True},
    "cacheaug.lm": {"cacheaug.projects.gating.report": True},
    "cacheaug.projects.sweep.rows": {"cacheaug.projects.planning.times": True},
    "cacheaug.projects.gating.report": {"cacheaug.export": False},
    "cacheaug.train": {"cacheaug.evals.report": True},
  }
  assert len(_wrong(bad)) == 6


def test_every_part_has_a_ring():
  """A new file of the root or folder needs a line in this file."""
  parts = {part(m) for m in modules()} - {"", "projects"}
  rest = {p for p in parts if not p.startswith("projects.")}
  assert rest - _ONLY.keys() - _TRAINER - _commands() == set()
  assert _ONLY.keys() <= parts
  assert not _ONLY.keys() & _commands()


def _acyclic(graph: dict[str, set[str]]) -> None:
  list(graphlib.TopologicalSorter(graph).static_order())


def test_no_import_cycle():
  """Neither of modules, whether at the top or later, nor of parts."""
  graph = {m: set(imported) - {m} for m, imported in _graph().items()}
  _acyclic(graph)
  by_part: dict[str, set[str]] = {}
  for module, imported in graph.items():
    others = {part(x) for x in imported} - {part(module)}
    by_part.setdefault(part(module), set()).update(others)
  _acyclic(by_part)
  # Control: one arrow back is a cycle.
  for closed, edge in ((graph, "cacheaug."), (by_part, "")):
    closed = closed | {f"{edge}errors": {f"{edge}train"}}
    with pytest.raises(graphlib.CycleError):
      _acyclic(closed)


def test_nobody_imports_main_and_train_is_for_main():
  users = {m for m, found in _graph().items() if "cacheaug.train" in found}
  assert users == {"cacheaug.main"}
  assert not [m for m, found in _graph().items() if "cacheaug.main" in found]


def test_commands_import_projects_when_they_are_asked_for():
  """But for the commands that are a project's own."""
  own = {"benchmark", "deliberate", "plan", "sweep"}
  early = {
    part(module)
    for module, imported in _graph().items()
    for name, top in imported.items()
    if top and part(name).startswith("projects") and "projects" not in module
  }
  assert early <= own


def test_commands_with_flags_are_imported_by_nobody():
  """absl's flags belong to the process: two commands may not meet in one."""
  commands = {m for m, path in modules().items() if _flags_at_import(path)}
  assert "cacheaug.generate" in commands
  for module, imported in _graph().items():
    assert not commands & set(imported), module


def _importable() -> list[str]:
  """Modules that a process may import together."""
  names = [m for m, path in modules().items() if not _flags_at_import(path)]
  # They stand between lm_eval and the rest, and import it.
  late = ("model", "tasks", "programs")
  late = [f"cacheaug.projects.lm_eval.{name}" for name in late]
  # Written beside an export's weights, for programs without this package.
  outside = "cacheaug.weights.transformers_side."
  return sorted(n for n in names if n not in late and outside not in n)


def _run(code: str, directory: Path) -> None:
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]


def test_importing_is_light():
  """In a process of its own, every module but those that define flags."""
  code = f"""
import importlib, sys, threading
import cacheaug
assert "jax" not in sys.modules, "import cacheaug imports jax"
names = {_importable()!r}
for name in names:
  importlib.import_module(name)
heavy = [name for name in {_HEAVY!r} if name in sys.modules]
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing looks for devices"
assert threading.active_count() == 1, threading.enumerate()
"""
  _run(code, ROOT)


def _projects() -> list[str]:
  folders = (PACKAGE / "projects").iterdir()
  return sorted(p.name for p in folders if (p / "__init__.py").exists())


def test_any_project_can_be_deleted(tmp_path):
  """What remains imports, in a copy without that one project."""
  projects, names = _projects(), _importable()
  assert len(projects) > 5
  ignore = shutil.ignore_patterns("assets", "__pycache__")
  for project in projects:
    copy = tmp_path / project / "cacheaug"
    shutil.copytree(PACKAGE, copy, ignore=ignore)
    shutil.rmtree(copy / "projects" / project)
  code = f"""
import importlib, sys
def purge():
  for name in [n for n in sys.modules if n.partition(".")[0] == "cacheaug"]:
    del sys.modules[name]
sys.path.insert(0, "")
for project in {projects!r}:
  purge()
  sys.path[0] = {str(tmp_path)!r} + "/" + project
  gone = "cacheaug.projects." + project
  own = {{"planning": "plan", "context_store": "deliberate"}}.get(project, "")
  for name in {names!r}:
    if not (name + ".").startswith(gone + "."):
      module = importlib.import_module(name)
      assert project in module.__file__, module.__file__
  # Control: it is not there.
  try:
    importlib.import_module(gone)
  except ImportError:
    pass
  else:
    raise AssertionError(gone + " is still there")
"""
  _run(code, tmp_path)


def test_the_afternoon_list_is_an_afternoon():
  paths = [PACKAGE / name for name in AFTERNOON]
  lines = sum(len(path.read_text().splitlines()) for path in paths)
  assert len(AFTERNOON) <= 24
  assert lines < _AFTERNOON_LINES
  # Control: with what is around the method it is no afternoon.
  for name, path in modules().items():
    if part(name) in ("weights", "inference", "evals"):
      lines += len(path.read_text().splitlines())
  assert lines > _AFTERNOON_LINES


def test_the_readme_names_the_afternoon_in_order():
  text = (ROOT / "README.md").read_text()
  at = text.index("an afternoon's reading")
  for name in AFTERNOON:
    at = text.index(name.rpartition("/")[2], at)
  assert at < text.index("Around it")


def test_the_root_is_small():
  files = list(PACKAGE.glob("*.py"))
  assert len(files) <= _ROOT_FILES, sorted(p.name for p in files)


def _asked_by_name(tree: ast.AST) -> int:
  """Places that compare with one kind of coprocessor, `Kind.NAME`."""
  sides = [
    side
    for node in ast.walk(tree)
    if isinstance(node, ast.Compare)
    for side in (node.left, *node.comparators)
  ]
  return sum(ast.unparse(side).startswith("Kind.") for side in sides)


def test_kinds_are_a_table():
  """What a kind does is its row; few places ask which kind it is."""
  paths = [path for path in modules().values() if path.name != "kinds.py"]
  asked = sum(_asked_by_name(ast.parse(p.read_text())) for p in paths)
  assert asked <= 10, asked
  # Control: such a place is seen, however it is written.
  text = "a.kind is Kind.PAUSE or Kind.PREFIX == b or c in (1, 2)"
  assert _asked_by_name(ast.parse(text)) == 2


def test_former_names_find_the_same_modules():
  for former, name in cacheaug._FORMER.items():
    # For `python -m`; the command's file is what runs.
    spec = importlib.util.find_spec(former)
    assert spec.origin == str(modules()[name])
    assert spec.loader.get_code(former).co_filename == spec.origin
    if not _flags_at_import(modules()[name]):
      assert importlib.import_module(former) is importlib.import_module(name)
      assert sys.modules[name].__spec__.name == name
  # What scripts of before call on one of them.
  former = importlib.import_module("cacheaug.model.pretrained")
  names = "resolve", "read_config", "load", "save", "stop_ids", "fingerprint"
  assert all(callable(getattr(former, name)) for name in names)
  with pytest.raises(ImportError):
    importlib.import_module("cacheaug.matchings")
