"""What figures are to be judged by: the code and the machine they came from."""

import os
import platform
import subprocess
from pathlib import Path

import jax


def commit() -> str:
  """The checkout's commit, '+ changes' if it has any; 'unknown' without git."""

  def git(*arguments):
    return subprocess.run(
      ["git", *arguments],
      cwd=Path(__file__).resolve().parent.parent,
      capture_output=True,
      text=True,
      check=True,
      timeout=20,
    ).stdout.strip()

  try:
    found = git("rev-parse", "--short=10", "HEAD")
    # Of the package alone: results lie in checkouts, too.
    return found + (" + changes" if git("status", "--porcelain", ".") else "")
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def hardware() -> str:
  """Devices, processor cores, versions."""
  devices = jax.devices()
  return (
    f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} processor "
    f"cores, {platform.machine()}, Python {platform.python_version()}, jax "
    f"{jax.__version__}"
  )
