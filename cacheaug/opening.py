"""The decoder and coprocessor that a command's flags name."""

import pathlib

import cacheaug
from cacheaug.errors import UserError
from cacheaug.lm import LM
from cacheaug.weights import safetensors_io as files

_DECODER, _COPROCESSOR = "shipped:tiny", "shipped:tiny_coprocessor"


def open_lm(
  workdir: str, decoder: str, coprocessor: str, latents: bool | None = None
) -> LM:
  """The decoder and, with latents, the coprocessor that the flags name.

  Args:
    workdir: a run, whose decoder and coprocessor are meant, or ''.
    decoder: a directory, or ''.
    coprocessor: an export or a run, or ''.
    latents: False opens the decoder alone, True needs a coprocessor; None
      takes the one that is named, if any.

  Raises:
    UserError: paths that do not fit together, or hold nothing of the kind.
  """
  if workdir and coprocessor:
    raise UserError("--workdir and --coprocessor: give one of the two")
  if workdir:
    coprocessor = workdir
    decoder = decoder or _decoder_of(workdir)
  elif not decoder:
    decoder = _DECODER
    coprocessor = coprocessor or _COPROCESSOR
  if latents and not coprocessor:
    raise UserError(
      "--coprocessor is missing: give the decoder's, or --latents=off"
    )
  lm = cacheaug.load(decoder)
  if latents is False or not coprocessor:
    return lm
  return lm.with_coprocessor(coprocessor)


def latents_of(flag: str | None) -> bool | None:
  """--latents as `open_lm` takes it; unset, there are latents where a
  coprocessor is named.
  """
  return None if flag is None else flag == "on"


def _decoder_of(workdir: str) -> str:
  path = pathlib.Path(workdir).expanduser() / "config.json"
  if not path.exists():
    raise UserError(f"{path}: missing; give the --workdir of a run")
  try:
    decoder = files.read_json(path)["decoder"]["path"]
  except (KeyError, TypeError) as e:
    raise UserError(
      f"{path}: not a run's config; give the --workdir of a run"
    ) from e
  if not decoder:
    raise UserError(
      f"{workdir}: this run has no decoder.path (it is random, or the run "
      "trains one: export it with --decoder); give --decoder=DIR"
    )
  return decoder
