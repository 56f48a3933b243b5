"""The tree against its own rules: imports, file lengths, public functions.

architecture: main -> train -> {augment, data, evals, checkpoint, ...} -> model.
"""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = _ROOT / "cacheaug"
_BENCHMARKS = tuple((_ROOT / "benchmarks").glob("*.py"))

# What a part may import of the package, all else being refused.
_ONLY = {
  "errors": set(),
  "checksum": set(),
  "chips": set(),
  "preemption": set(),
  "provenance": set(),
  "storage": set(),
  "kernels": set(),
  "model": {"kernels", "checksum", "errors"},
  "augment": {"model", "kernels", "errors"},
  "data": {"errors"},
  "inference": {"augment", "model", "data", "checksum", "errors"},
  "objectives": {"augment", "errors"},
  "sharding": {"model", "errors"},
  "optim": {"errors"},
  "profiling": {"errors"},
  "heartbeat": {"storage"},
  "metrics": {"storage", "errors"},
  "workdir": {"storage", "errors"},
  "checkpoint": {"storage", "checksum", "errors"},
}
# The trainer, what is built on it, and commands.
_TRAINER = {"main", "train", "stepping", "planning", "plan", "benchmark"}
_NEVER = {
  "evals": _TRAINER | {"sweeping"},
  "lm": _TRAINER | {"evals"},
  "export": _TRAINER | {"evals", "inference"},
  "config": _TRAINER | {"evals", "inference"},
}
# The one module that stands above its part: an LM with a store.
_ABOVE = {("cacheaug.projects.context_store.lm", "cacheaug.lm")}
# Edges inside functions that would close a cycle were they at the top.
_LATE = {
  # traces.py is the command that users know; its drawing builds on it.
  ("cacheaug.augment.traces", "cacheaug.augment.drawing"),
}
_LINES = 500
# Where every array has its shape beside it.
_MATHS = ("model", "augment", "kernels", "inference")
# Packages that take seconds or are optional: only what uses them imports them.
_HEAVY = (
  "array_record",
  "gcsfs",
  "lm_eval",
  "matplotlib",
  "sentencepiece",
  "tensorflow",
  "tensorflow_datasets",
  "torch",
  "transformers",
)


def _module(path: Path) -> str:
  parts = path.relative_to(_ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _modules() -> dict[str, Path]:
  return {_module(path): path for path in _PACKAGE.rglob("*.py")}


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
        while name and name not in _modules():
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
    for name, path in _modules().items()
  }


def _part(module: str) -> str:
  """'cacheaug.model.cache' -> 'model'."""
  return (module.split(".") + ["", ""])[1]


def _wrong(graph: dict[str, dict[str, bool]]) -> list[str]:
  """Every arrow that points the wrong way."""
  found = []
  for module, imported in graph.items():
    part = _part(module)
    for name in imported:
      other = _part(name)
      if other == part or (module, name) in _ABOVE:
        continue
      only, never = _ONLY.get(part), _NEVER.get(part, set())
      if other in never or (only is not None and other not in only):
        found.append(f"{module} imports {other}")
  return found


def test_arrows_point_one_way():
  assert _wrong(_graph()) == []
  # Control: what would be wrong is seen.
  bad = {
    "cacheaug.model.cache": {"cacheaug.augment.traces": True},
    "cacheaug.evals.report": {"cacheaug.train": False},
    "cacheaug.projects.context_store.store": {"cacheaug.lm": True},
    "cacheaug.train": {"cacheaug.evals.report": True},
  }
  assert len(_wrong(bad)) == 3


def test_parts_form_no_cycle():
  """Packages and modules of the top level, each as one."""
  graph: dict[str, set[str]] = {}
  for module, imported in _graph().items():
    others = {_part(x) for x in imported if (module, x) not in _ABOVE}
    graph.setdefault(_part(module), set()).update(others - {_part(module)})
  list(graphlib.TopologicalSorter(graph).static_order())
  # Control: with what stands above its part there is one.
  for module, other in _ABOVE:
    assert other in _graph()[module], "not needed in _ABOVE any more"
    graph[_part(module)].add(_part(other))
  with pytest.raises(graphlib.CycleError):
    list(graphlib.TopologicalSorter(graph).static_order())


def test_nobody_imports_main_and_train_is_for_what_builds_on_it():
  users = {m for m, found in _graph().items() if "cacheaug.train" in found}
  assert "cacheaug.main" in users
  assert not [m for m, found in _graph().items() if "cacheaug.main" in found]


def test_no_import_cycle():
  graph = {
    module: {
      other
      for other in imported
      if other != module and (module, other) not in _LATE
    }
    for module, imported in _graph().items()
  }
  list(graphlib.TopologicalSorter(graph).static_order())
  # Control: with the late edges there is one.
  for module, other in _LATE:
    assert other in _graph()[module], "not needed in _LATE any more"
    graph[module].add(other)
  with pytest.raises(graphlib.CycleError):
    list(graphlib.TopologicalSorter(graph).static_order())


