"""The files against their own rules: length, types, docstrings, shapes."""

import ast
import functools

from test_layout import BENCHMARKS, ROOT, modules, part

_LINES = 500
# Where every array has its shape beside it.
_MATHS = ("model", "augment", "kernels", "inference")


def _files() -> list:
  places = ("cacheaug", "tests", "benchmarks", "configs", "docs")
  found = [p for place in places for p in (ROOT / place).rglob("*.py")]
  return [*found, ROOT / "setup.py"]


def test_files_are_short():
  long = {
    str(path.relative_to(ROOT))
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
  paths = modules() | {f"benchmarks.{p.stem}": p for p in BENCHMARKS}
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
  for module, path in modules().items():
    if part(module) in _MATHS:
      text = path.read_text()
      for name, node in _public(ast.parse(text).body):
        if shapeless := _shapeless(node, text.splitlines()):
          found[f"{module}.{name}"] = shapeless
  assert not found
  # Control: what would be wrong is seen.
  text = "def f(\n  x: jax.Array,  # [B]\n  y: jax.Array | None,\n): pass"
  assert _shapeless(ast.parse(text).body[0], text.splitlines()) == ["y"]
