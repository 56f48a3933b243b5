"""A trained coprocessor as files that other frameworks can read.

`config.json` says what it is and which decoder it belongs to;
`coprocessor.safetensors` holds its transformer's weights under the names that
Hugging Face uses for the decoder's family (without embeddings and head),
`soft_tokens` [N, D] and, with the harmless start, `latent_projection` [D, D],
applied as hidden @ latent_projection. Of another `kind` than 'coprocessor' it
holds what that kind has: see augment/coprocessor.py.
"""

import pathlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from cacheaug.augment import coprocessor, point_sampling
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run.files import fetched, staged
from cacheaug.weights import (
  config_json,
  huggingface,
  leaves,
  transformers_files,
)
from cacheaug.weights import safetensors_io as files
from cacheaug.weights.leaves import Leaf

FORMAT = "cacheaug-coprocessor-1"
WEIGHTS = files.COPROCESSOR
_NO_DRAW = Draw()
_META = ("family", "variant", "decoder_fingerprint", "source")


def save_coprocessor(
  directory: str | pathlib.Path,
  *,
  model_config: ModelConfig,
  spec: Layout,
  params: Params,
  decoder_fingerprint: str,
  source: str,
  draw: Draw = _NO_DRAW,
  lora_rank: int = 0,
  report: str = "",
) -> None:
  """Writes config.json, coprocessor.safetensors, and transformers_files.py's.

  Args:
    directory: made if absent, local or gs://; files of the same names are
      replaced.
    model_config: of the decoder, which the coprocessor shares.
    spec: its layout; N, positions and start bind its user.
    params: of coprocessor.init_boxed, in the dtype to write.
    decoder_fingerprint: `pretrained.fingerprint` of the decoder.
    source: where the decoder came from, for a person.
    draw: how training drew its traces, for the record.
    lora_rank: of the LoRA that `params` have been merged with; 0 for none.
    report: Markdown of the run's report, for the model card.

  Raises:
    UserError: a directory that cannot be written.
  """
  entries = {
    "format": FORMAT,
    "family": model_config.family,
    "variant": spec.kind.variant,
    "decoder_fingerprint": decoder_fingerprint,
    "source": source,
    "model": config_json.config_entries(model_config),
  }
  if lora_rank:
    entries["lora_rank"] = lora_rank
  traces = point_sampling.to_entries(spec, draw)
  traces["positions"] = traces.pop("scheme")  # its name in exports
  entries |= traces
  tree = {k: v for k, v in params.items() if k != "transformer"}
  parts = _leaves(model_config, spec)
  body = params.get("transformer", {})
  with staged(directory) as local:
    huggingface.write_leaves(local / WEIGHTS, parts, body | tree, None)
    transformers_files.write(local, model_config, entries, report)
    files.write_json(local / "config.json", entries)


def load_coprocessor(
  directory: str | pathlib.Path,
  *,
  dtype: Any = "float32",
  shardings: Params | None = None,
) -> tuple[ModelConfig, Layout, Params, dict[str, Any]]:
  """What `save_coprocessor` wrote.

  Args:
    directory: an exported coprocessor, local or gs://.
    dtype: of every leaf.
    shardings: tree of shardings, as the parameters; the default device by
      default.

  Returns:
    (model config, layout, parameters, {family, variant, decoder_fingerprint,
    source, draw}).

  Raises:
    UserError: no export there, or a damaged one; names file and key.
  """
  with fetched(directory) as local:
    return _load(local, dtype, shardings)


def _load(
  directory: pathlib.Path, dtype: Any, shardings: Params | None
) -> tuple[ModelConfig, Layout, Params, dict[str, Any]]:
  path = directory / "config.json"
  if not path.exists():
    raise UserError(f"{path}: missing; give an exported coprocessor")
  entries = files.read_json(path)
  if entries.get("format") != FORMAT:
    raise UserError(
      f"{path}: format {entries.get('format')!r} is not {FORMAT!r}; give an "
      "exported coprocessor, not a decoder"
    )
  for key in ("model", "positions", *point_sampling.REQUIRED, *_META):
    if key not in entries:
      raise UserError(f"{path}: has no {key!r}; export the coprocessor again")
  config = config_json.config_from_entries(entries["model"], path)
  traces = entries | {"scheme": entries["positions"]}
  spec, draw = point_sampling.from_entries(traces)
  variant = spec.kind.variant
  if entries["variant"] != variant:
    raise UserError(
      f"{path}: variant {entries['variant']!r} is not supported: of kind "
      f"{spec.kind!r} it is {variant!r}"
    )
  params = _read(directory / WEIGHTS, _leaves(config, spec), dtype, shardings)
  meta = {key: entries[key] for key in _META}
  return config, spec, params, meta | {"draw": draw}


def _leaves(config: ModelConfig, spec: Layout) -> list[Leaf]:
  """Of the transformer, then what else a coprocessor of that kind has."""
  make = partial(coprocessor.init_boxed, Transformer(config), spec)
  tree = nn.unbox(jax.eval_shape(make, jax.random.key(0)))
  body = leaves.flatten(tree.pop("transformer", {}))
  parts = [leaf for leaf in leaves.leaves_of(config) if leaf.path in body]
  order = ("soft_tokens", "latent_projection", "prefix_keys", "prefix_values")
  order += ("kv_bias",)
  names = [name for name in order if name in tree]
  return parts + [Leaf(name, tree[name].shape, (name,)) for name in names]


def _read(
  path: pathlib.Path, parts: list[Leaf], dtype: Any, shardings: Params | None
) -> Params:
  if not path.exists():
    raise UserError(f"{path}: missing; export the coprocessor again")
  if shardings is not None:
    own = {k: v for k, v in shardings.items() if k != "transformer"}
    shardings = shardings.get("transformer", {}) | own
  where = {name: (path, name) for name in files.headers([path])}
  huggingface.check_tensors(path, parts, where)
  tree = leaves.read_leaves(parts, where, dtype, shardings, files.read)
  keys = [key for key in ("blocks", "final_norm") if key in tree]
  body = {key: tree.pop(key) for key in keys}
  return {"transformer": body, **tree} if body else tree
