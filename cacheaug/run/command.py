"""Runs a command: parses its flags, logs plainly, prints errors as one line."""

import contextlib
import logging as std_logging
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict

from cacheaug.config import leaves, nearest
from cacheaug.errors import UserError, one_line
from cacheaug.run import files

# The whole package: `_plain_logs` keeps the log records of its files.
_PACKAGE = str(Path(__file__).resolve().parent.parent)

_LESS_MEMORY = (
  "out of device memory: lower data.batch or traces.count, raise "
  "optimizer.accumulation, set remat=full, or split parameters over more "
  "devices with mesh.fsdp and mesh.tensor"
)

_NO_ROOM = "no space left on the disk: free some, then run again"

# What is in the text of JAX's errors where a collective has lost a peer: CPU
# (gloo), GPU (NCCL), the coordination service.
_LOST = ("Gloo", "NCCL", "nccl", "coordination service", "heartbeat")
_RESTART = (
  "another process of this run has ended: its own last lines say why; "
  "restart all processes, the run resumes from its last checkpoint"
)


def run(main: Callable[[], None], description: str) -> None:
  """Parses the command line and calls `main`.

  A UserError, bad flags and a full device end in one line and status 1.

  Args:
    main: the command; reads its flags from absl.
    description: shown by --help.
  """
  try:
    parse(sys.argv, description)
    _plain_logs()
    _keep_compiled()
    main()
    sys.stdout.flush()  # here, where an error of it has a case below
  except SystemExit:
    _flush()
    raise
  except UserError as e:
    fail(str(e))
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    _flush()  # ends as the system's own tools do where nobody reads on
    sys.exit(128 + signal.SIGPIPE)
  except Exception as e:
    # JAX's class of this name is not public in every version supported.
    text = one_line(e, 10_000)
    if "RESOURCE_EXHAUSTED" in text:
      fail(f"{_LESS_MEMORY} ({text[:160]})")
    if files.is_full(e):
      fail(f"{_NO_ROOM} ({text[:160]})")
    if _is_multi_process() and any(words in text for words in _LOST):
      fail(f"{_RESTART} ({text[:160]})")
    if not _is_multi_process():
      raise
    traceback.print_exc()
    fail(f"{type(e).__name__} (above) in this process; the others end with it")


def _flush() -> None:
  """Sends what was printed; where nobody takes it, forgets it quietly."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      # Python would try again at its end, and complain.
      with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(reason: str) -> NoReturn:
  """Ends the process with `error: reason` on one line and status 1."""
  with contextlib.suppress(OSError):  # stderr may be on the full disk, or shut
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
  _flush()
  if _is_multi_process():
    # Without JAX's own exit: it waits for processes that may wait for this
    # one. Process 0 goes last, since all others are aborted with it, and by
    # then have printed the error that all of them met.
    if not sys.modules["jax"].process_index():
      time.sleep(2.0)
    os._exit(1)
  sys.exit(1)


def _is_multi_process() -> bool:
  """Whether this process is one of a run of several."""
  # Looked up, since commands that never get to JAX should not import it.
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def parse(argv: list[str], description: str) -> None:
  """Parses absl's flags; UserError in place of their many exceptions."""
  if {"--help", "-h", "-help"} & set(argv[1:]):
    print(f"{description.strip()}\n\nFlags:")
    print(flags.FLAGS.main_module_help())
    print(_config_help(argv))
    sys.exit(0)
  # Shells leave the tilde of `--config=~/a.py` as it is.
  argv = [_expanded(argument) for argument in argv]
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      if flags.FLAGS["config"].value is None:
        raise UserError("--config is missing: give --config=configs/NAME.py")
      # A file that did not load raises at its first use.
      list(flags.FLAGS["config"].value)
  except UserError:
    raise
  except Exception as e:  # A config file is code and may raise anything.
    raise UserError(explain(argv, e)) from e
  if len(rest) > 1:
    raise UserError(f"{rest[1]!r} is not a flag: write --key=value")


def _expanded(argument: str) -> str:
  name, equals, value = argument.partition("=")
  if name.lstrip("-") != "config" or not value.startswith("~"):
    return argument
  return f"{name}{equals}{os.path.expanduser(value)}"


def explain(argv: list[str], error: Exception) -> str:
  """One line for what absl and ml_collections raise on bad flags.

  Args:
    argv: the program's name and its flags.
    error: what they raised.
  """
  names = [a.lstrip("-").partition("=")[0] for a in argv if a.startswith("-")]
  if "config" not in names:
    if any(n.startswith("config.") for n in names):
      return "--config is missing: give --config=configs/NAME.py"
    return _flag_error(names, error)
  try:
    known = sorted(_keys(_load(argv)))
  except Exception as e:
    return _not_loaded(argv, e)
  for name in names:
    key = name.removeprefix("config.")
    if key != name and key not in known:
      return (
        f"unknown key --config.{key} (all keys: cacheaug/config.py)"
        f"{nearest(key, known)}"
      )
  return _flag_error(names, error)


def _flag_error(names: list[str], error: Exception) -> str:
  known = list(flags.FLAGS)
  for name in names:
    base = name.partition(".")[0].removeprefix("no")
    if base not in known and name not in known:
      return f"unknown flag --{name} (see --help){nearest(name, known)}"
  return f"{one_line(error, 1000)}: see --help"


def _config_argument(argv: list[str]) -> str:
  """The value of --config, which may stand in an argument of its own."""
  for i, argument in enumerate(argv):
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "config":
      return value if equals else "".join(argv[i + 1 : i + 2])
  return ""


def _not_loaded(argv: list[str], error: Exception) -> str:
  return (
    f"--config={_config_argument(argv)} cannot be loaded: "
    f"{type(error).__name__}: {one_line(error, 1000)}"
  )


def _load(argv: list[str]) -> ConfigDict:
  path, colon, argument = _config_argument(argv).partition(":")
  return runpy.run_path(path)["get_config"](*([argument] if colon else []))


def _keys(config: ConfigDict) -> set[str]:
  """Every key, `a.b.c`, inner dictionaries' own among them."""
  keys = set()
  for key, _ in leaves(config):
    parts = key.split(".")
    keys |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
  return keys


def _config_help(argv: list[str]) -> str:
  if "config" not in flags.FLAGS:
    return ""
  if not _config_argument(argv):
    return (
      "Every key of a config is commented in cacheaug/config.py; with "
      "--config=FILE --help shows that file's keys and values."
    )
  try:
    config = _load(argv)
  except Exception as e:
    fail(_not_loaded(argv, e))
  lines = [f"Keys of {_config_argument(argv)}:"]
  for key, value in leaves(config):
    if not key.startswith("local."):
      lines.append(f"  --config.{key}={value}")
  return "\n".join(lines)


def _plain_logs() -> None:
  """Our messages from INFO on, other packages' from WARNING on, no prefix."""
  # Orbax logs a dozen lines a save through the same absl logger.
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(None)
  handler.addFilter(
    lambda r: (
      r.levelno >= std_logging.WARNING or r.pathname.startswith(_PACKAGE)
    )
  )


def _keep_compiled() -> None:
  """Keeps compiled programs between runs; JAX's own variable overrides."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  import jax

  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  jax.config.update("jax_compilation_cache_dir", f"{home}/cacheaug/compiled")
