"""Differentiable cache augmentation (arXiv 2412.17747) in JAX.

  lm = cacheaug.load("path/to/gemma-2-2b").with_coprocessor("runs/gemma2b")
  lm.generate(["Natalia sold clips to"], max_new_tokens=128)

See lm.py. Nothing is imported until it is used: jax takes seconds.
"""

__all__ = ("LM", "UserError", "load")
_HOMES = {"LM": "lm", "load": "lm", "UserError": "errors"}


def __getattr__(name: str) -> object:
  if name not in _HOMES:
    raise AttributeError(f"module 'cacheaug' has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(f"cacheaug.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
