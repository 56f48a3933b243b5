"""Writes what a run has trained: a coprocessor's files, or a decoder.

  python -m cacheaug.export --workdir=runs/gemma2b --out=DIR
  python -m cacheaug.export --workdir=runs/tiny_decoder --out=DIR --decoder
  python -m cacheaug.export --out=DIR --check

The first writes a run's coprocessor (weights/coprocessor_files.py) and what
transformers needs to use it (weights/transformers_files.py), the second a run's
decoder (objective 'language_model') as a Hugging Face directory. Both take the
newest whole checkpoint, and the running average of the weights where there is
one. A LoRA is written merged into the weights that it adapts, so that nobody
need know of it; a coprocessor's config.json then has its rank as `lora_rank`.
--workdir may be an earlier export too, which is then written anew.

The third computes latents, losses and greedy tokens of an exported coprocessor
in JAX and in torch, prints how far apart they are, and ends with 1 if they are
too far. It needs torch and transformers: pip install 'cacheaug[parity]'.
"""

import pathlib
import runpy

from absl import flags
from etils import epath

from cacheaug import build
from cacheaug import config as configs
from cacheaug.data import tokenizers
from cacheaug.errors import UserError, one_line
from cacheaug.evals import torch_parity
from cacheaug.model.config import ModelConfig
from cacheaug.run import command
from cacheaug.run.files import (
  expanded,
  fetched,
  reading,
  refuse_remote,
  staged,
)
from cacheaug.weights import (
  coprocessor_files,
  huggingface,
  pretrained,
  trained,
  transformers_files,
)
from cacheaug.weights import safetensors_io as files


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
  out = expanded(out)
  with reading(out):
    _check_out(out, decoder)
  if earlier := _earlier_export(workdir):
    _write_anew(earlier, out)
    return 0
  run = trained.read_run(workdir)
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
      spec = str(pretrained.resolve(own)) if own else "byte"
    params = trained.run_params(run, model_config)
    huggingface.save(out, model_config, params, tokenizer=tokenizers.load(spec))
    return run.step
  coprocessor_files.save_coprocessor(
    out,
    model_config=model_config,
    spec=run.spec,
    params=trained.run_params(run, model_config),
    decoder_fingerprint=run.decoder_fingerprint,
    source=source,
    draw=configs.draw_of(run.config),
    lora_rank=configs.lora_rank(run.config) if trained.adapts(run) else 0,
    report=transformers_files.report_of(run.workdir),
  )
  return run.step


def _write_anew(earlier: epath.Path, out: epath.Path) -> None:
  """An exported coprocessor with the files that exports have by now."""
  with fetched(earlier) as source, staged(out) as target:
    model_config, *_ = coprocessor_files.load_coprocessor(source)
    names = (coprocessor_files.WEIGHTS, "config.json")
    for name in names if target.resolve() != source.resolve() else ():
      data = (source / name).read_bytes()
      files.atomically(target / name, lambda file, data=data: file.write(data))
    entries = files.read_json(source / "config.json")
    transformers_files.write(target, model_config, entries)


def _earlier_export(workdir: str | pathlib.Path) -> epath.Path | None:
  """The directory where `workdir` names an exported coprocessor."""
  directory = expanded(workdir)
  if str(workdir).startswith(pretrained.SHIPPED):
    directory = expanded(pretrained.resolve(str(workdir)))
  path = directory / "config.json"
  with reading(directory):
    if (directory / "checkpoints").exists() or not path.is_file():
      return None
  is_export = files.read_json(path).get("format") == coprocessor_files.FORMAT
  return directory if is_export else None


def check(out: str | pathlib.Path, decoder_path: str = "") -> bool:
  """Holds an exported coprocessor in torch to JAX; prints what differs by what.

  Args:
    out: of an export.
    decoder_path: of its decoder, if it is not where config.json says.

  Returns:
    Whether everything is as close as rounding lets it be.

  Raises:
    UserError: torch is not installed, there is no export, or no decoder.
  """
  refuse_remote(out, "--out")
  out = pathlib.Path(expanded(out))
  *_, meta = coprocessor_files.load_coprocessor(out)
  decoder = decoder_path or meta["source"]
  if not decoder:
    raise UserError(
      f"{out}: does not say where its decoder is; give --decoder_path=DIR"
    )
  lm = build.load(decoder, dtype="float32").with_coprocessor(out)
  arrays = torch_parity.expected(lm, torch_parity.prompts_of(lm))
  try:
    compare = runpy.run_path(str(transformers_files.COMPARE))
    rows = compare["compare"](out, pretrained.resolve(decoder), arrays)
  except ImportError as e:
    raise UserError(
      f"--check: {e}; install torch: pip install 'cacheaug[parity]'"
    ) from e
  except (OSError, ValueError) as e:
    raise UserError(f"--check: {one_line(e, 1000)}") from e
  for name, (text, good) in rows.items():
    print(f"{name:16} {text}{'' if good else '   FAILED'}")
  return all(good for _, good in rows.values())


def _check_out(out: epath.Path, decoder: bool) -> None:
  """Refuses to write over anything but an earlier coprocessor's export."""
  if out.is_dir() and not any(out.iterdir()):
    return
  if not out.exists():
    return
  path = out / "config.json"
  if not decoder and path.is_file():
    try:
      if files.read_json(path).get("format") == coprocessor_files.FORMAT:
        return
    except UserError:
      pass  # not ours, which is what the line below says
  raise UserError(
    f"--out={out} exists and holds something else: give a new directory"
  )


def _decoder_config(run: trained.Run) -> ModelConfig:
  path = run.config.decoder.path
  if not path:
    return configs.model_of(run.config)
  try:
    return pretrained.read_config(pretrained.resolve(path))
  except UserError as e:
    raise UserError(
      f"decoder of {run.workdir}: {e}; give --decoder_path=DIR"
    ) from e


def main() -> None:
  """Reads the flags that are defined below."""
  values = flags.FLAGS
  for name in ("workdir", "out"):
    if not values[name].value and not (name == "workdir" and values.check):
      raise UserError(f"--{name} is missing: see --help")
  if values.check and values.decoder:
    raise UserError("--check is for coprocessors: leave out --decoder")
  if values.workdir:
    _write(values)
  if values.check and not check(values.out, values.decoder_path):
    raise UserError(f"--check: {values.out} differs in torch, see above")


def _write(values: flags.FlagValues) -> None:
  step = export_run(
    values.workdir,
    values.out,
    decoder=values.decoder,
    decoder_path=values.decoder_path,
  )
  what = f"step {step} of {values.workdir}" if step else values.workdir
  print(f"{what} is in {values.out}")


if __name__ == "__main__":
  # Here and not above: main.py, which imports this module, has a --workdir.
  flags.DEFINE_string("workdir", "", "the run's directory")
  flags.DEFINE_string("out", "", "directory to write, new or empty")
  flags.DEFINE_bool("decoder", False, "the run trained a decoder: write that")
  flags.DEFINE_string(
    "decoder_path", "", "where the run's frozen decoder is, if it has moved"
  )
  flags.DEFINE_bool("check", False, "compare --out in torch with JAX")
  command.run(main, __doc__)
