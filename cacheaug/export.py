"""Writes what a run has trained: a coprocessor's files, or a decoder.

  python -m cacheaug.export --workdir=runs/gemma2b --out=DIR
  python -m cacheaug.export --workdir=runs/tiny_decoder --out=DIR --decoder

The first writes a run's coprocessor (weights/coprocessor_files.py), the second
a run's decoder (objective 'language_model') as a Hugging Face directory. Both
take the newest whole checkpoint, and the running average of the weights where
there is one. A LoRA is written merged into the weights that it adapts, so that
nobody need know of it; a coprocessor's config.json then has its rank as
`lora_rank`.
"""

import pathlib

from absl import flags

from cacheaug import config as configs
from cacheaug.data import tokenizers
from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig
from cacheaug.run import command
from cacheaug.weights import coprocessor_files, huggingface, pretrained, trained
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
  out = pathlib.Path(out).expanduser()
  _check_out(out, decoder)
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
