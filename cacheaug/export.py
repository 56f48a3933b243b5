"""A trained coprocessor as files that other frameworks can read.

`config.json` says what it is and which decoder it belongs to;
`coprocessor.safetensors` holds its transformer's weights under the names that
Hugging Face uses for the decoder's family (without embeddings and head),
`soft_tokens` [N, D] and, with the harmless start, `latent_projection` [D, D],
applied as hidden @ latent_projection. See augment/coprocessor.py.
"""

import dataclasses
import pathlib
from typing import Any

from cacheaug.augment.traces import TraceSpec
from cacheaug.errors import UserError
from cacheaug.model import families, pretrained
from cacheaug.model import safetensor_files as files
from cacheaug.model.config import ModelConfig
from cacheaug.model.pretrained import Leaf
from cacheaug.model.transformer import Params

FORMAT = "cacheaug-coprocessor-1"
WEIGHTS = "coprocessor.safetensors"
VARIANT = "embeddings"  # the latents are input embeddings of the decoder
# TraceSpec's field -> key of config.json, where the two differ.
_SPEC_KEYS = {"scheme": "positions"}
_META = ("family", "variant", "decoder_fingerprint", "source")


def save_coprocessor(
  directory: str | pathlib.Path,
  *,
  model_config: ModelConfig,
  spec: TraceSpec,
  params: Params,
  decoder_fingerprint: str,
  source: str,
) -> None:
  """Writes config.json and coprocessor.safetensors.

  Args:
    directory: made if absent; files of the same names are replaced.
    model_config: of the decoder, which the coprocessor shares.
    spec: how it was trained; N, positions and start bind its user.
    params: {transformer, soft_tokens, latent_projection?}, in the dtype to
      write.
    decoder_fingerprint: `pretrained.fingerprint` of the decoder.
    source: where the decoder came from, for a person.

  Raises:
    UserError: a directory that cannot be written.
  """
  directory = pathlib.Path(directory)
  entries = {
    "format": FORMAT,
    "family": model_config.family,
    "variant": VARIANT,
    "decoder_fingerprint": decoder_fingerprint,
    "source": source,
    "model": families.config_entries(model_config),
  }
  for field in dataclasses.fields(TraceSpec):
    key = _SPEC_KEYS.get(field.name, field.name)
    entries[key] = getattr(spec, field.name)
  tree = {k: v for k, v in params.items() if k != "transformer"}
  leaves = _leaves(model_config, spec)
  pretrained.write_leaves(
    directory / WEIGHTS, leaves, params["transformer"] | tree, None
  )
  files.write_json(directory / "config.json", entries)


def load_coprocessor(
  directory: str | pathlib.Path,
  *,
  dtype: Any = "float32",
  shardings: Params | None = None,
) -> tuple[ModelConfig, TraceSpec, Params, dict[str, Any]]:
  """What `save_coprocessor` wrote.

  Args:
    directory: an exported coprocessor.
    dtype: of every leaf.
    shardings: tree of shardings, as the parameters; the default device by
      default.

  Returns:
    (model config, spec, parameters, {family, variant, decoder_fingerprint,
    source}).

  Raises:
    UserError: no export there, or a damaged one; names file and key.
  """
  directory = pathlib.Path(directory)
  path = directory / "config.json"
  if not path.exists():
    raise UserError(f"{path}: missing; give an exported coprocessor")
  entries = files.read_json(path)
  if entries.get("format") != FORMAT:
    raise UserError(
      f"{path}: format {entries.get('format')!r} is not {FORMAT!r}; give an "
      "exported coprocessor, not a decoder"
    )
  fields = dataclasses.fields(TraceSpec)
  keys = {f.name: _SPEC_KEYS.get(f.name, f.name) for f in fields}
  for key in ("model", *keys.values(), *_META):
    if key not in entries:
      raise UserError(f"{path}: has no {key!r}; export the coprocessor again")
  if entries["variant"] != VARIANT:
    raise UserError(
      f"{path}: variant {entries['variant']!r} is not supported ({VARIANT})"
    )
  config = families.config_from_entries(entries["model"], path)
  spec = TraceSpec(**{name: entries[key] for name, key in keys.items()})
  params = _read(directory / WEIGHTS, _leaves(config, spec), dtype, shardings)
  return config, spec, params, {key: entries[key] for key in _META}


def _leaves(config: ModelConfig, spec: TraceSpec) -> list[Leaf]:
  """Of the transformer (blocks and final norm), then of the coprocessor."""
  n, d = spec.latents, config.width
  leaves = [
    leaf
    for leaf in pretrained.leaves_of(config)
    if leaf.path.startswith(("blocks/", "final_norm/"))
  ]
  leaves.append(Leaf("soft_tokens", (n, d), ("soft_tokens",)))
  if spec.start == "harmless":
    name = "latent_projection"
    leaves.append(Leaf(name, (d, d), (name,)))
  return leaves


def _read(
  path: pathlib.Path, leaves: list[Leaf], dtype: Any, shardings: Params | None
) -> Params:
  if not path.exists():
    raise UserError(f"{path}: missing; export the coprocessor again")
  if shardings is not None:
    own = {k: v for k, v in shardings.items() if k != "transformer"}
    shardings = shardings["transformer"] | own
  where = {name: (path, name) for name in files.headers([path])}
  pretrained.check_tensors(path, leaves, where)
  tree = pretrained.read_leaves(leaves, where, dtype, shardings)
  body = {key: tree.pop(key) for key in ("blocks", "final_norm")}
  return {"transformer": body, **tree}
