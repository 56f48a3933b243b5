"""Repositories of the Hugging Face hub, by the huggingface_hub library.

  ORG/NAME             a decoder or an exported coprocessor
  ORG/NAME@REVISION    a branch, tag or commit of it
  ORG/NAME/FILE.gguf   one file of a repository of GGUF files

The library keeps what it has downloaded below HF_HOME; HF_HUB_OFFLINE=1 keeps
it from asking the hub, HF_TOKEN or `hf auth login` opens gated repositories.
Only the files that are read here are downloaded, and no pickle.
"""

import functools
import os
import pathlib
import re

from cacheaug.errors import UserError, one_line
from cacheaug.weights import safetensors_io

_SPEC = re.compile(
  r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?P<file>/[\w./-]+\.gguf)?"
  r"(@(?P<revision>[\w./-]+))?"
)
_WEIGHTS = (
  safetensors_io.SINGLE,
  safetensors_io.INDEX,
  safetensors_io.COPROCESSOR,
)
_FILES = (
  *_WEIGHTS,
  "model-*.safetensors",
  "README.md",  # its licence
  "config.json",
  "generation_config.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "chat_template.json",
  "additional_chat_templates/*.jinja",
)


def is_spec(path: str) -> bool:
  """Whether `path` could name a repository, or a file of one."""
  return _SPEC.fullmatch(path) is not None


@functools.cache
def download(spec: str) -> pathlib.Path:
  """Brings what `spec` names into the library's cache.

  Asks the hub once in a process, and not at all where HF_HUB_OFFLINE is set.

  Returns:
    The directory of the repository's files, or the GGUF file.

  Raises:
    UserError: no such repository or revision, one that is gated, no network,
      or nothing in the repository that can be read.
  """
  import huggingface_hub
  from huggingface_hub import errors

  match = _SPEC.fullmatch(spec)
  name, file, revision = match["name"], match["file"], match["revision"]
  try:
    if file:
      return pathlib.Path(
        huggingface_hub.hf_hub_download(name, file[1:], revision=revision)
      )
    found = pathlib.Path(
      huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=list(_FILES)
      )
    )
  except errors.HFValidationError as e:
    raise UserError(f"{spec}: no such directory ({one_line(e)})") from e
  except (errors.HfHubHTTPError, OSError, ValueError) as e:
    raise UserError(_explained(spec, name, e)) from e
  if not any((found / weights).exists() for weights in _WEIGHTS):
    raise UserError(
      f"{spec}: the repository has no {safetensors_io.SINGLE} at its top, "
      "pickles are never read: take a release with safetensors, or name one "
      f"GGUF file, as {name}/FILE.gguf"
    )
  return found


def _explained(spec: str, name: str, error: Exception) -> str:
  """One line for what the library raises."""
  from huggingface_hub import constants, errors

  hub = constants.ENDPOINT.partition("://")[2]
  missing = f"{spec}: no such directory here"
  if isinstance(error, errors.GatedRepoError):
    return (
      f"{spec}: gated: accept its licence at {hub}/{name}, then run `hf auth "
      "login` or set HF_TOKEN"
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return (
      f"{missing}, and {hub} shows no such repository (a private one needs "
      "`hf auth login` or HF_TOKEN)"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return f"{spec}: {hub}/{name} has no such revision"
  if isinstance(error, errors.RemoteEntryNotFoundError):
    return f"{spec}: {hub}/{name} has no such file"
  elsewhere = (
    f"run `hf download {name} --local-dir=DIR` on a machine with a network "
    "and give that DIR"
  )
  if _is_offline(error):
    return (
      f"{missing}, HF_HUB_OFFLINE is set and the cache has none: {elsewhere}"
    )
  if isinstance(error, OSError) and error.errno is not None:
    where = error.filename or constants.HF_HUB_CACHE
    return (
      f"{spec}: cannot be downloaded to {where} ({os.strerror(error.errno)})"
    )
  return f"{missing}, and {hub} does not answer ({_cause(error)}): {elsewhere}"


def _is_offline(error: BaseException | None) -> bool:
  from huggingface_hub import errors

  while error is not None:
    if isinstance(error, errors.OfflineModeIsEnabled):
      return True
    error = error.__cause__ or error.__context__
  return False


def _cause(error: BaseException) -> str:
  """The first error of a chain, in one line."""
  while error.__cause__ is not None:
    error = error.__cause__
  return f"{type(error).__name__}: {one_line(error)}"[:120]
