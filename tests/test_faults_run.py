"""Faults of runs that users of neighbouring projects reported, and their kind.

Each test fails without what it is about; the numbers are the sections'.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from ml_collections import ConfigDict

from cacheaug.errors import UserError, one_line
from cacheaug.run import checkpoint, files, heartbeat, lock, metrics
from cacheaug.run import workdir as workdirs


def _line(caught):
  text = str(caught.value)
  assert "\n" not in text
  return text


# --- 1: the disk is full ----------------------------------------------------


@pytest.fixture
def full(monkeypatch):
  """A file size limit, which fails writes as a full disk does, after so many
  bytes a file; returns the function that sets it."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  import signal

  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  yield lambda size: resource.setrlimit(
    resource.RLIMIT_FSIZE, (size, before[1])
  )
  resource.setrlimit(resource.RLIMIT_FSIZE, before)
  signal.signal(signal.SIGXFSZ, handler)
