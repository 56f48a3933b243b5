"""How tests compile: they compile far more than they compute.

Without optimisation, and without the slowest of the code generators,
compilation takes a fifth of the time. What jaxlib does not know it refuses.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # 0.12 has no such option
  OPTIONS["xla_cpu_use_fusion_emitters"] = False
# The same as XLA_FLAGS, for processes of their own.
FLAGS = " ".join(f"--{k}={str(v).lower()}" for k, v in OPTIONS.items())

jit = functools.partial(jax.jit, compiler_options=OPTIONS)
