"""Trains what a config describes and writes the report.

  python -m cacheaug.main --config=configs/quickstart.py [--workdir=DIR]
      [--config.key=value ...]

Run it again with the same --workdir to resume. --config.runlocal=True shrinks
any config so that it runs anywhere in about a minute.

Several hosts: give --multihost to each. TPU pods, Slurm and Open MPI are
recognised; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT,
JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import os
import re

from absl import flags
from ml_collections import config_flags

from cacheaug.run import command

CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file")
WORKDIR = flags.DEFINE_string(
  "workdir", "", "the run's directory; default: runs/<config's name>"
)
MULTIHOST = flags.DEFINE_bool("multihost", False, "join the other hosts first")


def main() -> None:
  """Reads the flags; the trainer does the rest."""
  import jax

  from cacheaug import config as configs
  from cacheaug import train

  flag = flags.FLAGS["config"]
  config = configs.resolve(
    CONFIG.value, given=config_flags.get_override_values(flag)
  )
  if MULTIHOST.value:
    jax.distributed.initialize(
      num_processes=_number("JAX_NUM_PROCESSES"),
      process_id=_number("JAX_PROCESS_ID"),
      heartbeat_timeout_seconds=config.watchdog.host_seconds,
    )
  name = os.path.basename(config_flags.get_config_filename(flag))
  name = re.sub(r"\W+", "_", name.replace(".py", "", 1))
  name += "_local" if config.runlocal else ""
  train.train(config, WORKDIR.value or f"runs/{name}")


def _number(variable: str) -> int | None:
  """An environment variable as a number; None leaves it to jax to detect."""
  return int(os.environ[variable]) if variable in os.environ else None


if __name__ == "__main__":
  command.run(main, __doc__)
