"""Strict numerics on eight fake CPU devices, and where the real files are."""

import os
from pathlib import Path

# Both are read when jax is first imported, which any test may do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

_REPOSITORY = Path(__file__).resolve().parent.parent


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
