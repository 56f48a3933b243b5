"""How tests compile: they compile far more than they compute.

Without optimisation, and without the slowest of the code generators,
compilation takes a fifth of the time. What jaxlib does not know it refuses.

conftest.py sets FLAGS for this process and for those that tests start, so that
all programs are compiled so. A module that claims something about rounding as
users have it says `pytestmark = pytest.mark.usefixtures("as_users_compile")`, a
single test `as_users_compile_here`.
"""

from importlib import metadata

OPTIONS = {
  "xla_backend_optimization_level": 0,
  # In 32 parts by default, each with its own costs, while the other cores have
  # another worker's tests. XLA refuses fewer parts than a program has kinds of
  # kernels with compiler options of their own, so not 1.
  "xla_cpu_parallel_codegen_split_count": 4,
}
if metadata.version("jax").startswith("0.10."):  # later ones refuse it
  OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{k}={str(v).lower()}" for k, v in OPTIONS.items())
# What jaxlib does without FLAGS.
AS_USERS = {
  "xla_backend_optimization_level": 3,
  "xla_cpu_parallel_codegen_split_count": 32,
}
if "xla_cpu_use_fusion_emitters" in OPTIONS:
  AS_USERS["xla_cpu_use_fusion_emitters"] = True


def jit(function, **options):
  """jax.jit without optimisation, whatever the process's flags are."""
  import jax  # late: conftest reads FLAGS before jax is imported

  return jax.jit(function, compiler_options=OPTIONS, **options)
