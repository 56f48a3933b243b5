"""An exported coprocessor where there is no JAX and none of this package.

  python benchmarks/transformers_side.py make OUT --decoder=DIR
  python benchmarks/transformers_side.py venv OUT... --path=VENV
      [--transformers=VERSION]
  VENV/bin/python benchmarks/transformers_side.py time OUT...

`make` writes OUT/coprocessor and what JAX computes with it, for a decoder's
directory or tiny:CASE, a random one of tests/make_golden.py. The coprocessor is
no trained one: a copy of the decoder with noise on every weight, which
exercises the same arithmetic. `venv` makes a virtual environment from the
package index with torch, transformers and safetensors alone, and compares there
(weights/transformers_side/compare.py). `time` measures time to first token and
tokens a second with latents and without, in turns; it imports neither. One
thread, and by the processor's clock: what the wall's shows on a machine that
does nothing else, wherever it is run.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPARE = ROOT / "cacheaug" / "weights" / "transformers_side" / "compare.py"
TORCH = "2.13.0"
NOISE = 0.05  # of each leaf's standard deviation


def make(out: pathlib.Path, decoder: str, latents: int, positions: str) -> None:
  """Writes OUT/coprocessor, OUT/expected.npz and OUT/decoder.json."""
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  if decoder.startswith("tiny:"):
    import make_golden

    case, decoder = decoder.removeprefix("tiny:"), str(out / "decoder")
    make_golden.build(case, max_position_embeddings=128).save_pretrained(
      decoder
    )
  import jax
  import jax.numpy as jnp
  import numpy as np

  import cacheaug
  from cacheaug.augment import coprocessor
  from cacheaug.augment.traces import Layout
  from cacheaug.evals import torch_parity
  from cacheaug.weights import coprocessor_files

  jax.config.update("jax_default_matmul_precision", "highest")
  lm = cacheaug.load(decoder, dtype="float32")
  spec = Layout(latents=latents, ahead=16, positions=positions)
  key = jax.random.key(0)
  params = coprocessor.init(lm.model, spec, key, lm.decoder)
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(0)

  def shaken(x):
    noise = rng.standard_normal(x.shape, np.float32)
    return x + jnp.asarray(noise) * NOISE * max(float(x.std()), 0.02)

  params = jax.tree.unflatten(structure, [shaken(x) for x in leaves])
  coprocessor_files.save_coprocessor(
    out / "coprocessor",
    model_config=lm.model.config,
    spec=spec,
    params=params,
    decoder_fingerprint=lm.fingerprint,
    source=decoder,
  )
  del params, leaves
  lm = lm.with_coprocessor(out / "coprocessor")
  arrays = torch_parity.expected(lm, torch_parity.prompts_of(lm))
  np.savez(out / "expected.npz", **arrays)
  entries = {"decoder": str(pathlib.Path(decoder).absolute())}
  (out / "decoder.json").write_text(json.dumps(entries))


def compare(outs: list[pathlib.Path], path: pathlib.Path, version: str) -> None:
  """Compares in a virtual environment, made if it is not there."""
  python = path / "bin" / "python"
  if not python.exists():
    venv.create(path, with_pip=True)
    packages = [f"torch=={TORCH}", f"transformers{version}", "safetensors"]
    install = [python, "-m", "pip", "install", "--quiet", *packages, "numpy"]
    subprocess.run(install, check=True)
  code = """
import importlib.util, torch, transformers
for name in ("jax", "cacheaug"):
  assert importlib.util.find_spec(name) is None, name
print("torch", torch.__version__, "transformers", transformers.__version__)
"""
  # From a folder that has no cacheaug beside it.
  subprocess.run([python, "-c", code], check=True, cwd=path)
  for out in outs:
    out = out.absolute()
    decoder = json.loads((out / "decoder.json").read_text())["decoder"]
    arguments = [out / "coprocessor", decoder, out / "expected.npz"]
    print(f"\n{decoder}", flush=True)
    subprocess.run([python, COMPARE, *arguments], check=False, cwd=path)


def measure(out: pathlib.Path, tokens: int, turns: int) -> None:
  """Prints time to first token and tokens a second, medians over turns."""
  import torch
  import transformers

  decoder = json.loads((out / "decoder.json").read_text())["decoder"]
  load = transformers.AutoModelForCausalLM.from_pretrained
  torch.set_num_threads(1)
  model = load(decoder).float().eval()
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0
  directory = str(out / "coprocessor")
  vocab = model.config.vocab_size
  torch.manual_seed(0)
  print(f"\n{decoder}, torch {torch.__version__}, float32, ", end="")
  print(f"one thread, processor time, {tokens} tokens")
  for length in (64, 256):
    ids = torch.randint(3, vocab, (1, length))
    first = {True: [], False: []}
    rest = {True: [], False: []}
    for turn in range(turns + 1):
      for latents in (True, False):
        options = dict(
          custom_generate=directory,
          trust_remote_code=True,
          attention_mask=torch.ones_like(ids),
          latents=latents,
          do_sample=False,
        )
        times = []
        for count in (1, tokens):
          start = time.process_time()
          model.generate(ids, max_new_tokens=count, **options)
          times.append(time.process_time() - start)
        if turn:  # the first reads the weights
          first[latents].append(times[0])
          rest[latents].append((tokens - 1) / (times[1] - times[0]))
    for latents in (False, True):
      print(
        f"prompt {length:4} {'with latents' if latents else 'plain':12} first "
        f"token {1000 * statistics.median(first[latents]):8.1f} ms, then "
        f"{statistics.median(rest[latents]):6.1f} tokens/s"
      )


def main() -> None:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=("make", "venv", "time"))
  parser.add_argument("out", nargs="+", type=pathlib.Path)
  parser.add_argument("--decoder")
  parser.add_argument("--latents", type=int, default=8)
  parser.add_argument("--positions", default="replace")
  parser.add_argument("--path", type=pathlib.Path)
  parser.add_argument("--transformers", default="", help="such as ==4.57.6")
  parser.add_argument("--tokens", type=int, default=33)
  parser.add_argument("--turns", type=int, default=5)
  values = parser.parse_args()
  if values.what == "make":
    (out,) = values.out
    make(out, values.decoder, values.latents, values.positions)
  elif values.what == "venv":
    compare(values.out, values.path, values.transformers)
  else:
    for out in values.out:
      measure(out, values.tokens, values.turns)


if __name__ == "__main__":
  main()
