"""Strict numerics on eight fake CPU devices, quick compilation, real files."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path

import compiling

# All are read when jax is first imported, which any test may do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = f"--xla_force_host_platform_device_count=8 {compiling.FLAGS}"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # Workers and the processes that tests start share it, this run alone.
  _CACHE = tempfile.mkdtemp(prefix="cacheaug-tests-")
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

_REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish():
  """Garbage collection reads no module again: it took a twentieth."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(10_000, 20, 20)  # JAX traces make many small objects


@contextlib.contextmanager
def _compiled_as_users():
  """Programs are compiled as outside of the tests, and none before is used."""
  options = compiler.get_compile_options

  def as_users(*args, env_options_overrides=None, **kwargs):
    overrides = compiling.AS_USERS | (env_options_overrides or {})
    return options(*args, env_options_overrides=overrides, **kwargs)

  jax.clear_caches()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compiler, "get_compile_options", as_users)
    yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def as_users_compile():
  """For a module that claims something about rounding."""
  with _compiled_as_users():
    yield


@pytest.fixture
def as_users_compile_here():
  """For a single test that does."""
  with _compiled_as_users():
    yield


@pytest.fixture(scope="session")
def shared_data():
  """Function of path parts: the real file below the data directory.

  The directory is $CACHEAUG_DATA, or shared/data beside the repository. The
  test is skipped, saying what to provide, where the file is absent.
  """
  given = os.environ.get("CACHEAUG_DATA")
  root = Path(given) if given else _REPOSITORY.parent / "shared" / "data"

  def find(*parts: str) -> Path:
    path = root.joinpath(*parts)
    if not path.exists():
      pytest.skip(
        f"needs the public file {'/'.join(parts)}: put it below a directory "
        "and set CACHEAUG_DATA to that directory"
      )
    return path

  return find
