"""A trained coprocessor as files that other frameworks can read.

`config.json` says what it is and which decoder it belongs to;
`coprocessor.safetensors` holds its transformer's weights under the names that
Hugging Face uses for the decoder's family (without embeddings and head),
`soft_tokens` [N, D] and, with the harmless start, `latent_projection` [D, D],
applied as hidden @ latent_projection. Of another `kind` than 'coprocessor' it
holds what that kind has: see augment/coprocessor.py.

  python -m cacheaug.export --workdir=runs/gemma2b --out=DIR
  python -m cacheaug.export --workdir=runs/tiny_decoder --out=DIR --decoder

The first writes a run's coprocessor as above, the second a run's decoder
(objective 'language_model') as a Hugging Face directory. Both take the newest
whole checkpoint, and the running average of the weights where there is one. A
LoRA is written merged into the weights that it adapts, so that nobody need know
of it; a coprocessor's config.json then has its rank as `lora_rank`.
"""

import dataclasses
import json
import pathlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from absl import flags
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import trainable
from cacheaug.augment import coprocessor, point_sampling
from cacheaug.augment.point_sampling import Draw
from cacheaug.augment.traces import Layout
from cacheaug.data import sources, tokenizers
from cacheaug.errors import UserError
from cacheaug.model import lora, transformer
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import checkpoint, command
from cacheaug.weights import families, huggingface
from cacheaug.weights import safetensors_io as files
from cacheaug.weights.huggingface import Leaf

FORMAT = "cacheaug-coprocessor-1"
WEIGHTS = "coprocessor.safetensors"
_NO_DRAW = Draw()
# What latents are for the decoder: input embeddings, or keys and values.
VARIANTS = {False: "embeddings", True: "cache"}  # by Kind.latents_are_kv
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
) -> None:
  """Writes config.json and coprocessor.safetensors.

  Args:
    directory: made if absent; files of the same names are replaced.
    model_config: of the decoder, which the coprocessor shares.
    spec: its layout; N, positions and start bind its user.
    params: of coprocessor.init_boxed, in the dtype to write.
    decoder_fingerprint: `pretrained.fingerprint` of the decoder.
    source: where the decoder came from, for a person.
    draw: how training drew its traces, for the record.
    lora_rank: of the LoRA that `params` have been merged with; 0 for none.

  Raises:
    UserError: a directory that cannot be written.
  """
  directory = pathlib.Path(directory)
  entries = {
    "format": FORMAT,
    "family": model_config.family,
    "variant": VARIANTS[spec.kind.latents_are_kv],
    "decoder_fingerprint": decoder_fingerprint,
    "source": source,
    "model": families.config_entries(model_config),
  }
  if lora_rank:
    entries["lora_rank"] = lora_rank
  traces = point_sampling.to_entries(spec, draw)
  traces["positions"] = traces.pop("scheme")  # its name in exports
  entries |= traces
  tree = {k: v for k, v in params.items() if k != "transformer"}
  leaves = _leaves(model_config, spec)
  body = params.get("transformer", {})
  huggingface.write_leaves(directory / WEIGHTS, leaves, body | tree, None)
  files.write_json(directory / "config.json", entries)


def load_coprocessor(
  directory: str | pathlib.Path,
  *,
  dtype: Any = "float32",
  shardings: Params | None = None,
) -> tuple[ModelConfig, Layout, Params, dict[str, Any]]:
  """What `save_coprocessor` wrote.

  Args:
    directory: an exported coprocessor.
    dtype: of every leaf.
    shardings: tree of shardings, as the parameters; the default device by
      default.

  Returns:
    (model config, layout, parameters, {family, variant, decoder_fingerprint,
    source, draw}).

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
  for key in ("model", "positions", *point_sampling.REQUIRED, *_META):
    if key not in entries:
      raise UserError(f"{path}: has no {key!r}; export the coprocessor again")
  config = families.config_from_entries(entries["model"], path)
  traces = entries | {"scheme": entries["positions"]}
  spec, draw = point_sampling.from_entries(traces)
  variant = VARIANTS[spec.kind.latents_are_kv]
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
  body = huggingface.flatten(tree.pop("transformer", {}))
  leaves = [leaf for leaf in huggingface.leaves_of(config) if leaf.path in body]
  order = ("soft_tokens", "latent_projection", "prefix_keys", "prefix_values")
  names = [name for name in order if name in tree]
  return leaves + [Leaf(name, tree[name].shape, (name,)) for name in names]


def _read(
  path: pathlib.Path, leaves: list[Leaf], dtype: Any, shardings: Params | None
) -> Params:
  if not path.exists():
    raise UserError(f"{path}: missing; export the coprocessor again")
  if shardings is not None:
    own = {k: v for k, v in shardings.items() if k != "transformer"}
    shardings = shardings.get("transformer", {}) | own
  where = {name: (path, name) for name in files.headers([path])}
  huggingface.check_tensors(path, leaves, where)
  tree = huggingface.read_leaves(leaves, where, dtype, shardings)
  parts = [key for key in ("blocks", "final_norm") if key in tree]
  body = {key: tree.pop(key) for key in parts}
  return {"transformer": body, **tree} if body else tree


# --- a run's directory ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's directory holds, of its newest whole checkpoint."""

  workdir: pathlib.Path
  config: ConfigDict
  spec: Layout | None  # None where the run trains a decoder
  flat: dict[str, jax.Array]  # 'a/b/c' -> weights, 'frozen/...' among them
  decoder_fingerprint: str  # '' where the run had no frozen decoder
  step: int


