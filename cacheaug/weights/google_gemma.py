"""Google's own Gemma-2 checkpoints, the Orbax directories of its releases.

No released checkpoint was at hand where this was written and tested: the
layout is that of the published library (github.com/google-deepmind/gemma:
modules.py, transformer.py, gm/ckpts), with axis letters V D L H K E F:

  embedder/input_embedding          [V, D]
  final_norm/scale                  [D]
  layer_{i}/attn/q_einsum/w         [H, D, E]
  layer_{i}/attn/kv_einsum/w        [2, K, D, E]: keys, values
  layer_{i}/attn/attn_vec_einsum/w  [H, E, D]
  layer_{i}/mlp/gating_einsum       [2, D, F] (2B) or [2, F, D] (9B, 27B):
                                    gate, up
  layer_{i}/mlp/linear              [F, D]
  layer_{i}/{norm}/scale            [D], four of them

Released checkpoints are flat, 'transformer/layer_0/mlp/linear' -> {'w': ...};
those that the library saves are nested, without 'transformer' and without the
'w' in `mlp`. Both are read, in Zarr files or in OCDBT, an array at a time:
Orbax itself would want the whole tree in the checkpoint's layout, on devices,
before it could be transposed and stacked to ours.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from cacheaug.errors import UserError, one_line
from cacheaug.model import config as model_config
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params
from cacheaug.weights import leaves as layout

Shape = tuple[int, ...]

_MARKERS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
# Rows of the embedding -> tokens: the releases' last 128 rows are padding,
# which Hugging Face's weights are without.
_TOKENS = {256_128: 256_000}
# (L, D) of 27B, the one release whose queries are scaled by (D / H) ** -0.5.
_QUERY_SCALES = {(46, 4608): (4608 / 32) ** -0.5}
_EMBEDDING = "embedder/input_embedding"
_GATING = "layer_{}/mlp/gating_einsum"
# Our leaf -> its array and, where there are two in one, which.
_SOURCES: dict[str, tuple[str, int | None]] = {
  "embedder/embedding": (_EMBEDDING, None),
  "final_norm/scale": ("final_norm/scale", None),
  "blocks/attention/q/kernel": ("layer_{}/attn/q_einsum", None),
  "blocks/attention/k/kernel": ("layer_{}/attn/kv_einsum", 0),
  "blocks/attention/v/kernel": ("layer_{}/attn/kv_einsum", 1),
  "blocks/attention/o/kernel": ("layer_{}/attn/attn_vec_einsum", None),
  "blocks/mlp/gate/kernel": (_GATING, 0),
  "blocks/mlp/up/kernel": (_GATING, 1),
  "blocks/mlp/down/kernel": ("layer_{}/mlp/linear", None),
}
_SOURCES |= {
  f"blocks/{ours}_norm/scale": (f"layer_{{}}/{theirs}_norm/scale", None)
  for ours, theirs in (
    ("attention", "pre_attention"),
    ("attention_post", "post_attention"),
    ("mlp", "pre_ffw"),
    ("mlp_post", "post_ffw"),
  )
}


def find(directory: str | pathlib.Path) -> pathlib.Path | None:
  """The Orbax checkpoint that `directory` is, or the only one in it."""
  directory = pathlib.Path(directory)
  # What is downloaded is one level up, where the tokenizer is too.
  for level in ([directory], directory.glob("*/")):
    found = [p for p in level if any((p / m).exists() for m in _MARKERS)]
    if len(found) == 1:
      return found[0]
  return None


# --- arrays -----------------------------------------------------------------


def _open(directory: str | pathlib.Path) -> dict[str, ts.TensorStore]:
  """Every array, opened but not read, by its name without prefix and 'w'."""
  checkpoint = find(directory)
  if checkpoint is None:
    raise UserError(f"{directory}: holds no Orbax checkpoint, or several")
  store: dict[str, Any] = {"driver": "file", "path": f"{checkpoint.resolve()}/"}
  if (checkpoint / "manifest.ocdbt").exists():
    store = {"driver": "ocdbt", "base": store}
  try:
    keys = ts.KvStore.open(store).result().list().result()
  except Exception as e:  # tensorstore raises many types.
    raise _damaged(directory, "the list of arrays", e) from e
  opening = {}
  for key in sorted(k.decode() for k in keys):
    stored, _, last = key.rpartition("/")
    driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(last)
    if driver and stored:
      spec = {
        "driver": driver,
        "kvstore": store | {"path": f"{store.get('path', '')}{stored}/"},
        # An absent chunk would be read as zeros.
        "fill_missing_data_reads": False,
      }
      name = stored.replace(".", "/").removeprefix("transformer/")
      opening[name.removesuffix("/w")] = ts.open(spec, open=True, read=True)
  arrays = {}
  for name, future in opening.items():
    try:
      arrays[name] = future.result()
    except Exception as e:
      raise _damaged(directory, f"array {name}", e) from e
  return arrays


def _damaged(directory, what: str, error: Exception) -> UserError:
  text = one_line(error, 120)
  return UserError(
    f"{directory}: {what} cannot be read, incomplete or damaged ({text}): "
    "download the checkpoint again"
  )


# --- shapes -----------------------------------------------------------------


def read_config(directory: str | pathlib.Path) -> ModelConfig:
  """ModelConfig of a checkpoint, from its arrays' shapes."""
  return config_of({k: v.shape for k, v in _open(directory).items()}, directory)


