"""Differentiable cache augmentation (arXiv 2412.17747) in JAX.

  lm = cacheaug.load("path/to/gemma-2-2b").with_coprocessor("runs/gemma2b")
  lm.generate(["Natalia sold clips to"], max_new_tokens=128)

See build.py and lm.py. Nothing is imported until it is used: jax takes seconds.
"""

import sys

__all__ = ("LM", "UserError", "load")
_HOMES = {"LM": "lm", "load": "build", "UserError": "errors"}


# Former names of modules, read for one release more (0.1 had them).
_FORMER = {
  "cacheaug.matching": "cacheaug.projects.sweep.equal_cost",
  "cacheaug.sweeping": "cacheaug.projects.sweep",
  "cacheaug.sweeping.rows": "cacheaug.projects.sweep.rows",
  "cacheaug.evals.gating": "cacheaug.projects.gating.report",
  "cacheaug.evals.lm_eval_model": "cacheaug.projects.lm_eval.model",
  "cacheaug.evals.paired": "cacheaug.evals.bootstrap",
  "cacheaug.inference.store": "cacheaug.projects.context_store.store",
  "cacheaug.decoders": "cacheaug.weights.published",
  "cacheaug.model.pretrained": "cacheaug.weights.pretrained",
  "cacheaug.model.families": "cacheaug.weights.config_json",
  "cacheaug.data.packed": "cacheaug.data.shards",
}


class _FormerNames:
  """Finds modules by their former names: the same module, not a copy of it."""

  @staticmethod
  def find_spec(name, path=None, target=None):  # noqa: D102
    if name not in _FORMER:
      return None
    from importlib import util

    origin = util.find_spec(_FORMER[name]).origin
    return util.spec_from_loader(name, _FormerNames, origin=origin)

  @staticmethod
  def create_module(spec):  # noqa: D102
    import importlib

    module = importlib.import_module(_FORMER[spec.name])
    spec.loader_state = module.__spec__
    return module

  @staticmethod
  def exec_module(module):  # noqa: D102
    # The import system has put the former name's spec into the module.
    module.__spec__ = module.__spec__.loader_state

  @staticmethod
  def get_code(name):  # noqa: D102
    # For `python -m`.
    from importlib import util

    return util.find_spec(_FORMER[name]).loader.get_code(_FORMER[name])


# First: a package reached by its former name would find its files itself.
sys.meta_path.insert(0, _FormerNames)


def __getattr__(name: str) -> object:
  if name not in _HOMES:
    raise AttributeError(f"module 'cacheaug' has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(f"cacheaug.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