def _defines_flags(path: Path) -> bool:
  """Whether importing the module defines flags of the process."""
  body = ast.parse(path.read_text()).body
  calls = [n.value for n in body if isinstance(n, (ast.Expr, ast.Assign))]
  names = [ast.unparse(c.func) for c in calls if isinstance(c, ast.Call)]
  return any(".DEFINE_" in name for name in names)


def test_commands_with_flags_are_imported_by_nobody():
  """absl's flags belong to the process: two commands may not meet in one."""
  commands = {m for m, path in _modules().items() if _defines_flags(path)}
  assert "cacheaug.generate" in commands
  for module, imported in _graph().items():
    assert not commands & set(imported), module


def test_importing_is_light():
  """In a process of its own, every module but those that define flags."""
  names = [m for m, path in _modules().items() if not _defines_flags(path)]
  # Those that stand between lm_eval and the rest are imported when asked for.
  names = [m for m in names if not m.startswith("cacheaug.evals.lm_eval_")]
  code = f"""
import importlib, sys, threading
import cacheaug
assert "jax" not in sys.modules, "import cacheaug imports jax"
names = {sorted(names)!r}
for name in names:
  importlib.import_module(name)
heavy = [name for name in {_HEAVY!r} if name in sys.modules]
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing looks for devices"
assert threading.active_count() == 1, threading.enumerate()
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]


def _files() -> list[Path]:
  places = ("cacheaug", "tests", "benchmarks", "configs", "docs")
  found = [p for place in places for p in (_ROOT / place).rglob("*.py")]
  return [*found, _ROOT / "setup.py"]


def test_files_are_short():
  long = {
    str(path.relative_to(_ROOT))
    for path in _files()
    if len(path.read_text().splitlines()) > _LINES
  }
  assert not long


def _public(body: list[ast.stmt], prefix: str = ""):
  """Public functions and methods of public classes, with their names.

  Those that Python calls, such as __init__ and __call__, are among them.
  """
  for node in body:
    private = getattr(node, "name", "_").startswith("_")
    if isinstance(node, ast.ClassDef) and not private:
      yield from _public(node.body, f"{node.name}.")
    elif isinstance(node, ast.FunctionDef):
      if not private or node.name.endswith("__"):
        yield f"{prefix}{node.name}", node


@functools.cache
def _functions() -> dict[str, ast.FunctionDef]:
  """Every public function of the package and of benchmarks/."""
  paths = _modules() | {f"benchmarks.{p.stem}": p for p in _BENCHMARKS}
  return {
    f"{module}.{name}": node
    for module, path in paths.items()
    for name, node in _public(ast.parse(path.read_text()).body)
  }


def _untyped(node: ast.FunctionDef) -> list[str]:
  """Arguments without a type, and 'return'."""
  static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
  arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
  arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
  if arguments and not static and arguments[0].arg in ("self", "cls"):
    arguments = arguments[1:]
  names = [a.arg for a in arguments if a.annotation is None]
  makes = node.name in ("__init__", "__post_init__")  # and so returns None
  return names + ([] if makes or node.returns else ["return"])


def test_public_functions_have_types():
  missing = {name: _untyped(node) for name, node in _functions().items()}
  assert not {k: v for k, v in missing.items() if v}
  # Control: what would be wrong is seen.
  (node,) = ast.parse("def f(self, a, *b, c: int = 0, **d): pass").body
  assert _untyped(node) == ["a", "b", "d", "return"]


def _unsaid(node: ast.FunctionDef) -> list[str]:
  """UserErrors that the body raises and the docstring does not mention."""
  raised = [n.exc for n in ast.walk(node) if isinstance(n, ast.Raise)]
  names = {ast.unparse(e.func) for e in raised if isinstance(e, ast.Call)}
  said = ast.get_docstring(node) or ""
  return [name for name in names & {"UserError"} if name not in said]


def test_docstrings_say_what_is_raised():
  """But for commands, whose users read it, and what a class says itself."""
  silent = [name for name, node in _functions().items() if _unsaid(node)]
  assert not [name for name in silent if not name.endswith((".main", "__"))]
  # Control: a command shows that what is silent is found.
  assert "cacheaug.generate.main" in silent


def _shapeless(node: ast.FunctionDef, lines: list[str]) -> list[str]:
  """Array arguments without a shape on their line or in the docstring."""
  found = []
  for a in [*node.args.args, *node.args.kwonlyargs]:
    types = ast.unparse(a.annotation).split(" | ") if a.annotation else []
    # A number will do for those that may be one; a key has no axes of ours.
    array = "jax.Array" in types and "int" not in types and a.arg != "key"
    comment = lines[a.lineno - 1].partition("#")[2]
    if array and "[" not in comment + (ast.get_docstring(node) or ""):
      found.append(a.arg)
  return found


def test_arrays_have_shapes():
  found = {}
  for module, path in _modules().items():
    if _part(module) in _MATHS:
      text = path.read_text()
      for name, node in _public(ast.parse(text).body):
        if shapeless := _shapeless(node, text.splitlines()):
          found[f"{module}.{name}"] = shapeless
  assert not found
  # Control: what would be wrong is seen.
  text = "def f(\n  x: jax.Array,  # [B]\n  y: jax.Array | None,\n): pass"
  assert _shapeless(ast.parse(text).body[0], text.splitlines()) == ["y"]
