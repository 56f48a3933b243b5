"""python -m cacheaug.main --config=configs/quickstart.py [--workdir=DIR]

Trains what the config describes and writes the report. Run it again with the
same --workdir to resume.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cacheaug.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file")
WORKDIR = flags.DEFINE_string("workdir", "", "default: runs/<config's name>")
MULTIHOST = flags.DEFINE_bool("multihost", False, "join the other hosts first")


def main(argv: list[str]) -> None:
  del argv
  import jax

  from cacheaug import train

  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(None)
  # Compiled programs are kept between runs; JAX's own variable overrides.
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    jax.config.update("jax_compilation_cache_dir", f"{home}/cacheaug/compiled")
  if MULTIHOST.value:
    jax.distributed.initialize()
  name = os.path.splitext(
    os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"]))
  )[0]
  try:
    train.train(CONFIG.value, WORKDIR.value or f"runs/{name}")
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
