"""What a run needs on machines that are not here, before paying for them.

  python -m cacheaug.plan --config=configs/gemma2b.py --topology=v5e:16x16
      [--slices=N] [--mfu=0.4] [--nocompile] [--json] [--config.key=value ...]

Topologies: v4, v5e, v5p and v6e with a slice's shape (v5e:16x16, v5p:4x4x8),
h100, h200, a100, l4 and rtx4090 with a number (h100:8); --slices joins several
over the data-centre network.

Where libtpu is installed (pip install 'cacheaug[tpu]') the whole training step
is compiled for TPUs without one: its memory, or the compiler's refusal, and its
collectives are then the compiler's own. Where jax's CUDA plugin is installed
('cacheaug[cuda]') the same goes for h100 and h200, without a GPU. That takes
minutes for a large model. Everything else is arithmetic over shapes. No weights
are needed: the decoder is known by its shape, or by config.json where
decoder.path is given.
"""

import json

from absl import flags, logging
from ml_collections import config_flags

from cacheaug.errors import UserError
from cacheaug.run import command


def main() -> None:
  """Reads the flags that are defined below."""
  import jax

  # Whatever is attached here is not what is planned for.
  jax.config.update("jax_platforms", "cpu")
  # The trainer's own messages are of a run, several times over here.
  logging.set_verbosity(logging.WARNING)
  from cacheaug import config as configs
  from cacheaug.projects.planning import planner, table
  from cacheaug.projects.planning import topology as topologies

  values = flags.FLAGS
  if not values.topology:
    raise UserError("--topology is missing: for example --topology=v5e:16x16")
  if not 0.0 < values.mfu <= 1.0:
    raise UserError(f"--mfu={values.mfu} must be above 0 and at most 1")
  flag = values["config"]
  config = configs.resolve(
    flag.value, given=config_flags.get_override_values(flag)
  )
  slices = config.mesh.slices if values.slices is None else values.slices
  if slices < 1:
    raise UserError(f"--slices={slices} must be at least 1")
  topology = topologies.parse(values.topology, slices)
  found = planner.plan(
    config, topology, mfu=values.mfu, use_compiler=values.compile
  )
  print(json.dumps(found, indent=2) if values.json else table.table(found))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "experiment file")
  flags.DEFINE_string("topology", "", "CHIP:SHAPE, for example v5e:16x16")
  flags.DEFINE_integer(
    "slices", None, "slices joined by the network; default: mesh.slices"
  )
  flags.DEFINE_float("mfu", 0.4, "share of the peak that is assumed")
  flags.DEFINE_bool("compile", True, "ask the compiler where it is installed")
  flags.DEFINE_bool("json", False, "print all figures as JSON")
  command.run(main, __doc__)
