"""A decoder from wherever it is: each function takes what `resolve` returns.

- a directory in Hugging Face's layout (huggingface.py), or one of Google's
  checkpoints of Gemma-2 (google_gemma.py)
- FILE.gguf, llama.cpp's format, dequantised (gguf_io.py)
- ORG/NAME, a repository of the Hugging Face hub (hub.py)
- shipped:NAME, a directory in the package
"""

import pathlib
from types import ModuleType
from typing import Any

from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params
from cacheaug.weights import gguf_io, google_gemma, hub, huggingface, leaves

SHIPPED = "shipped:"
_ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"

# Whatever was read is written in Hugging Face's layout.
save = huggingface.save
fingerprint = leaves.fingerprint


def resolve(path: str) -> pathlib.Path:
  """The directory or file that `path` names; downloads what is on the hub.

  What exists here is taken before a repository of the same name.

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
  if found.is_dir() or (gguf_io.is_gguf(found) and found.is_file()):
    return found
  if hub.is_spec(path):
    return hub.download(path)
  kind = "file" if gguf_io.is_gguf(found) else "directory"
  raise UserError(f"{path}: no such {kind} of weights")


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
