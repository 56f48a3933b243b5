"""A run of a second or two, in this process or by --config=THIS:DIRECTORY."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from cacheaug import build, optim, sharding, validate
from cacheaug import config as configs
from cacheaug import step as stepping
from cacheaug.data import opening
from cacheaug.data.sources import source_defaults

_ROOT = Path(__file__).resolve().parent.parent


def get_config(directory: str) -> ConfigDict:
  """A tiny random decoder over text in `directory`, which is made."""
  text = Path(directory) / "text.txt"
  if not text.exists():
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n---\n".join(_document(i) for i in range(60)))
  c = configs.base()
  c.decoder.shape.update(
    vocab_size=260,
    width=16,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    max_positions=64,
    window=8,
  )
  c.coprocessor.latents = 2
  c.traces.count = 4
  c.traces.ahead = 4
  source = source_defaults()
  source.kind, source.path, source.separator = "text", str(text), "---"
  c.data.sources = ConfigDict({"text": source})
  c.data.tokenizer = "byte"
  c.data.sequence, c.data.batch = 32, 8
  c.data.cache_dir = str(Path(directory) / "cache")
  c.data.validation_fraction = 0.2
  c.optimizer.steps, c.optimizer.warmup = 6, 2
  c.optimizer.learning_rate = 1e-2
  # Large, so that rounding in a gradient near zero stays rounding.
  c.optimizer.eps = 1e-3
  c.log_every, c.checkpoint.every = 2, 3
  c.eval.sequences, c.eval.batch, c.eval.ahead = 4, 4, 4
  return c


def _document(i: int) -> str:
  # Of unequal length, so that rows differ in how many tokens count.
  return " ".join(str((i * 7 + j * j) % 23) for j in range(4 + i % 9))


class Steps:
  """The trainer's pieces without its loop, on the first devices."""

  def __init__(self, config: ConfigDict, devices: int = 1):
    devices = jax.devices()[:devices]
    self.config = config
    validate.check_config(config, len(devices))
    self.mesh = sharding.make_mesh(config.mesh, devices)
    self.model, tokenizer = build.open_model(config)
    self.decoder, found = build.load_decoder(config, self.model, self.mesh)
    initial = build.load_initial(
      config, self.model, self.mesh, self.decoder, found
    )
    self.batches = opening.open_batches(
      config.data, tokenizer, split="train", seed=config.seed
    )
    optimizer, _ = optim.make_optimizer(
      config.optimizer, config.optimizer.steps
    )
    self.abstract = stepping.abstract_state(
      config, self.model, optimizer, self.decoder, self.mesh
    )
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    fresh = partial(stepping.init_state, config, self.model, optimizer, False)
    self.key = jax.random.key(config.seed)
    fresh = jax.jit(fresh, out_shardings=shardings)
    arguments = self.decoder, self.key, initial
    self.state = self._quick(fresh, *arguments)(*arguments)
    step = stepping.make_step(
      config, self.model, optimizer, self.mesh, shardings
    )
    self._step = self._quick(step, *self._arguments(0))
    self.taken = 0

  @staticmethod
  def _quick(jitted, *arguments):
    # Not above: --config loads this file without the tests on its path.
    import compiling

    return jitted.lower(*arguments).compile(compiler_options=compiling.OPTIONS)

  def _arguments(self, step: int) -> tuple:
    batch = sharding.put_global(
      self.batches.at(step), sharding.batch_sharding(self.mesh)
    )
    return self.state, self.decoder, batch, self.key, np.bool_(False)

  def take(self, steps: int) -> list[float]:
    """Losses of so many further steps."""
    losses = []
    for _ in range(steps):
      self.state, metrics = self._step(*self._arguments(self.taken))
      self.taken += 1
      losses.append(float(metrics["loss"]))
    return losses


def start(
  directory: Path, *arguments: str, devices: int = 1, **environment: str
) -> subprocess.Popen:
  """`python -m cacheaug.main` over this file's config."""
  config = f"--config={Path(__file__).resolve()}:{directory}"
  return start_plain(config, *arguments, devices=devices, **environment)


def start_plain(*arguments: str, devices: int = 1, **environment: str):
  """`python -m cacheaug.main` with nothing but the arguments."""
  import compiling  # late: as a config this file is loaded without its siblings

  flags = f"--xla_force_host_platform_device_count={devices} {compiling.FLAGS}"
  return subprocess.Popen(
    [sys.executable, "-m", "cacheaug.main", *arguments],
    cwd=_ROOT,
    env=os.environ | {"XLA_FLAGS": flags} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Exit status, stdout, stderr."""
  # Only a hang should reach it: on a busy machine a start takes minutes.
  try:
    out, err = process.communicate(timeout=800)
  finally:
    process.kill()
  return process.returncode, out, err


def contents(directory: Path) -> dict[str, bytes]:
  """Every file below, to compare before and after."""
  return {
    str(p.relative_to(directory)): p.read_bytes()
    for p in sorted(directory.rglob("*"))
    if p.is_file()
  }
