"""config.deterministic reaches the compiler, and nothing else does."""

import jax
import numpy as np
import pytest
import small_runs

from cacheaug import step


def options(tmp_path, **changes):
  config = small_runs.get_config(str(tmp_path))
  config.update(changes)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "data")
  return step._compiler_options(config, mesh)


def test_xla_is_asked_for_it_and_knows_the_word(tmp_path):
  assert options(tmp_path) is None  # the plain step's program stays as it is
  asked = options(tmp_path, deterministic=True)
  double = jax.jit(lambda x: x + x, compiler_options=asked)
  assert double(2.0) == 4.0
  unknown = {name + "_": value for name, value in asked.items()}
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_"):
    jax.jit(lambda x: x + x, compiler_options=unknown)(2.0)