def read_run(workdir: str | pathlib.Path) -> Run:
  """Config and weights of a run, from the directory alone.

  Raises:
    UserError: no run there, one without a checkpoint that can be read, or a
      config.json of another version; names the file.
  """
  workdir = pathlib.Path(workdir).expanduser()
  path = workdir / "config.json"
  if not path.exists():
    raise UserError(f"{path}: missing; give the --workdir of a run")
  try:
    config = _completed(ConfigDict(json.loads(path.read_text())))
    trains_decoder = config.objective == "language_model"
    spec = None if trains_decoder else configs.layout_of(config)
  except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
    line = " ".join(str(e).split())[:160]
    raise UserError(
      f"{path}: not a run's config ({line}); give the --workdir of a run of "
      "this version"
    ) from e
  found = checkpoint.read_params(workdir / "checkpoints")
  if found is None:
    raise UserError(
      f"{workdir}/checkpoints: no checkpoint that can be read; let the run "
      "reach its first (checkpoint.every), or give another --workdir"
    )
  flat, meta, step = found
  return Run(workdir, config, spec, flat, meta["decoder"], step)


def _completed(config: ConfigDict) -> ConfigDict:
  """With the keys that have come since it was written.

  A new key's value in `configs.base`, or of a source in `source_defaults`, is
  what was done before there was the key.
  """

  def fill(config, base):
    for key, value in base.items():
      if key not in config:
        config[key] = value
      elif isinstance(value, ConfigDict):
        fill(config[key], value)
    return config

  missing = {"decoder", "data", "coprocessor"} - set(config)
  if missing:  # no run's config at all
    raise KeyError(min(missing))
  for source in config.data.sources.values():  # of the experiment's own names
    fill(source, sources.source_defaults())
  return fill(config, configs.base())


def run_params(
  run: Run, model_config: ModelConfig, decoder: Params | None = None
) -> Params:
  """The run's weights as a tree of that architecture, a LoRA merged.

  Args:
    run: from `read_run`.
    model_config: of its decoder.
    decoder: the frozen decoder's weights, which a LoRA may adapt; read from
      where the run had them by default.

  Raises:
    UserError: they are of another shape; names the first that differs.
  """
  model = Transformer(model_config)
  if not _adapts(run):
    if run.spec is None:
      make = partial(transformer.init, model)
    else:
      make = partial(coprocessor.init_boxed, model, run.spec)
    return _tree(run, nn.unbox(jax.eval_shape(make, jax.random.key(0))))
  shapes = jax.eval_shape(
    lambda key: trainable.init(run.config, model, key, None, boxed=True),
    jax.random.key(0),
  )
  params, frozen = nn.unbox(shapes)
  tree = _tree(run, params if frozen is None else params | {"frozen": frozen})
  frozen = tree.pop("frozen", None)
  if frozen is None and decoder is None:
    decoder = _decoder_params(run, model)
  return trainable.effective(run.config, tree, frozen, decoder, lora.merge)


def _adapts(run: Run) -> bool:
  """Whether a LoRA was trained; the config of an older run has no such key."""
  return any(name.startswith("lora/") for name in run.flat)


def _tree(run: Run, wanted: Params) -> Params:
  """The run's arrays in the form of `wanted`, whose shapes they must have."""
  for name, x in huggingface.flatten(wanted).items():
    shape = list(run.flat[name].shape) if name in run.flat else "absent"
    if shape != list(x.shape):
      raise UserError(
        f"{run.workdir}/checkpoints/{run.step}: {name} is {shape}, the decoder "
        f"given wants {list(x.shape)}: give the decoder of this run"
      )
  return jax.tree_util.tree_map_with_path(
    lambda p, _: run.flat[jax.tree_util.keystr(p, simple=True, separator="/")],
    wanted,
  )


