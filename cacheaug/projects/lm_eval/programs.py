"""Whether a program that the model has written passes its tests.

It is run, in a process of its own with little time and memory and an empty
directory. That stops loops and floods, not malice: whatever the model writes
runs with this user's rights, so it is asked for by name (`execute=True`).
"""

import subprocess
import sys
import tempfile

_SECONDS = 3.0
# In the process itself, before the program: 1 GiB of memory, 1 MiB of files.
_LIMITS = f"""
import resource as _r
_r.setrlimit(_r.RLIMIT_AS, (1 << 30,) * 2)
_r.setrlimit(_r.RLIMIT_CPU, ({int(_SECONDS) + 1},) * 2)
_r.setrlimit(_r.RLIMIT_FSIZE, (1 << 20,) * 2)
"""


def pass_at_1(
  references: list[str], predictions: list[str | list[str]]
) -> float:
  """The share of programs that pass, as lm_eval's metric of that name.

  Args:
    references: tests of each, run after it.
    predictions: programs; of a list the first.
  """
  passed = [
    passes(program if isinstance(program, str) else program[0], tests)
    for program, tests in zip(predictions, references, strict=True)
  ]
  return sum(passed) / len(passed)


def passes(program: str, tests: str, seconds: float = _SECONDS) -> bool:
  """Runs `program` and then `tests`; False for an error or too much time."""
  # Ended by a status of its own: a program that exits early has not passed.
  source = f"{_LIMITS}\n{program}\n{tests}\nimport os as _os\n_os._exit(77)\n"
  with tempfile.TemporaryDirectory() as directory:
    try:
      done = subprocess.run(
        [sys.executable, "-I", "-c", source],
        cwd=directory,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=seconds,
        check=False,
      )
    except (subprocess.TimeoutExpired, ValueError, OSError):
      return False  # ValueError: a zero byte; OSError: longer than arguments
  return done.returncode == 77