def config_of(
  shapes: Mapping[str, Shape], source: str | pathlib.Path
) -> ModelConfig:
  """ModelConfig of arrays of these shapes; `source` is for messages.

  What shapes do not say is the same in all sizes but for the queries' scale.

  Raises:
    UserError: an array that is missing or of another rank.
  """

  def shape(name: str, axes: str) -> Shape:
    found = shapes.get(name)
    if found is None or len(found) != len(axes):
      what = "no" if found is None else f"{list(found)} as"
      raise UserError(
        f"{source}: has {what} array {name} [{', '.join(axes)}]: is it a whole "
        "Gemma-2 checkpoint?"
      )
    return found

  rows, width = shape(_EMBEDDING, "VD")
  heads, _, head_dim = shape("layer_0/attn/q_einsum", "HDE")
  _, kv_heads, _, _ = shape("layer_0/attn/kv_einsum", "2KDE")
  mlp_width, _ = shape("layer_0/mlp/linear", "FD")
  found = (re.match(r"layer_(\d+)/", name) for name in shapes)
  layers = 1 + max(int(match[1]) for match in found if match)
  return model_config.make(
    "gemma2",
    vocab_size=_TOKENS.get(rows, rows),
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_width=mlp_width,
    query_scale=_QUERY_SCALES.get((layers, width), 0.0),
  )


# --- reading ----------------------------------------------------------------


class _Leaf(layout.Leaf):
  def ours(self, tensor: np.ndarray) -> np.ndarray:
    """`load` has read it as it is here."""
    return tensor


def load(
  directory: str | pathlib.Path,
  config: ModelConfig,
  *,
  dtype: Any,
  shardings: Params | None = None,
) -> Params:
  """A decoder's parameters; arguments as of `pretrained.load`.

  Raises:
    UserError: arrays that are missing, misshapen or damaged, or not Gemma-2's.
  """
  arrays = _open(directory)
  gating = arrays.get(_GATING.format(0))
  turned = gating is not None and gating.shape[1:2] == (config.mlp_width,)
  if turned and config.mlp_width == config.width:
    raise UserError(f"{directory}: mlp/gating_einsum may be [2, D, F] or not")
  leaves, where, wanted = [], {}, {}
  for leaf in layout.leaves_of(config):
    if leaf.path not in _SOURCES:
      raise UserError(f"{directory}: Gemma-2 has no parameter {leaf.path}")
    stem, part = _SOURCES[leaf.path]
    axes = tuple(range(len(leaf.part)))
    if re.search("/[qkv]/", leaf.path) or (stem == _GATING and turned):
      axes = (1, 0, *axes[2:])
    shape = tuple(leaf.part[axis] for axis in axes)
    names = [stem.format(i) for i in range(len(leaf.names))]
    wanted |= dict.fromkeys(names, shape if part is None else (2, *shape))
    keys = tuple(f"{name}[{part}]" for name in names)
    where |= {k: (n, part, axes) for k, n in zip(keys, names, strict=True)}
    leaves.append(_Leaf(leaf.path, leaf.shape, keys))
  _check(directory, arrays, wanted)

  def read(name: str, part: int | None, axes: Shape) -> np.ndarray:
    store = arrays[name] if part is None else arrays[name][part]
    if name == _EMBEDDING:
      store = store[: config.vocab_size]
    try:
      return store.read().result().transpose(axes)
    except Exception as e:
      raise _damaged(directory, f"array {name}", e) from e

  return layout.read_leaves(leaves, where, dtype, shardings, read)


def _check(
  source: str | pathlib.Path,
  arrays: Mapping[str, ts.TensorStore],
  wanted: Mapping[str, Shape],
) -> None:
  """Refuses missing, unexpected and misshapen arrays before any is read."""
  for problem, names in (
    ("has no", [n for n in wanted if n not in arrays]),
    ("has an unexpected", [n for n in arrays if n not in wanted]),
  ):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(
        f"{source}: {problem} array {names[0]}{more}: is it a whole Gemma-2 "
        "checkpoint?"
      )
  for name, shape in wanted.items():
    found, kind = arrays[name].shape, arrays[name].dtype.numpy_dtype
    if name == _EMBEDDING:
      found = (_TOKENS.get(found[0], found[0]), *found[1:])
    if found != shape:
      raise UserError(
        f"{source}: array {name} is {list(found)}, not {list(shape)}"
      )
    if not jnp.issubdtype(kind, jnp.floating):
      raise UserError(f"{source}: array {name} is {kind}: quantised weights?")