def _decoder_params(run: Run, model: Transformer) -> Params:
  """The weights of the run's decoder, float32.

  Raises:
    UserError: they are not there, or others.
  """
  path = run.config.decoder.path
  if path:
    try:
      directory = huggingface.resolve(path)
      decoder = huggingface.load(directory, model.config, dtype="float32")
    except UserError as e:
      raise UserError(
        f"decoder of {run.workdir}: {e}; give --decoder_path=DIR"
      ) from e
  else:
    make = partial(trainable.random_decoder, run.config, model, "float32")
    decoder = jax.jit(make)()
  if huggingface.fingerprint(decoder) != run.decoder_fingerprint:
    raise UserError(
      f"{run.workdir} adapts decoder {run.decoder_fingerprint}, {path!r} holds "
      "another now: give --decoder_path=DIR"
    )
  return decoder


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained coprocessor, from wherever it was."""

  params: Params
  spec: Layout
  draw: Draw
  fingerprint: str  # of its decoder
  source: str  # where that came from


def open_coprocessor(
  path: str | pathlib.Path,
  model_config: ModelConfig,
  decoder: Params | None,
  *,
  dtype: Any = "float32",
) -> Trained:
  """A trained coprocessor.

  Args:
    path: an exported directory, 'shipped:NAME', or a run's workdir, whose
      newest whole checkpoint is read.
    model_config: of the decoder at hand.
    decoder: its weights.
    dtype: of every leaf.

  Raises:
    UserError: nothing of the kind there.
  """
  directory = _directory(str(path))
  if (directory / "checkpoints").is_dir():
    run = read_run(directory)
    if run.spec is None:
      raise UserError(
        f"{directory}: holds a decoder (objective='language_model'), not a "
        "coprocessor; export it with --decoder and give it to cacheaug.load"
      )
    params = run_params(run, model_config, decoder)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    where = run.config.decoder.path
    draw = configs.draw_of(run.config)
    return Trained(params, run.spec, draw, run.decoder_fingerprint, where)
  _, spec, params, meta = load_coprocessor(directory, dtype=dtype)
  fingerprint, source = meta["decoder_fingerprint"], meta["source"]
  return Trained(params, spec, meta["draw"], fingerprint, source)


def _directory(path: str) -> pathlib.Path:
  if path.startswith(huggingface.SHIPPED):
    return huggingface.resolve(path)
  directory = pathlib.Path(path).expanduser()
  if not directory.is_dir():
    raise UserError(
      f"{path}: no such directory; give an exported coprocessor or a run's "
      "workdir"
    )
  return directory


# --- the command ------------------------------------------------------------


def export_run(
  workdir: str | pathlib.Path,
  out: str | pathlib.Path,
  *,
  decoder: bool = False,
  decoder_path: str = "",
) -> int:
  """Writes what a run has trained to `out`; returns the checkpoint's step.

  Args:
    workdir: of a run.
    out: absent or empty; an earlier export of a coprocessor is replaced.
    decoder: the run trains a decoder (objective 'language_model').
    decoder_path: where the run's frozen decoder is now, if it has moved.

  Raises:
    UserError: nothing to export there, or an `out` that holds something else.
  """
  out = pathlib.Path(out).expanduser()
  _check_out(out, decoder)
  run = read_run(workdir)
  if decoder != (run.spec is None):
    what = "decoder" if run.spec is None else "coprocessor"
    remedy = "add --decoder" if run.spec is None else "leave out --decoder"
    raise UserError(f"--workdir={workdir} holds a {what}: {remedy}")
  source = run.config.decoder.path
  if decoder_path:
    run.config.decoder.path = decoder_path
  model_config = _decoder_config(run)
  if decoder:
    spec = run.config.data.tokenizer
    if spec == "decoder":
      own = run.config.decoder.path
      spec = str(huggingface.resolve(own)) if own else "byte"
    params = run_params(run, model_config)
    huggingface.save(out, model_config, params, tokenizer=tokenizers.load(spec))
    return run.step
  save_coprocessor(
    out,
    model_config=model_config,
    spec=run.spec,
    params=run_params(run, model_config),
    decoder_fingerprint=run.decoder_fingerprint,
    source=source,
    draw=configs.draw_of(run.config),
    lora_rank=configs.lora_rank(run.config) if _adapts(run) else 0,
  )
  return run.step


def _check_out(out: pathlib.Path, decoder: bool) -> None:
  """Refuses to write over anything but an earlier coprocessor's export."""
  if out.is_dir() and not any(out.iterdir()):
    return
  if not out.exists():
    return
  path = out / "config.json"
  if not decoder and path.is_file():
    try:
      if files.read_json(path).get("format") == FORMAT:
        return
    except UserError:
      pass  # not ours, which is what the line below says
  raise UserError(
    f"--out={out} exists and holds something else: give a new directory"
  )


def _decoder_config(run: Run) -> ModelConfig:
  path = run.config.decoder.path
  if not path:
    return configs.model_of(run.config)
  try:
    return huggingface.read_config(huggingface.resolve(path))
  except UserError as e:
    raise UserError(
      f"decoder of {run.workdir}: {e}; give --decoder_path=DIR"
    ) from e


def main() -> None:
  """Reads the flags that are defined below."""
  values = flags.FLAGS
  for name in ("workdir", "out"):
    if not values[name].value:
      raise UserError(f"--{name} is missing: see --help")
  step = export_run(
    values.workdir,
    values.out,
    decoder=values.decoder,
    decoder_path=values.decoder_path,
  )
  print(f"step {step} of {values.workdir} is in {values.out}")


if __name__ == "__main__":
  # Here and not above: main.py, which imports this module, has a --workdir.
  flags.DEFINE_string("workdir", "", "the run's directory")
  flags.DEFINE_string("out", "", "directory to write, new or empty")
  flags.DEFINE_bool("decoder", False, "the run trained a decoder: write that")
  flags.DEFINE_string(
    "decoder_path", "", "where the run's frozen decoder is, if it has moved"
  )
  command.run(main, __doc__)
