"""A decoder from wherever it is: each function takes what `resolve` returns.

a directory    Hugging Face's layout (huggingface.py)
               Google's checkpoints of Gemma-2 (google_gemma.py)
shipped:NAME   a directory in the package
"""

import pathlib
from types import ModuleType
from typing import Any

from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params
from cacheaug.weights import gguf_io, google_gemma, huggingface

SHIPPED = "shipped:"
_ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"


def resolve(path: str) -> pathlib.Path:
  """The directory or file that `path` names.

  Raises:
    UserError: there is none.
  """
  if path.startswith(SHIPPED):
    found = _ASSETS / path.removeprefix(SHIPPED)
    if not (found / "config.json").exists():
      names = sorted(p.parent.name for p in _ASSETS.glob("*/config.json"))
      known = ", ".join(SHIPPED + name for name in names) or "none"
      raise UserError(f"{path}: no such decoder in the package ({known})")
    return found
  found = pathlib.Path(path).expanduser()
  if gguf_io.is_gguf(found) and not found.is_dir():
    if not found.exists():
      raise UserError(f"{path}: no such file of weights")
    return found
  if not found.is_dir():
    raise UserError(f"{path}: no such directory of weights")
  return found


def _format(path: pathlib.Path) -> ModuleType:
  """The module that reads what lies at `path`."""
  if gguf_io.is_gguf(path):
    return gguf_io
  plain = (path / "config.json").exists() or not google_gemma.find(path)
  return huggingface if plain else google_gemma


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """A decoder's ModelConfig.

  Raises:
    UserError: nothing of the kind there, another family, or a feature that is
      not supported; names the file and the key.
  """
  path = pathlib.Path(path)
  return _format(path).read_config(path)


def load(
  path: str | pathlib.Path,
  config: ModelConfig,
  *,
  dtype: Any,
  shardings: Params | None = None,
) -> Params:
  """A decoder's parameters.

  Args:
    path: of `resolve`.
    config: from `read_config`, or what is expected.
    dtype: of every leaf.
    shardings: tree of shardings, as the result; the default device by
      default.

  Returns:
    The unboxed tree of `transformer.init`.

  Raises:
    UserError: files missing or damaged, or tensors of other names or shapes.
  """
  path = pathlib.Path(path)
  return _format(path).load(path, config, dtype=dtype, shardings=shardings)


def stop_ids(path: str | pathlib.Path) -> tuple[int, ...]:
  """Ids of the tokens that end generation; () where no file names any."""
  path = pathlib.Path(path)
  reader = _format(path)
  return () if reader is google_gemma else reader.stop_ids(path)


def quantisation(path: str | pathlib.Path) -> str:
  """The types that weights were quantised in, 'Q4_K, Q6_K'; '' for none."""
  path = pathlib.Path(path)
  return gguf_io.quantisation(path) if gguf_io.is_gguf(path) else ""
